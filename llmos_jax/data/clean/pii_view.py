"""A text as the detectors of personal data look at it: characters of one kind written in one way."""

import functools
import re

# Six digits and more with at most three separators between two of them: where numbers of all kinds are looked for.
_RUN = re.compile(r"[0-9](?:[ .\-/()_]{0,3}+[0-9]){5,}+")
# The first digit behind five capitals: some ids have no six digits in a row.
_BEHIND_CAPITALS = re.compile(r"[0-9](?<=[A-Z]{5}.)")

# Other spellings of characters that data are made of, one for one: spaces, hyphens and dashes, wide and Arabic digits.
_PLAIN = (
    dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x3000], " ")
    | dict.fromkeys([*range(0x2010, 0x2016), 0x2212, 0xFE63, 0xFF0D], "-")
    | {first + digit: str(digit) for first in (0xFF10, 0x660, 0x6F0, 0x966) for digit in range(10)}
    | {0xFF20: "@", 0xFE6B: "@", 0xFF0E: ".", 0xFF0B: "+", 0xFF0F: "/", 0xFF08: "(", 0xFF09: ")", 0xFF1A: ":"}
)
_NOT_PLAIN = re.compile(f"[{''.join(map(chr, sorted(_PLAIN)))}]")


class View:
    """A text with what several detectors ask for: in lower case, and the (start, end) of runs of six digits and more.

    Unusual spaces, dashes and digits are the plain ones here; every character stays where it is.
    """

    def __init__(self, text):
        # By places: `translate` asks for every character of a text, and few have any to change.
        self.text = text if text.isascii() else _NOT_PLAIN.sub(lambda match: _PLAIN[ord(match[0])], text)
        self.lowered = self.text.lower()
        if len(self.lowered) != len(text):  # a few letters become two
            self.lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in self.text)
        self.runs = [match.span() for match in _RUN.finditer(self.text)]

    @functools.cached_property
    def capitals(self):
        """Where digits stand behind five capitals."""
        return [match.start() for match in _BEHIND_CAPITALS.finditer(self.text)]


def compact(value):
    """Returns a number of digits and letters without separators, in capitals."""
    return re.sub(r"[\W_]", "", plain(value)).upper()


def plain(value):
    """Returns a value with plain spaces, dashes and digits."""
    return value.translate(_PLAIN)


def bounded(pattern):
    """Returns a compiled pattern that matches whole ASCII words only: in Chinese, numbers touch the text."""
    return re.compile(rf"(?<![\w+])(?<!\w-)(?<!\d\.)(?:{pattern})(?!\w|[-.]\w)", re.ASCII)
