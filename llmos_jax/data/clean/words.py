"""Words of a shard in arrays: borders, lengths, kinds, hashes; found once for all steps that look at words.

A word here is what spaCy's rules for English make of text, but for their lists of exceptions, so that thresholds that were
published for such words mean what they meant: punctuation at the ends of what stands between blanks is words of its own,
one for each character; so are hyphens between letters. Where a border lies is decided by the classes of three characters
in a row (`_border_table`) and by runs of punctuation (`_peel`): no word becomes a Python object.

Hashes are those of strings: polynomial over the 64-bit integers, from sums of a prefix, so that any stretch of text has its
hash in constant time; mixed at the end. Equal hashes are taken for equal text: a pair of different ones collides with
a probability of 2^-60 or so.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

_BATCH_CHARACTERS = 1 << 19
(_SPACE, _LOWER, _UPPER, _DIGIT, _DOT, _HYPHEN, _DASH, _COMMA, _COLON, _SLASH, _EQUALS, _QUOTE, _MARK, _OTHER) = range(14)
_LETTERS = {_LOWER, _UPPER}
_ALNUM = {_LOWER, _UPPER, _DIGIT}
_IS_LETTER = np.isin(np.arange(16), [_LOWER, _UPPER])
_IS_PEELED = np.isin(np.arange(16), [_DOT, _DASH, _COMMA, _COLON, _EQUALS, _QUOTE, _MARK])
_MARKS = '!?;()[]{}_#*&…"“”„«»‹›`´¿¡؟؛،。？！、；・·।॥%$£€¥§'
_CLASS_OF_MARK = {".": _DOT, "-": _HYPHEN, "~": _HYPHEN, "–": _DASH, "—": _DASH, ",": _COMMA, "/": _SLASH, "=": _EQUALS}
_CLASS_OF_MARK |= dict.fromkeys(":<>：", _COLON) | dict.fromkeys("'’‘", _QUOTE) | dict.fromkeys(_MARKS, _MARK)
_SHORT = [ord(letter) for letter in "smd"]
_LONG = [ord(one) * 256 + ord(two) for one, two in ("ll", "re", "ve")]
_UNITS = [ord(unit) for unit in "mgtTGMK"]
_LONG_UNITS = [
    ord(first) << 21 | ord(second)
    for first, seconds in {"k": "mgb", "K": "B", "m": "mgb", "M": "B", "c": "m", "g": "b", "G": "B", "T": "B", "P": "a"}.items()
    for second in seconds
]
_HAS_LETTER, _NO_SIGN = 1, 2
_ROW_BITS = 12
_ROW = 1 << _ROW_BITS
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
# What counts as a sign, not a word, in Gopher's rules: punctuation of the scripts in use, controls.
_SIGNS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of n documents, W in all, in order.

    first: [n + 1], document d has the words first[d] .. first[d + 1].
    lengths: int32 [W], characters. hashes, folded: uint64 [W], of the word, and of its lower-case form.
    has_letter, is_sign: bool [W], whether any character is a letter, whether all are punctuation.
    """

    first: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    folded: np.ndarray
    has_letter: np.ndarray
    is_sign: np.ndarray

    def totals(self, values):
        """Returns the sums over the words of each document of `values` [W], as numbers [n]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return sums[self.first[1:]] - sums[self.first[:-1]]


def characters_that(test):
    """Returns a boolean array by code point: for which characters one of numpy's tests of text holds."""
    found = np.zeros(0x110000, bool)
    # No letter, digit or blank is beyond the third plane's ideographs: a fifth of the work.
    found[:0x33000] = test(np.arange(0x33000, dtype=np.uint32).view("U1"))
    return found


@functools.cache
def _character_tables():
    """Returns tables by code point: class (uint8), _HAS_LETTER and _NO_SIGN flags (uint8), lower case (uint32)."""
    classes = np.full(0x110000, _OTHER, np.uint8)
    classes[characters_that(np.strings.isspace)] = _SPACE
    is_letter, is_upper = characters_that(np.strings.isalpha), characters_that(np.strings.isupper)
    classes[is_letter] = _LOWER
    classes[is_upper] = _UPPER
    classes[characters_that(np.strings.isdigit)] = _DIGIT
    # Symbols such as arrows and pictures, in the blocks that are made of them.
    symbols = (*range(0xA0, 0x100), *range(0x2000, 0x3400), *range(0x1F000, 0x1FC00))
    classes[[code for code in symbols if unicodedata.category(chr(code)) == "So"]] = _MARK
    for mark, kind in _CLASS_OF_MARK.items():
        classes[ord(mark)] = kind
    flags = np.where(is_letter, _HAS_LETTER | _NO_SIGN, _NO_SIGN).astype(np.uint8)
    flags[[ord(c) for c in _SIGNS]] = 0
    flags[:32] = flags[127:160] = 0
    flags[classes == _SPACE] = 0
    lower = np.arange(0x110000, dtype=np.uint32)
    for code in np.flatnonzero(is_upper | characters_that(np.strings.istitle)).tolist():
        # The few capitals that become two letters stand for the first of them.
        lower[code] = ord(chr(code).lower()[0])
    return classes, flags, lower


@functools.cache
def _hash_table():
    """Returns a random-looking uint64 by code point."""
    return mixed(np.arange(1, 0x110001, dtype=np.uint64))


@functools.cache
def _is_folded_table():
    """Returns by code point whether its lower-case form is another one."""
    return _character_tables()[2] != np.arange(0x110000)


@functools.cache
def _border_table():
    """Returns bits for three classes in a row: 1, a word starts at the middle one; 2, a word starts after it."""
    table = np.zeros((16, 16, 16), np.uint8)
    for before, here, after in np.ndindex(14, 14, 14):
        if here != _SPACE:
            table[before, here, after] = _borders(before, here, after)
    return table


def _borders(before, here, after):
    """Returns the bits of one triple: what parts the inside of a word. Marks at its ends are `_peel`'s."""
    both = 3
    if here == _HYPHEN:
        is_part = before in _ALNUM and after in _LETTERS
        return both if is_part or (before == _DIGIT and after in (_DIGIT, _HYPHEN)) else 0
    if here in (_COLON, _SLASH, _EQUALS):
        return both if before in _ALNUM and after in _LETTERS else 0
    if here in (_DASH, _COMMA):
        return both if before in _LETTERS and after in _LETTERS else 0
    if here == _DOT and _DOT in (before, after):
        return (before != _DOT) + 2 * (after != _DOT)
    return both if here == _DOT and before == _LOWER and after == _UPPER else 0


@functools.lru_cache(maxsize=16)
def _powers(base, rows):
    """Returns base ** i for i < _ROW and base ** (_ROW * i) for i < rows, modulo 2 ** 64: the product of two is any power."""
    both = []
    for factor, size in ((base, _ROW), (pow(base, _ROW, 1 << 64), rows)):
        factors = np.full(size, factor, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both


def mixed(values):
    """Returns uint64 values with all bits depending on all bits (murmur3's finaliser), a one-to-one map."""
    values = np.array(values, np.uint64)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def prefix_sums(codes):
    """Returns sums [N + 1] from which `stretch_hashes` takes the hash of any stretch of the code points `codes` [N]."""
    low, high = _powers(_BASE, _rows(len(codes)))
    sums = np.empty(len(codes) + 1, np.uint64)
    sums[0], terms = 0, sums[1:]
    # "clip" spares a copy; no code point is beyond the table.
    np.take(_hash_table(), codes, out=terms, mode="clip")
    for row, start in enumerate(range(0, len(codes), _ROW)):
        part = terms[start : start + _ROW]
        part *= low[: len(part)]
        part *= high[row]
    return np.cumsum(sums, out=sums)


def stretch_hashes(sums, starts, stops):
    """Returns the uint64 hashes of the stretches starts .. stops of the text that `prefix_sums` gave `sums` for."""
    low, high = _powers(_BASE_INVERSE, _rows(len(sums)))
    return mixed((sums[stops] - sums[starts]) * low[starts & (_ROW - 1)] * high[starts >> _ROW_BITS])


def _folded_hashes(hashes, codes, start, stop):
    """Returns the hashes of the lower-case forms of words: those that have capitals are hashed anew."""
    capitals = np.flatnonzero(_is_folded_table()[codes])
    if not len(capitals):
        return hashes
    words = np.searchsorted(start, capitals, side="right") - 1
    words = words[np.diff(words, prepend=-1) > 0]
    places, begins = _places_within(start[words], stop[words])
    within = places - np.repeat(start[words], np.diff(np.append(begins, len(places))))
    low, high = _powers(_BASE, _rows(len(codes)))
    terms = _hash_table()[_character_tables()[2][codes[places]]] * low[within & (_ROW - 1)] * high[within >> _ROW_BITS]
    folded = hashes.copy()
    folded[words] = mixed(np.add.reduceat(terms, begins))
    return folded


def _places_within(start, stop):
    """Returns (all places of the stretches start .. stop, one after the other; where each stretch begins among them)."""
    sizes = stop - start
    begins = np.cumsum(sizes) - sizes
    return np.repeat(start - begins, sizes) + np.arange(sizes.sum()), begins


def _rows(size):
    return 1 << (size >> _ROW_BITS).bit_length()


def code_points(texts):
    """Returns (code points with a newline before, after and between texts, int64 [n] places where the texts start)."""
    joined = "\n".join(["", *texts, ""])
    # Tables are looked up by numbers of the machine's own size twice as fast.
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return codes, np.cumsum(lengths + 1) - lengths


def batches(texts):
    """Yields slices of a list of texts of about half a million characters, so that arrays stay in the processor's cache."""
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= _BATCH_CHARACTERS or stop == len(texts):
            yield slice(start, stop)
            start, size = stop, 0


def _contractions(quotes, codes, classes):
    """Returns the places where English contractions start: n't, 's, 'm, 'd, 'll, 're, 've; `quotes`: places of apostrophes."""
    places = quotes[(quotes > 1) & (quotes < len(codes) - 3)]
    before, one, two = (codes[places + offset] | 32 for offset in (-1, 1, 2))
    is_letter = [_IS_LETTER[classes[places + offset]] for offset in (-2, -1, 1, 2, 3)]
    is_within = is_letter[1] & is_letter[2]
    short = is_within & ~is_letter[3]
    long = is_within & is_letter[3] & ~is_letter[4]
    starts = (short & np.isin(one, _SHORT)) | (long & np.isin(one * 256 + two, _LONG))
    negative = short & (one == ord("t")) & (before == ord("n")) & is_letter[0]
    return np.concatenate([places[starts], places[negative] - 1])


def _units(codes, classes):
    """Returns the places where a unit stands after a number: 5m, 10MB."""
    places = np.flatnonzero(classes == _DIGIT) + 1
    places = places[_IS_LETTER[classes[places]]]
    is_end = _IS_PEELED | (np.arange(16) == _SPACE)
    # Whoever has a letter after it has two more characters after it: the text ends with a blank.
    after_one, after_two = is_end[classes[places + 1]], is_end[classes[np.minimum(places + 2, len(codes) - 1)]]
    one, two = codes[places], codes[places] << 21 | codes[places + 1]
    return places[(after_one & np.isin(one, _UNITS)) | (after_two & np.isin(two, _LONG_UNITS))]


def _peel(begins, places, classes):
    """Marks the borders of punctuation, at `places`, at the ends of what stands between blanks: each character is a word."""
    if not len(places):
        return
    opens = np.diff(places, prepend=-2) > 1
    firsts = places[opens]
    lasts = places[np.append(np.flatnonzero(opens)[1:], len(places)) - 1]
    before, earlier = classes[firsts - 1], classes[np.maximum(firsts - 2, 0)]
    leads, trails = before == _SPACE, classes[lasts + 1] == _SPACE
    # The dot of an initial, of a single letter, of "e.g." and of a path is not the end of a sentence.
    is_initial = (before == _UPPER) & (earlier != _UPPER)
    is_abbreviation = _IS_LETTER[before] & ((earlier == _DOT) | (earlier == _SPACE))
    is_kept = is_initial | is_abbreviation | (before == _SLASH) | (before == _OTHER)
    trails &= ~((firsts == lasts) & (classes[firsts] == _DOT) & is_kept)
    run = np.cumsum(opens) - 1
    here, left, right = classes[places], classes[places - 1], classes[places + 1]
    # "=" is peeled from the left only, a dot from the right only; dots in a row are one word.
    is_edge = (trails[run] & (here != _EQUALS)) | (leads[run] & (here != _DOT))
    begins[places[is_edge & ~((here == _DOT) & (left == _DOT))]] = True
    begins[places[is_edge & ~((here == _DOT) & (right == _DOT))] + 1] = True


def _join_addresses(begins, colons, codes, classes):
    """Takes the borders out of web addresses, from `://` to the last character that is no punctuation."""
    places = colons[colons < len(codes) - 3]
    places = places[(codes[places + 1] == ord("/")) & (codes[places + 2] == ord("/"))]
    if not len(places):
        return
    blanks = np.flatnonzero(classes == _SPACE)
    stops = blanks[np.searchsorted(blanks, places)]
    is_mark = np.ones(len(stops), bool)
    while is_mark.any():
        is_mark = _IS_PEELED[classes[stops - 1]] & (stops > places + 1)
        stops -= is_mark
    borders = np.flatnonzero(begins)
    address = np.searchsorted(places, borders, side="right") - 1
    begins[borders[(address >= 0) & (borders < stops[address])]] = False


def _borders_of(codes, classes):
    """Returns the places where words start and where they stop, in text that starts and ends with a blank."""
    begins = np.zeros(len(codes), bool)
    marks = np.flatnonzero(classes > _DIGIT)
    kinds = classes[marks]
    borders = _border_table()[classes[marks - 1], kinds, classes[marks + 1]]
    begins[marks[(borders & 1) > 0]] = True
    begins[marks[(borders & 2) > 0] + 1] = True
    begins[_contractions(marks[kinds == _QUOTE], codes, classes)] = True
    begins[_units(codes, classes)] = True
    _join_addresses(begins, marks[kinds == _COLON], codes, classes)
    _peel(begins, marks[_IS_PEELED[kinds]], classes)
    is_space = classes == _SPACE
    begins[1:] |= is_space[:-1]
    ends = np.ones(len(codes), bool)
    ends[:-1] = (begins | is_space)[1:]
    return np.flatnonzero(begins & ~is_space), np.flatnonzero(ends & ~is_space) + 1


def _flags_of_words(codes, start, stop):
    """Returns the flags of all characters of each word together, uint8."""
    table = _character_tables()[1]
    flags = table[codes[start]]
    # A word that starts with a letter has all flags; of the few others the rest is looked at.
    open_ones = np.flatnonzero((flags & _HAS_LETTER == 0) & (stop - start > 1))
    if len(open_ones):
        places, begins = _places_within(start[open_ones], stop[open_ones])
        flags[open_ones] = np.bitwise_or.reduceat(table[codes[places]], begins)
    return flags


def _find(texts):
    """Returns the Words of one batch."""
    codes, starts = code_points(texts)
    start, stop = _borders_of(codes, _character_tables()[0][codes])
    flags = _flags_of_words(codes, start, stop)
    hashes = stretch_hashes(prefix_sums(codes), start, stop)
    return Words(
        first=np.append(np.searchsorted(start, starts), len(start)),
        lengths=(stop - start).astype(np.int32),
        hashes=hashes,
        folded=_folded_hashes(hashes, codes, start, stop),
        has_letter=(flags & _HAS_LETTER) > 0,
        is_sign=flags & _NO_SIGN == 0,
    )


class OfTexts:
    """Arrays found in lists of texts, kept for the texts asked for last: many steps look at the same ones, or at some of them.

    find(texts): a dataclass of arrays with borders `first` [n + 1] for a batch of n texts.
    """

    def __init__(self, find):
        self._find = find
        self._places, self._held = {}, None

    def __call__(self, texts):
        """Returns the arrays for a list of texts."""
        if self._held is None or not all(text in self._places for text in texts):
            distinct = list(dict.fromkeys(texts))
            self._places = {text: place for place, text in enumerate(distinct)}
            self._held = concatenate([self._find(distinct[part]) for part in batches(distinct)] or [self._find([])])
        places = np.fromiter(map(self._places.get, texts), np.int64, len(texts))
        is_all = len(places) == len(self._places) and bool((places == np.arange(len(places))).all())
        return self._held if is_all else _select(self._held, places)


def _columns(arrays):
    return {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays) if field.name != "first"}


def concatenate(parts):
    """Returns one dataclass of arrays with borders `first` from those of consecutive batches of documents."""
    shifts = np.cumsum([0, *(part.first[-1] for part in parts)])
    first = [part.first[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
    columns = [_columns(part) for part in parts]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return type(parts[0])(first=np.concatenate([*first, shifts[-1:]]), **joined)


def _select(arrays, documents):
    """Returns what `arrays` hold for the numbers `documents`, in their order."""
    counts = np.diff(arrays.first)[documents]
    first = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(arrays.first[documents] - first[:-1], counts) + np.arange(first[-1])
    return type(arrays)(first=first, **{name: values[places] for name, values in _columns(arrays).items()})


@functools.cache
def hash_of(word):
    """Returns the hash that `Words.hashes` holds for a word, an unsigned whole number."""
    codes, starts = code_points([word])
    return stretch_hashes(prefix_sums(codes), starts, starts + len(word))[0]


def _find_all(texts):
    """Returns the Words of texts of any length: long ones are looked at in pieces, so that memory is bounded."""
    if all(len(text) <= 2 * _BATCH_CHARACTERS for text in texts):
        return _find(texts)
    cut = [list(_pieces(text)) for text in texts]
    pieces = [piece for parts in cut for piece in parts]
    found = concatenate([_find(pieces[part]) for part in batches(pieces)])
    return dataclasses.replace(found, first=found.first[np.cumsum([0, *map(len, cut)])])


def _pieces(text):
    """Yields a text in pieces that end at a newline or blank; a word longer than a piece is cut, too."""
    start = 0
    while len(text) - start > _BATCH_CHARACTERS:
        stop = start + _BATCH_CHARACTERS
        blank = max(text.rfind(mark, start, stop) for mark in " \n")
        stop = blank + 1 if blank > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


# Returns the Words of a list of texts.
words_of = OfTexts(_find_all)
