"""From bytes to characters: UTF-8 as it stands, other encodings by their looks, and each character that is lost counted."""

import codecs
import functools
import re

from llmos_jax.data.files import DAMAGE, missing_extra
from llmos_jax.errors import DataError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What pages mean by a name is often the larger set (WHATWG Encoding, 4.2).
_LARGER = {
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "utf-8": "utf-8-sig",
}
_MULTIBYTE = ("gb18030", "cp932", "cp949", "big5hkscs", "euc_jp", "iso2022_jp")
# Sets of Windows that hold letters where those of ISO, which are told apart from them badly, have control characters.
_WINDOWS = {"iso8859-2": "cp1250", "iso8859-7": "cp1253", "iso8859-9": "cp1254"}
# Bytes of a file's lines that its encoding is told by.
_SAMPLE = 1 << 16
# Characters that a line of UTF-8 must hold beside an encoding of several bytes: few of that are valid UTF-8 by chance. So many
# for each place that is not UTF-8, too, and the line is UTF-8 that took damage, whatever the lines around it are.
_SURE = 4
_LOST, _OTHER = "\ufffd", r"[^\0-\x7f]"  # _OTHER: a character beyond ASCII
# More characters lost than one in so many, and the guess is wrong.
_MOST_LOST = 100
# ASCII letters for each other one, at least, in the languages of Western Europe.
_FEW_ACCENTS = 3
# Characters on either side of one that may be a sign of a wrong encoding: signs are shorter.
_NEAR = 10


def has_mark(data):
    """Whether bytes begin with a mark of UTF-16 or UTF-32: their zeros are text then."""
    return any(data.startswith(mark) for mark, _ in _MARKS)


class LineDecoder:
    """From the lines of one file to characters: UTF-8, damaged or not, and all other lines in the one encoding they look like.

    One line is too short to tell that by. file: SourceFile, read a second time, up to a sample of them, when there is one.
    """

    def __init__(self, file, repair):
        self._file, self._repair, self._encoding = file, repair, None

    def decode(self, line, where):
        """Returns (text, metadata) of a line; `decode` says what they are and what is raised."""
        looks = "utf-8"
        if self._repair and _as_utf8(line) is None and not is_damaged_utf8(line):
            looks = self._encoding = self._encoding or _looks_like(_sample(self._file) or line, where)
        return decode(line, self._repair, where, looks=looks)


def _sample(file):
    """Returns the first lines of a file that are not UTF-8, joined; of very long ones only what they begin with counts."""
    lines, size, is_begin = [], 0, True
    try:
        with file.open() as stream:
            while size < _SAMPLE and (line := stream.readline(_SAMPLE)):
                cut = 3 if len(line) == _SAMPLE else 0  # bytes of a character that goes on
                if is_begin and _valid_length(line) < len(line) - cut and not is_damaged_utf8(line):
                    lines.append(line)
                    size += len(line)
                is_begin = line.endswith(b"\n")
    except DAMAGE:  # named when its place is read
        pass
    return b"".join(lines)


def decode(data, repair, where, charset="utf-8", looks=None):
    """Returns (text, metadata) of bytes: in `charset`, or else, if that may be repaired, as their statistics look.

    A file may hold lines of UTF-8 and lines of another encoding. looks: what the bytes look like, where that is known: those of
    a line, at whose start U+FEFF is a character. At the start of a file it is a mark, and left out.
    metadata: `repaired_from`, and `lost_characters` where some became U+FFFD. Raises DataError, beginning with `where`, when
    nothing may be repaired or too many are lost.
    """
    try:
        return data.decode("utf-8" if looks else _LARGER.get(charset, charset)), {}
    except UnicodeDecodeError as error:
        if not repair:
            raise DataError(f"{where} is not UTF-8 (byte {error.start}): convert it, or set repair of its source.") from None
    text, encoding, lost = _replaced(data, looks) if looks else _guess(data, where)
    text = text if looks else text.removeprefix("\ufeff")
    if lost * _MOST_LOST > len(text) and (lost > 1 or not is_damaged_utf8(data)):
        raise DataError(f"{where} looks like {encoding}, but {lost} of {len(text)} characters are not of it: convert it.")
    return text, {"repaired_from": encoding} | ({"lost_characters": lost} if lost else {})


def charset_of(page, label, where):
    """Returns the encoding of a page's bytes: by the label of its server, else by its own, else by its looks."""
    detect, known = _detectors(where)
    charset = (known(label.strip(" \"';"), False) if label else None) or detect(page, from_html_meta=True)
    if charset.startswith("utf-16"):  # a label that can be read in ASCII is not of it
        return charset if b"\0" in page[:1024] else "utf-8"
    # The label of the West is given to much UTF-8, and its texts are hardly ever UTF-8 by chance.
    return "utf-8" if charset == "cp1252" and _as_utf8(page) is not None else charset


def _guess(data, where):
    """Returns (text, encoding, number of lost characters) of bytes that are not UTF-8."""
    marked = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    if marked:
        return _replaced(data, marked)
    if not (complete := data[: _valid_length(data)]).isascii() and len(data) - len(complete) < 4:  # cut in a character
        return _replaced(data, "utf-8")
    lines = [(line, _as_utf8(line)) for line in data.split(b"\n")]
    is_damaged = [text is None and is_damaged_utf8(line) for line, text in lines]
    others = [line for (line, text), damaged in zip(lines, is_damaged, strict=True) if text is None and not damaged]
    if not others:
        return _replaced(data, "utf-8")
    encoding = _looks_like(b"\n".join(others), where)
    least = _SURE if encoding in _MULTIBYTE else 1
    is_sure = [
        damaged or (text is not None and len(re.findall(_OTHER, text)) >= least)
        for (_, text), damaged in zip(lines, is_damaged, strict=True)
    ]
    if not any(is_sure):
        return _replaced(data, _looks_like(data, where))
    parts = [_replaced(line, "utf-8" if sure else encoding) for (line, _), sure in zip(lines, is_sure, strict=True)]
    return "\n".join(text for text, _, _ in parts), f"utf-8 and {encoding}", sum(lost for _, _, lost in parts)


def _looks_like(data, where):
    """Returns the encoding that bytes look like; of short ones in which ASCII letters prevail, that of the West."""
    detect, known = _detectors(where)
    looks = detect(data, html5_compatible=False)
    if looks == "cp949":  # Korean, of which the web's names know another one
        return looks
    encoding = known(looks, False) if looks else None  # those of DOS are none of the web's, and mostly wrong
    if encoding is None:
        letters, accents = (len(re.findall(kind, data)) for kind in (rb"[a-zA-Z]", rb"[\x80-\xff]"))
        return "cp1252" if letters > _FEW_ACCENTS * accents else "utf-8"
    if encoding in _WINDOWS and re.search(rb"[\x80-\x9f]", data):
        return _WINDOWS[encoding]
    return _LARGER.get(encoding, encoding)


def _replaced(data, encoding):
    text = data.decode(encoding, "replace")
    own = data.count(_LOST.encode()) if encoding.startswith("utf-8") else 0
    return text, encoding.removesuffix("-sig"), text.count(_LOST) - own


def is_damaged_utf8(data):
    """Whether bytes that are not UTF-8 are so but for few places: hardly any text of another encoding is, by chance."""
    text, _, lost = _replaced(data, "utf-8")
    return len(re.findall(_OTHER, text)) - lost >= _SURE * max(lost, 1)


def _valid_length(data):
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def _as_utf8(line):
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _detectors(where):
    try:
        from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
    except ImportError:
        raise missing_extra("resiliparse", f"{where}, which is not UTF-8,") from None
    return detect_encoding, map_encoding_to_html5


def repair_mojibake(text, metadata):
    """Returns text whose UTF-8 was once read as another encoding with its characters put right, and what was done."""
    if not is_mojibake(text):
        return text, metadata
    from ftfy import fix_encoding

    fixed = fix_encoding(text)
    return fixed, metadata | ({"repaired_from": "mojibake"} if fixed != text else {})


def is_mojibake(text):
    """Whether ftfy's heuristic finds signs of a wrong encoding; it is asked about the places alone where any may be."""
    is_bad, marks = _mojibake()
    start = stop = None
    for mark in marks.finditer(text):
        place = mark.start()
        if start is not None and place > stop:
            if is_bad(text[start:stop]):
                return True
            start = None
        start = max(0, place - _NEAR) if start is None else start
        stop = place + _NEAR
    return start is not None and is_bad(text[start:stop])


@functools.cache
def _mojibake():
    """Returns (ftfy's function, a pattern of the characters of which every sign has one)."""
    try:
        from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
    except ImportError:
        raise missing_extra("ftfy", "repair of a source") from None
    rare = [characters for name, characters in MOJIBAKE_CATEGORIES.items() if "common" not in name]
    return is_bad, re.compile(f"[{''.join(rare)}\u0402]")
