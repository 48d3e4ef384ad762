"""Normal form of text: Unicode composition, newlines, control characters, whitespace. The first step of a chain."""

import dataclasses
import re
import unicodedata

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.steps import Transform, register

_INVISIBLE = (
    "\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb"
)
# What is replaced by what, in this order: surrogates; spaces; all that str.splitlines takes for the end of a line; and what
# can't be seen (controls, zero-width space, byte order mark, soft hyphen, directions; joiners are letters' own).
_REPLACED = (
    (re.compile("[\ud800-\udfff]"), "\ufffd"),
    (re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]"), " "),
    (re.compile("\r\n|[\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"), "\n"),
    (re.compile(f"[{_INVISIBLE}]"), ""),
)
# For each character the place of the pattern that takes it, or the number of patterns: none does.
_PATTERN_OF = np.full(0x110000, len(_REPLACED), np.uint8)
_EVERY = "".join(map(chr, range(0x10000)))
for _place, (_pattern, _) in enumerate(_REPLACED):
    _PATTERN_OF[[ord(found) for found in _pattern.findall(_EVERY)]] = _place
# The last two patterns for text that is all ASCII, as tables of bytes: ten times faster.
_ASCII_NEWLINES = bytes.maketrans(b"\r\x0b\x0c\x1c\x1d\x1e", b"\n" * 6)
_ASCII_INVISIBLE = bytes(np.flatnonzero(_PATTERN_OF[:128] == 3).tolist())
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

    cuts = False

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
        return coded.translate(_ASCII_NEWLINES, _ASCII_INVISIBLE if self.drop_invisible else b"").decode()

    def _plain_unicode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        present = np.bincount(_PATTERN_OF[codes], minlength=len(_REPLACED))
        for count, (pattern, replacement) in zip(present, _REPLACED, strict=False):
            if count and (replacement or self.drop_invisible):
                text = pattern.sub(replacement, text)
        if self.form != "none" and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        return text
