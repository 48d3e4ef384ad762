"""Lines of a shard in arrays: lengths, hashes, how they start and end: views of texts.

Lines end at `\\n` alone: the step `normalise` comes first.
"""

import dataclasses
import functools

import numpy as np

from llmos_jax.data.clean.characters import characters_that
from llmos_jax.data.clean.views import View

# Unicode's property Sentence_Terminal, in ranges: what ends a sentence in any script.
_TERMINAL_RANGES = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D5 "
    "1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2CF9-2CFB "
    "2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB "
    "FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 "
    "111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E "
    "11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88"
)
_SPACE, _TERMINAL, _CLOSING, _BULLET, _DOT, _ELLIPSIS, _NEWLINE, _C4 = (1 << bit for bit in range(8))


@dataclasses.dataclass(frozen=True)
class Lines(View):
    """Lines of n documents, N in all, in order, blank ones too.

    lengths: int32 [N], characters. words: int32 [N], how many stand between blanks.
    has_bullet, has_ellipsis: bool [N], whether it starts with one, ends with one, blanks aside.
    ends_sentence: bool [N], whether it ends with a mark that ends sentences in any script.
    ends_quoted: bool [N], whether it ends, blanks aside, with one of . ? ! " ' and not with `...` (C4's rule).
    """

    lengths: np.ndarray
    words: np.ndarray
    has_bullet: np.ndarray
    has_ellipsis: np.ndarray
    ends_sentence: np.ndarray
    ends_quoted: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the Lines of a batch."""
        return _find(batch)


@dataclasses.dataclass(frozen=True)
class LineWords(View):
    """What stands between blanks in the same lines.

    longest, sentences: int32 [N], characters of the longest, and how many end a sentence before the line's end, plus one.
    """

    longest: np.ndarray
    sentences: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the LineWords of a batch."""
        return _find_words(batch)


@dataclasses.dataclass(frozen=True)
class LineHashes(View):
    """Hashes of the same lines, uint64 [N]."""

    values: np.ndarray

    @classmethod
    def find(cls, batch):
        """Returns the LineHashes of a batch."""
        begin, end, first = batch.once(_line_borders)
        return cls(first=first, values=batch.hashes(begin, end))


@functools.cache
def terminals():
    """Returns the characters that end a sentence, of all scripts, as text."""
    ranges = (part.split("-") for part in _TERMINAL_RANGES.split())
    return "".join(chr(code) for one in ranges for code in range(int(one[0], 16), int(one[-1], 16) + 1))


@functools.cache
def _flags_table():
    flags = np.zeros(0x110000, np.uint8)
    flags[characters_that(np.strings.isspace)] = _SPACE
    # C4 knows only the marks of English.
    sets = {
        _TERMINAL: terminals(), _CLOSING: "\"')]}”’»", _BULLET: "•-", _DOT: ".", _ELLIPSIS: "…", _NEWLINE: "\n", _C4: ".?!\"'",
    }  # fmt: skip
    for flag, characters in sets.items():
        flags[[ord(c) for c in characters]] |= flag
    return flags


def _flags(batch):
    return _flags_table().take(batch.codes)


def _line_borders(batch):
    """Returns (where the lines of a batch start, where they stop, `first` of their views)."""
    newlines = np.flatnonzero((batch.once(_flags) & _NEWLINE) > 0)
    begin, end = newlines[:-1] + 1, newlines[1:]
    return begin, end, np.append(np.searchsorted(begin, batch.starts), len(begin))


def _words_between(batch):
    """Returns (start, stop of what stands between blanks; numbers of the first of each line, and of the one after its last)."""
    is_space = batch.once(_flags) & _SPACE
    # The text starts and ends with a blank, so every other border is a start.
    borders = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    start, stop = borders[::2], borders[1::2]
    first = np.searchsorted(start, batch.once(_line_borders)[0])
    return start, stop, first, np.append(first[1:], len(start))


def _find(batch):
    flags, (begin, end, first_lines) = batch.once(_flags), batch.once(_line_borders)
    start, stop, first, last = batch.once(_words_between)
    some = np.flatnonzero(last - first)
    has_bullet, has_ellipsis, ends_quoted = (np.zeros(len(begin), bool) for _ in range(3))
    has_bullet[some] = (flags[start[first[some]]] & _BULLET) > 0
    tail = stop[last[some] - 1]
    dotted = ((flags[tail - 1] & flags[tail - 2] & flags[tail - 3]) & _DOT) > 0
    has_ellipsis[some] = dotted | ((flags[tail - 1] & _ELLIPSIS) > 0)
    ends_quoted[some] = ((flags[tail - 1] & _C4) > 0) & ~dotted
    return Lines(
        first=first_lines,
        lengths=(end - begin).astype(np.int32),
        words=(last - first).astype(np.int32),
        has_bullet=has_bullet,
        has_ellipsis=has_ellipsis,
        ends_sentence=((flags[end - 1] & _TERMINAL) > 0) & (end > begin),
        ends_quoted=ends_quoted,
    )


def _find_words(batch):
    flags, (start, stop, first, last) = batch.once(_flags), batch.once(_words_between)
    some = np.flatnonzero(last - first)
    longest, sentences = np.zeros(len(first), np.int32), np.zeros(len(first), np.int32)
    if len(some):
        final, before = flags[stop - 1], flags[stop - 2]
        ends = ((final & _TERMINAL) > 0) | (((final & _CLOSING) > 0) & ((before & _TERMINAL) > 0))
        ends &= (final & before & _DOT) == 0
        longest[some] = np.maximum.reduceat(stop - start, first[some])
        counts = np.concatenate([[0], np.cumsum(ends)])
        sentences[some] = counts[last[some] - 1] - counts[first[some]] + 1
    return LineWords(first=batch.once(_line_borders)[2], longest=longest, sentences=sentences)
