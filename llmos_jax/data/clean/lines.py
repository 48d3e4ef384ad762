"""Lines and paragraphs of a shard in arrays: lengths, hashes, how they start and end; found once for all steps that look.

Lines end at `\\n` alone: the step `normalise` comes first.
"""

import dataclasses
import functools

import numpy as np

from llmos_jax.data.clean.words import OfTexts, characters_that, code_points, prefix_sums, stretch_hashes

# Unicode's property Sentence_Terminal, in ranges: what ends a sentence in any script.
_TERMINAL_RANGES = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D5 "
    "1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2CF9-2CFB "
    "2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB "
    "FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 "
    "111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E "
    "11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88"
)
_SPACE, _TERMINAL, _QUOTE, _CLOSING, _BULLET, _DOT, _ELLIPSIS = (1 << bit for bit in range(7))


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines of n documents, N in all, in order, blank ones too.

    first: [n + 1], document d has the lines first[d] .. first[d + 1].
    lengths: int32 [N], characters. hashes: uint64 [N].
    words, longest, sentences: int32 [N], of what stands between blanks: how many, characters of the longest, and how many end
    a sentence before the line's end, plus one.
    has_bullet, has_ellipsis: bool [N], whether it starts with one, ends with one, blanks aside.
    ends_sentence: bool [N], whether it ends with a mark that ends sentences in any script.
    ends_quoted: bool [N], whether it ends, blanks aside, with one of . ? ! " ' and not with `...` (C4's rule).
    """

    first: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    words: np.ndarray
    longest: np.ndarray
    sentences: np.ndarray
    has_bullet: np.ndarray
    has_ellipsis: np.ndarray
    ends_sentence: np.ndarray
    ends_quoted: np.ndarray

    @property
    def documents(self):
        """Number of the document of each line, int64 [N]."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    def totals(self, values):
        """Returns the sums over the lines of each document of `values` [N], as numbers [n]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return sums[self.first[1:]] - sums[self.first[:-1]]


@functools.cache
def terminals():
    """Returns the characters that end a sentence, of all scripts, as text."""
    ranges = (part.split("-") for part in _TERMINAL_RANGES.split())
    return "".join(chr(code) for one in ranges for code in range(int(one[0], 16), int(one[-1], 16) + 1))


@functools.cache
def _flags_table():
    flags = np.zeros(0x110000, np.uint8)
    flags[characters_that(np.strings.isspace)] = _SPACE
    sets = ((terminals(), _TERMINAL), ("\"'", _QUOTE), ("\"')]}”’»", _CLOSING), ("•-", _BULLET), (".", _DOT), ("…", _ELLIPSIS))
    for characters, flag in sets:
        flags[[ord(c) for c in characters]] |= flag
    return flags


def _find(texts):
    """Returns the Lines of one batch."""
    codes, starts = code_points(texts)
    flags = _flags_table()[codes]
    newlines = np.flatnonzero(codes == 10)
    begin, end = newlines[:-1] + 1, newlines[1:]
    is_space = (flags & _SPACE) > 0
    # What stands between blanks; the text starts and ends with one.
    start = np.flatnonzero(is_space[:-1] & ~is_space[1:]) + 1
    stop = np.flatnonzero(~is_space[:-1] & is_space[1:]) + 1
    first = np.searchsorted(start, begin)
    last = np.append(first[1:], len(start))
    words = last - first
    some = np.flatnonzero(words)
    longest, sentences = np.zeros(len(begin), np.int32), np.zeros(len(begin), np.int32)
    has_bullet, has_ellipsis, ends_quoted = (np.zeros(len(begin), bool) for _ in range(3))
    if len(some):
        final = flags[stop - 1]
        before = flags[stop - 2]
        is_dots = ((final & before) & _DOT) > 0
        ends = ((final & _TERMINAL) > 0) | (((final & _CLOSING) > 0) & ((before & _TERMINAL) > 0))
        ends &= ~is_dots
        longest[some] = np.maximum.reduceat(stop - start, first[some])
        counts = np.concatenate([[0], np.cumsum(ends)])
        sentences[some] = counts[last[some] - 1] - counts[first[some]] + 1
        has_bullet[some] = (flags[start[first[some]]] & _BULLET) > 0
        tail = stop[last[some] - 1]
        dotted = ((flags[tail - 1] & flags[tail - 2] & flags[tail - 3]) & _DOT) > 0
        has_ellipsis[some] = dotted | ((flags[tail - 1] & _ELLIPSIS) > 0)
        # C4 knows only the marks of English.
        ends_quoted[some] = np.isin(codes[tail - 1], [ord(c) for c in ".?!\"'"]) & ~dotted
    return Lines(
        first=np.append(np.searchsorted(begin, starts), len(begin)),
        lengths=(end - begin).astype(np.int32),
        hashes=stretch_hashes(prefix_sums(codes), begin, end),
        words=words.astype(np.int32),
        longest=longest,
        sentences=sentences,
        has_bullet=has_bullet,
        has_ellipsis=has_ellipsis,
        ends_sentence=((flags[end - 1] & _TERMINAL) > 0) & (end > begin),
        ends_quoted=ends_quoted,
    )


# Returns the Lines of a list of texts.
lines_of = OfTexts(_find)
