"""Words of a shard in arrays: borders, lengths, kinds, hashes; views of texts.

A word here is what spaCy's rules for English make of text, but for their lists of exceptions, so that thresholds that were
published for such words mean what they meant: punctuation at the ends of what stands between blanks is words of its own,
one for each character; so are hyphens between letters. Where a border lies is decided by the classes of three characters
in a row (`_border_table`) and by runs of punctuation (`_peel`): no word becomes a Python object.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

from llmos_jax.data.clean.characters import BATCH_CHARACTERS, Batch, batches, characters_that, prefix_sums, stretch_hashes
from llmos_jax.data.clean.views import View, concatenate

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
# What counts as a sign, not a word, in Gopher's rules: punctuation of the scripts in use, controls.
_SIGNS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"


@dataclasses.dataclass(frozen=True)
class Words(View):
    """Words of n documents, W in all, in order.

    lengths: int32 [W], characters. has_letter, is_sign: bool [W], whether any character is a letter, whether all are signs.
    """

    lengths: np.ndarray
    has_letter: np.ndarray
    is_sign: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the Words of a batch."""
        return _in_pieces(_find_words, batch)


@dataclasses.dataclass(frozen=True)
class WordHashes(View):
    """Hashes of the same words, uint64 [W], those of `characters.hash_of`."""

    values: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the WordHashes of a batch."""
        return _in_pieces(_find_hashes, batch)


@dataclasses.dataclass(frozen=True)
class FoldedHashes(View):
    """Hashes of the lower-case forms of the same words, uint64 [W]."""

    values: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the FoldedHashes of a batch."""
        return _in_pieces(_find_folded, batch)


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
def _is_folded_table():
    """Returns by code point whether its lower-case form is another one."""
    return _character_tables()[2] != np.arange(0x110000)


@functools.cache
def _border_table():
    """Returns bits for three classes in a row, four bits each: 1, a word starts at the middle one; 2, one starts after it."""
    table = np.zeros((16, 16, 16), np.uint8)
    for before, here, after in np.ndindex(14, 14, 14):
        if here != _SPACE:
            table[before, here, after] = _borders(before, here, after)
    return table.reshape(-1)


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
    begins[_places_within(places, stops)[0]] = False


def _borders_of(codes, classes):
    """Returns the places where words start and where they stop, in text that starts and ends with a blank."""
    begins = np.zeros(len(codes), bool)
    marks = np.flatnonzero(classes > _DIGIT)
    kinds = classes[marks]
    triples = classes.take(marks - 1).astype(np.intp) << 8 | kinds.astype(np.intp) << 4 | classes.take(marks + 1)
    borders = _border_table().take(triples)
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
    flags = table.take(codes.take(start))
    # A word that starts with a letter has all flags; of the few others the rest is looked at.
    open_ones = np.flatnonzero((flags & _HAS_LETTER == 0) & (stop - start > 1))
    if len(open_ones):
        places, begins = _places_within(start[open_ones], stop[open_ones])
        flags[open_ones] = np.bitwise_or.reduceat(table[codes[places]], begins)
    return flags


def _word_borders(batch):
    """Returns (where the words of a batch start, where they stop, `first` of their views)."""
    start, stop = _borders_of(batch.codes, _character_tables()[0].take(batch.codes))
    return start, stop, np.append(np.searchsorted(start, batch.starts), len(start))


def _find_words(batch):
    start, stop, first = batch.once(_word_borders)
    flags = _flags_of_words(batch.codes, start, stop)
    lengths = (stop - start).astype(np.int32)
    return Words(first=first, lengths=lengths, has_letter=(flags & _HAS_LETTER) > 0, is_sign=flags & _NO_SIGN == 0)


def _find_hashes(batch):
    start, stop, first = batch.once(_word_borders)
    return WordHashes(first=first, values=batch.hashes(start, stop))


def _find_folded(batch):
    start, stop, first = batch.once(_word_borders)
    hashes = batch.hashes(start, stop)
    # Words that have capitals are hashed anew.
    capitals = np.flatnonzero(_is_folded_table().take(batch.codes))
    if len(capitals):
        words = np.searchsorted(start, capitals, side="right") - 1
        words = words[np.diff(words, prepend=-1) > 0]
        places, begins = _places_within(start[words], stop[words])
        sums = prefix_sums(_character_tables()[2][batch.codes[places]])
        hashes[words] = stretch_hashes(sums, begins, np.append(begins[1:], len(places)))
    return FoldedHashes(first=first, values=hashes)


def _places_within(start, stop):
    """Returns (all places of the stretches start .. stop, one after the other; where each stretch begins among them)."""
    sizes = stop - start
    begins = np.cumsum(sizes) - sizes
    return np.repeat(start - begins, sizes) + np.arange(sizes.sum()), begins


def _in_pieces(find, batch):
    """Returns find(batch), for texts of any length: long ones are looked at in pieces, so that memory is bounded."""
    if all(len(text) <= 2 * BATCH_CHARACTERS for text in batch.texts):
        return find(batch)
    cut = [list(_pieces(text)) for text in batch.texts]
    pieces = [piece for parts in cut for piece in parts]
    found = concatenate([find(Batch(pieces[part])) for part in batches(pieces)])
    return dataclasses.replace(found, first=found.first[np.cumsum([0, *map(len, cut)])])


def _pieces(text):
    """Yields a text in pieces that end at a newline or blank; a word longer than a piece is cut, too."""
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        stop = start + BATCH_CHARACTERS
        blank = max(text.rfind(mark, start, stop) for mark in " \n")
        stop = blank + 1 if blank > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]
