"""Whether a string was drawn by lot, or is of words: how surprising its letters follow one another."""

import functools
import re

# Bits of surprise at the second letter of a pair, at most 9: row "a" to "z", column "a" to "z". Counted over the words of
# 12 MB of English and German books and 8 MB of Python, each word by the logarithm of how often it is there.
_PAIRS = (
    "95449757596343959343467769", "36772879469377479446499968", "39673892594579389564599979", "47752778299566479546477969",
    "56546666498453868234767579", "38773379299487389454498978", "48881864498575579345498989", "38972899398565399464597969",
    "56454649997452469543959796", "38782788586899268768289989", "48862767398475479544586978", "37752779397387379854579949",
    "25872889398648339856599979", "48433537496775579843668977", "66447657796442549344465788", "38773685498488349354598969",
    "78777899789686699667098999", "36652657396655379544577967", "58473775396667449842487969", "38672784399578469445597956",
    "55554558599442749333999888", "39781889399978389879899989", "28762795298685389457697889", "56363576399658639652678558",
    "55564677498543539534876877", "48881889398678599874394976",
)  # fmt: skip
# Between characters that are not two letters of one case.
_DIGIT_AFTER_DIGIT, _DIGIT_AFTER_LETTER, _LETTER_AFTER_DIGIT, _CAPITAL_AFTER_SMALL, _JOINT, _OTHER = (
    3.3,
    5.0,
    6.0,
    6.0,
    2.0,
    6.0,
)
_JOINTS = frozenset("_-./: ")
_HEXADECIMAL = re.compile(r"[0-9a-f]{20,}|[0-9A-F]{20,}")


def is_random(value):
    """Whether a value of eight characters and more looks drawn by lot: words stay below what letters by lot reach."""
    if len(value) < 8 or len(set(value)) < min(7, len(value) / 3 + 3):
        return False
    bare = value.replace("-", "")
    if _HEXADECIMAL.fullmatch(bare):
        return sum(c.isdigit() for c in bare) >= 4 and sum(c.isalpha() for c in bare) >= 3
    # Random letters of length 8 have a mean of 6.2 bits and seldom less than 4.5; the longer, the narrower.
    return surprise(value) >= 4.2 + 2.4 / len(value)


def surprise(value):
    """Returns the mean bits of surprise of the characters of a value at those before them; letters by lot have about six."""
    pairs = [_bits(a, b) for a, b in zip(value, value[1:], strict=False)]
    return sum(pairs) / max(1, len(pairs))


@functools.lru_cache(maxsize=8192)
def _bits(a, b):
    if "a" <= a.lower() <= "z" and "a" <= b.lower() <= "z" and a.isascii() and b.isascii():
        if a.islower() and b.isupper():
            return _CAPITAL_AFTER_SMALL
        return int(_PAIRS[ord(a.lower()) - 97][ord(b.lower()) - 97])
    if b.isdigit():
        return _DIGIT_AFTER_DIGIT if a.isdigit() else _DIGIT_AFTER_LETTER if a.isalpha() else _JOINT
    if a in _JOINTS or b in _JOINTS:
        return _JOINT
    return _LETTER_AFTER_DIGIT if a.isdigit() and b.isalpha() else _JOINT if not (a.isascii() and b.isascii()) else _OTHER
