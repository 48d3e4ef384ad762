"""Texts as the detectors of personal data look at them: characters of one kind written in one way, and where marks are.

Most of a text is nothing to a detector. One pass over many texts at once, in numpy, finds the places of the few characters
with which data begin, so that patterns are asked there alone.
"""

import functools
import re

import numpy as np

# Six digits and more with at most three separators between two of them: where numbers of all kinds are looked for.
_RUN = re.compile(r"[0-9](?:[ .\-/()_]{0,3}+[0-9]){5,}+")

# Other spellings of characters that data are made of, one for one: spaces, hyphens and dashes, wide and Arabic digits.
_PLAIN = (
    dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x3000], " ")
    | dict.fromkeys([*range(0x2010, 0x2016), 0x2212, 0xFE63, 0xFF0D], "-")
    | {first + digit: str(digit) for first in (0xFF10, 0x660, 0x6F0, 0x966) for digit in range(10)}
    | {0xFF20: "@", 0xFE6B: "@", 0xFF0E: ".", 0xFF0B: "+", 0xFF0F: "/", 0xFF08: "(", 0xFF09: ")", 0xFF1A: ":"}
)
_FIRST_PLAIN = min(_PLAIN)
_PLAIN_CODES = np.arange(0x10000, dtype="<u4")
_PLAIN_CODES[list(_PLAIN)] = [ord(character) for character in _PLAIN.values()]

# Between texts that are looked at together: wider than what may stand within a number.
_BORDER = b"\n" * 8
# Texts are looked at together up to so many characters: few calls, and the arrays stay in the processor's cache.
_PIECE = 250_000
_LONG_WORD = 20

# Flags of characters, asked of every one of them.
_DIGIT, _BLANK, _OPENING, _AFTER_OPENING, _ROMANCE, _AFTER_ROMANCE = (1 << bit for bit in range(6))


def _flags(members):
    table = np.zeros(256, np.uint8)
    for flag, characters in members.items():
        table[list(characters.encode())] |= flag
    return table.tobytes()


def _is_one_of(characters):
    table = np.zeros(256, bool)
    table[list(characters.encode())] = True
    return table


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FLAGS = _flags(
    {
        _DIGIT: "0123456789",
        _BLANK: "".join(map(chr, range(33))),
        _OPENING: "[({<%&",
        _AFTER_OPENING: " aA4#cC",
        _ROMANCE: "CAPVRTLS",
        _AFTER_ROMANCE: "a/vloitur",
    }
)
_IS_CAPITAL = _is_one_of(_LETTERS.upper())
# Last letters of the Germanic words for a street (`pii_patterns._GERMANIC_ENDS`), before " 12".
_ENDS_STREET = _is_one_of("e.zgrmtnldfa")
_NOT_BEFORE_NUMBER = _is_one_of("_.,/-0123456789" + _LETTERS + _LETTERS.upper())
_AFTER_NUMBER = _is_one_of(" ," + _LETTERS + _LETTERS.upper())
_AFTER_SPACE = _is_one_of("dlotrabcpq123456789" + _LETTERS.upper())
# No Romance address has more characters from its first letter to its number.
_LONGEST_ADDRESS = 200


class View:
    """A text with what several detectors ask for.

    text: the text with plain spaces, dashes and digits for unusual ones; every character stays where it is.
    lowered: the same in small ASCII letters, a ? for every other one.
    long_words: its words of twenty ASCII characters and more, one a line.
    behind_capitals, numbers, street_numbers, romance, brackets: places where something may begin, see `_marks`.
    """

    def __init__(self, text, lowered, marks):
        self.text, self.lowered = text, lowered
        self._candidates, words, self.behind_capitals, self.numbers, self.street_numbers, self.romance, self.brackets = marks
        self.long_words = "\n".join([text[start:end] for start, end in words])

    @functools.cached_property
    def runs(self):
        """The (start, end) of runs of six digits and more."""
        found = [_RUN.finditer(self.text, start, end) for start, end in self._candidates]
        return [match.span() for matches in found for match in matches]


def views(texts):
    """Yields the View of each text."""
    piece, size = [], 0
    for text in texts:
        if piece and size + len(text) > _PIECE:
            yield from _views(piece)
            piece, size = [], 0
        piece.append(text)
        size += len(text)
    yield from _views(piece)


def _views(texts):
    texts = [_with_plain_characters(text) for text in texts]
    joined = _BORDER.join([b"", *(text.encode("ascii", "replace") for text in texts), b""])
    lowered = joined.lower().decode("ascii")
    starts = len(_BORDER) + np.cumsum([0, *(len(text) + len(_BORDER) for text in texts)])
    kinds = [_by_text(places, starts) for places in _marks(joined)]
    for number, (text, start) in enumerate(zip(texts, starts.tolist(), strict=False)):
        marks = [places[bounds[number] : bounds[number + 1]] for places, bounds in kinds]
        yield View(text, lowered[start : start + len(text)], marks)


def _by_text(places, starts):
    """Returns (places counted from the start of their texts, a list, where those of each text begin in it)."""
    first = places if places.ndim == 1 else places[:, 0]
    bounds = np.searchsorted(first, starts)
    offsets = np.repeat(starts[:-1], np.diff(bounds))
    return (places - (offsets if places.ndim == 1 else offsets[:, None])).tolist(), bounds.tolist()


def _marks(joined):
    """Returns where things may begin, in the order of `View`: two arrays [n, 2] of (start, end), five of places [n]."""
    codes = np.frombuffer(joined, np.uint8)
    flags = np.frombuffer(joined.translate(_FLAGS), np.uint8)
    digits = _places(flags & _DIGIT)
    gaps = np.diff(digits, prepend=-9, append=len(codes) + 9)
    first, last = digits[gaps[:-1] > 1], digits[gaps[1:] > 1]
    before, after = codes[first - 1], codes[last + 1]
    follows = (before == ord(" ")) & _ENDS_STREET[codes[first - 2]]
    leads = ~_NOT_BEFORE_NUMBER[before] & _AFTER_NUMBER[after] & ((after != ord(" ")) | _AFTER_SPACE[codes[last + 2]])
    behind_capitals = np.logical_and.reduce([_IS_CAPITAL[codes[first - back]] for back in range(1, 6)])
    return (
        _groups(digits, gaps),
        _long_words(flags),
        first[behind_capitals],
        first[leads],
        first[follows],
        _romance(flags, digits),
        _brackets(codes, flags),
    )


def _places(values):
    return np.flatnonzero(values != 0)  # of booleans numpy finds them several times as fast


def _groups(digits, gaps):
    """Returns (start, end) of six digits and more with at most three other characters between two of them."""
    first, last = np.flatnonzero(gaps[:-1] > 4), np.flatnonzero(gaps[1:] > 4)
    is_long = last - first >= 5
    return np.stack([digits[first[is_long]], digits[last[is_long]] + 1], axis=1)


def _long_words(flags):
    blanks = _places(flags & _BLANK)
    places = np.flatnonzero(np.diff(blanks) > _LONG_WORD)
    return np.stack([blanks[places] + 1, blanks[places + 1]], axis=1)


def _romance(flags, digits):
    """Returns where a Romance word for a street may begin: two of their letters, and a digit further on."""
    places = _places((flags[:-1] & _ROMANCE) & ((flags[1:] & _AFTER_ROMANCE) >> 1))
    number = np.searchsorted(digits, places)
    places, number = places[number < len(digits)], number[number < len(digits)]
    return places[digits[number] - places < _LONGEST_ADDRESS]


def _brackets(codes, flags):
    """Returns where an @ may be spelt: `[at`, `( at`, `%40`, `&#64;`, `&commat;`."""
    places = _places((flags[:-1] & _OPENING) & ((flags[1:] & _AFTER_OPENING) >> 1))
    second, third = codes[places + 1] | 0x20, codes[places + 2] | 0x20
    is_at = np.where(second == ord("a"), third == ord("t"), (second != ord(" ")) | (third == ord("a")))
    return places[is_at]


def _with_plain_characters(text):
    if text.isascii():
        return text
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    places = np.flatnonzero((codes >= _FIRST_PLAIN) & (codes < len(_PLAIN_CODES)))
    plain_codes = _PLAIN_CODES[codes[places]]
    changed = np.flatnonzero(plain_codes != codes[places])
    if not len(changed):
        return text
    codes = codes.copy()
    codes[places[changed]] = plain_codes[changed]
    return codes.tobytes().decode("utf-32-le", "surrogatepass")


def compact(value):
    """Returns a number of digits and letters without separators, in capitals."""
    return re.sub(r"[\W_]", "", plain(value)).upper()


def plain(value):
    """Returns a value with plain spaces, dashes and digits."""
    return value.translate(_PLAIN)


def bounded(pattern):
    """Returns a compiled pattern that matches whole ASCII words only: in Chinese, numbers touch the text."""
    return re.compile(rf"(?<![\w+])(?<!\w-)(?<!\d\.)(?:{pattern})(?!\w|[-.]\w)", re.ASCII)
