"""Normal form of text: Unicode composition, newlines, control characters, whitespace. The first step of a chain."""

import dataclasses
import re
import unicodedata

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.steps import Transform, register

# What can't be seen. Soft hyphens, word joiners and signs of formulas join what stands around them, as joiners of letters do,
# which stay. Of the others one may be all that keeps two fields apart: see `_apart`.
_JOINING = "\xad\u2060-\u2062\u2064"
_CONTROLS = "\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb"
_DIRECTIONS, _ZERO_WIDTH = "\u200e\u200f\u202a-\u202e\u2066-\u2069", "\u200b\u2063\ufeff"
_HIDDEN = _CONTROLS + _DIRECTIONS + _ZERO_WIDTH
# What is replaced by what, in this order: surrogates; spaces; all that str.splitlines takes for the end of a line; what joins.
_REPLACED = (
    (re.compile("[\ud800-\udfff]"), "\ufffd"),
    (re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]"), " "),
    (re.compile("\r\n|[\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"), "\n"),
    (re.compile(f"[{_JOINING}]"), ""),
    (re.compile(f"[{_HIDDEN}]"), ""),
)
# Each begins with what is rare, which is found fast; what stands before it is asked afterwards.
_APART = (
    # Controls part whatever is not blank.
    rf"[{_HIDDEN}](?<=[^\s{_HIDDEN}].)(?:(?<=[{_CONTROLS}])|[{_DIRECTIONS}{_ZERO_WIDTH}]*+[{_CONTROLS}])[{_HIDDEN}]*+(?=\S)",
    # A zero-width space may be a hint where to break an address, and parts words of scripts that write no spaces.
    rf"[{_DIRECTIONS}{_ZERO_WIDTH}](?<=[!-~].)(?<![@._/:=&?%#-].)(?:(?<=[{_ZERO_WIDTH}])|[{_DIRECTIONS}]*+[{_ZERO_WIDTH}])"
    rf"[{_DIRECTIONS}{_ZERO_WIDTH}]*+(?=[!-~])(?![@._/:=&?%#-])",
    rf"[{_DIRECTIONS}](?<=\w.)[{_DIRECTIONS}]*+(?=[\w+(])",
)
_APART = tuple(re.compile(pattern, re.DOTALL) for pattern in _APART)
# For each character the place of the pattern that takes it, or the number of patterns: none does.
_PATTERN_OF = np.full(0x110000, len(_REPLACED), np.uint8)
_EVERY = "".join(map(chr, range(0x10000)))
for _place, (_pattern, _) in enumerate(_REPLACED):
    _PATTERN_OF[[ord(found) for found in _pattern.findall(_EVERY)]] = _place
_HIDDEN_PLACE = len(_REPLACED) - 1
# The same for text that is all ASCII, as tables of bytes, ten times faster: every control becomes NUL.
_ASCII_NEWLINES = bytes.maketrans(b"\r\x0b\x0c\x1c\x1d\x1e", b"\n" * 6)
_ASCII_CONTROLS = bytes(np.flatnonzero(_PATTERN_OF[:128] == _HIDDEN_PLACE).tolist())
_ASCII_HIDDEN = _ASCII_NEWLINES.translate(bytes.maketrans(_ASCII_CONTROLS, bytes(len(_ASCII_CONTROLS))))
_ASCII_APART = re.compile(rb"\0(?<=[^\s\0].)\0*+(?=\S)", re.DOTALL)
_RUN_OF_SPACES = re.compile("(?<=[^ \t\n])[ \t]{2,}")


@register
@dataclasses.dataclass(frozen=True)
class Normalise(Transform):
    """Unicode normal form, `\\n` as the only newline, no control characters, plain spaces, few blank lines, no ragged ends."""

    step: str = setting("normalise", help="step", choices=("normalise",))
    form: str = setting("NFC", help="Unicode normal form; none leaves characters alone", choices=("NFC", "NFKC", "none"))
    drop_invisible: bool = setting(True, help="drop control, zero-width and direction characters")
    collapse_spaces: bool = setting(False, help="one space for runs of blanks within a line (bad for code and tables)")
    max_blank_lines: int = setting(2, help="blank lines in a row that are kept", at_least=0)

    version = 2

    @property
    def cuts(self):
        """Whether text goes that parts data: NFKC makes digits of superscripts, which then belong to the number before them."""
        return self.form == "NFKC"

    def transform(self, documents, findings=None):
        """Returns (texts, {"changed": bool [n]}, removed): nothing that could be shown is cut out."""
        texts = [self.normalised(text) for text in documents.texts]
        changed = np.array([new is not old for new, old in zip(texts, documents.texts, strict=True)], bool)
        return texts, {"changed": changed}, [None] * len(texts)

    def normalised(self, text):
        """Returns the normal form of one text, the same object where it is in that form already."""
        new = self._plain_ascii(text) if text.isascii() else self._plain_unicode(text)
        if " \n" in new or "\t\n" in new:
            new = "\n".join([line.rstrip(" \t") for line in new.split("\n")])
        if self.collapse_spaces:
            new = _RUN_OF_SPACES.sub(" ", new)
        blank = "\n" * (self.max_blank_lines + 2)
        if blank in new:
            new = re.sub(f"{blank}+", blank[1:], new)
        new = new.strip("\n").rstrip()
        return text if new == text else new

    def _plain_ascii(self, text):
        coded = text.encode().replace(b"\r\n", b"\n")
        if not self.drop_invisible:
            return coded.translate(_ASCII_NEWLINES).decode()
        coded = coded.translate(_ASCII_HIDDEN)
        if b"\0" in coded:
            coded = _ASCII_APART.sub(b"\t", coded).replace(b"\0", b"")
        return coded.decode()

    def _plain_unicode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        present = np.bincount(_PATTERN_OF[codes], minlength=len(_REPLACED))
        for count, (pattern, replacement) in zip(present, _REPLACED, strict=False):
            if count and (replacement or self.drop_invisible):
                text = pattern.sub(replacement, text if pattern is not _REPLACED[_HIDDEN_PLACE][0] else _apart(text))
        if self.form != "none" and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        return text


def _apart(text):
    """Returns a text with a tab for hidden characters that are all that parts two fields: without it they would be one, and
    the personal data in them would not be known as such. A blank could stand within a number."""
    for pattern in _APART:
        text = pattern.sub("\t", text)
    return text
