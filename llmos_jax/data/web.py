"""Text of pages: HTML files, and web archives (WARC, and WET with text that was extracted before)."""

import io
import re
import zlib

from llmos_jax.data.encodings import charset_of, decode
from llmos_jax.data.fields import PassedOver, shown, too_long
from llmos_jax.data.files import DAMAGE, missing_extra
from llmos_jax.errors import DataError

_CHUNK = 1 << 18
_LONGEST_LINE = 1 << 16
# Beside its page a record holds the headers of HTTP.
_HEADERS = 1 << 18
# Types of records that hold no page of their own.
_OTHER_TYPES = ("warcinfo", "request", "metadata", "revisit", "continuation")
# To tell a page's content from its menus takes a step for each element and each one that it stands in. Pages that people
# read are at most 32 deep and may have any size; deeper ones as many steps as these.
_DEEP, _MOST_STEPS = 64, 4_000_000
_GZIP = 31  # zlib's window bits for what has the header of gzip
_BLANK = (b"", b"\r\n", b"\n")
# The first line of a record: alone, or behind what is left of one that was cut.
_VERSION = re.compile(rb"WARC/\d\.\d{1,2}[ \t]*\r?\n\Z")
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r\n")
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def html_text(data, source, where, label=None):
    """Returns (text, metadata) of the bytes of a page. label: the encoding that its server names.

    Of a page whose tags are nested too deep for its size, menus and all are read, and the metadata say `main_content` False.
    DataError names a page that is not of its encoding.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise missing_extra("resiliparse", where) from None

    page, metadata = decode(data, True, where, charset_of(data, label, where))
    tree = HTMLTree.parse(page)
    is_deep = _is_too_deep(page, tree.document)
    # Each line of a list is indented by its depth: of a deep one the text would have the square of the page's size.
    is_indented = is_deep and len(tree.document.query_selector_all("ul, ol")) > _DEEP
    is_whole = is_deep and source.main_content
    text = extract_plain_text(tree, main_content=source.main_content and not is_deep, preserve_formatting=not is_indented)
    return text, metadata | ({"main_content": False} if is_whole else {})


def _is_too_deep(page, document):
    """Whether finding the main content of a page would take more than linear time; this takes linear time."""
    tags = page.count("<") - page.count("</")
    if tags <= _DEEP:  # of few tags none can be deep
        return False
    # Those that are never closed make several elements of one tag.
    elements = max(page.count("<"), len(document.query_selector_all("*")))
    deepest = max(_DEEP, _MOST_STEPS // elements)
    return tags > deepest and document.query_selector(" > ".join("*" * (deepest + 1))) is not None


def read_warc(file, source, limit):
    """Yields the pages of a web archive: responses of status 200, resources, and the text of conversion records.

    Records that hold no page are passed over, by reason. An archive that is cut, or whose compression is damaged, is read up
    to there; otherwise one bad record costs only itself.
    """
    number = 0
    with file.open() as stream:
        for number, item in enumerate(_records(file, stream, limit), 1):
            if isinstance(item, DataError):
                yield item
                continue
            headers, block = item
            where = f"{file}, record {number}"
            if len(block) > (limit or len(block)) + _HEADERS:
                yield too_long(where, limit)
                continue
            page = _page(headers, block, source, where, limit)
            if not isinstance(page, tuple):
                yield page
                continue
            text, metadata = page
            known = {"url": headers.get("warc-target-uri"), "date": headers.get("warc-date")}
            if "warc-truncated" in headers:
                known["truncated"] = headers["warc-truncated"]
            yield f":{number}", text, {name: value for name, value in known.items() if value} | metadata
    if not number:
        raise DataError(f"{file} holds no record of a web archive.")


def _records(file, stream, limit):
    """Yields (headers with lower-case names, block) of each record, or a DataError in its place.

    Of a block that is longer than a page may be, only enough to see that is read.
    """
    number, line, most = 0, b"\n", None if limit is None else limit + _HEADERS + 1
    stream = _Lines(stream)
    while True:
        try:
            while line in (b"\r\n", b"\n"):
                line = stream.readline()
            if not line:
                return
            item, line = _record(f"{file}, record {number + 1}", stream, line, most)
        except DAMAGE as error:
            raise DataError(f"{file} is damaged after record {number}: {error}.") from None
        number += 1
        if number == 1 and isinstance(item, DataError) and not line:
            return
        yield item


class _Lines:
    """The bytes of an archive; lines can be given back, the last one first."""

    def __init__(self, stream):
        self._stream, self._given_back = stream, []

    def readline(self):
        return self._given_back.pop() if self._given_back else self._stream.readline(_LONGEST_LINE)

    def give_back(self, line):
        self._given_back.append(line)

    def read(self, count):
        """Returns bytes: asked behind the blank line of headers, where nothing is given back any more."""
        return self._stream.read(count)


def _record(where, stream, line, most):
    """Returns ((headers, block) of the record that begins with `line`, or a DataError, and the first line behind it).

    No more is read than the two blank lines at its end: in what follows, damage is that of the next record.
    """
    version = _VERSION.search(line)
    if not line.startswith(b"WARC/") or (version and version.start()):
        error = DataError(f"{where} does not begin where the one before ends: what stands between is left out.")
        return error, _next_record(stream, line)
    headers = _headers(stream)
    if headers is None:
        return DataError(f"{where} is cut in its headers: the next one begins there."), stream.readline()
    length = headers.get("content-length", "")
    if not length.isdecimal() or len(length) > 18:  # more bytes than any file has
        return DataError(f"{where} has Content-Length {shown(length)!r}."), _next_record(stream, stream.readline())
    length = int(length)
    block = _read(stream, length if most is None else min(length, most))
    rest = _skip(stream, length - len(block)) if len(block) == most else length - len(block)
    if rest:
        raise EOFError(f"it ends {rest} bytes before the next one does")
    line = stream.readline()
    if line not in _BLANK:
        error = DataError(f"{where} does not end where it says: it is left out, and what follows up to the next one.")
        return error, _next_record(stream, line)
    return (headers, block), stream.readline() if line else line


def _next_record(stream, line):
    """Returns the first line from `line` on that begins a record, b"" where none does."""
    while line:
        version = _VERSION.search(line)
        if version or line.startswith(b"WARC/1."):
            return version[0] if version else line
        line = stream.readline()
    return b""


def _headers(stream):
    """Returns the headers of a record, None where it is cut: the next one begins in them, and is given back.

    A version at the end of a line may be that of an address, unless fields go on with one that stood there before.
    """
    lines, names = [], set()
    while (line := stream.readline()) not in (b"\r\n", b"\n"):
        if not line:
            raise EOFError("it ends in the headers of a record")
        is_rest = bool(lines) and not lines[-1].endswith(b"\n")  # of a line that is too long to be read at once
        lines.append(line)
        if is_rest or line.startswith((b" ", b"\t")):
            continue
        name = line.partition(b":")[0]
        if name.lower() != b"warc-concurrent-to":  # the one that may stand there twice
            names.add(name)
        if line.startswith(b"WARC/"):
            stream.give_back(line)
            return None
        if version := _VERSION.search(line):
            following = stream.readline()
            stream.give_back(following)
            if b":" not in line[: version.start()] or following.partition(b":")[0] in names:
                stream.give_back(version[0])
                return None
    return _parse(b"".join(lines))


def _parse(lines):
    """Returns {lower-case name: value} of header lines; those that begin with a blank go on with the one before."""
    unfolded = re.sub(rb"\r?\n[ \t]+", b" ", lines).decode("utf-8", "replace")
    pairs = (line.partition(":") for line in unfolded.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _read(stream, count):
    """Returns the next bytes of a stream, fewer only at its end."""
    parts, rest = [], count
    while rest and (part := stream.read(min(rest, _CHUNK))):
        parts.append(part)
        rest -= len(part)
    return b"".join(parts)


def _skip(stream, count):
    """Reads past so many bytes; returns how many of them are missing."""
    while count and (part := stream.read(min(count, _CHUNK))):
        count -= len(part)
    return count


def _page(headers, block, source, where, limit):
    """Returns (text, metadata) of a record, or the DataError or PassedOver that it is."""
    kind, status = headers.get("warc-type", "").lower(), None
    if kind in _OTHER_TYPES or kind not in ("response", "resource", "conversion"):
        return PassedOver(f"web archive: record of type {shown(kind)}")
    content_type = headers.get("content-type", "")
    if kind == "response":
        if not block.startswith(b"HTTP/"):
            return PassedOver("web archive: response of another protocol than HTTP")
        head, body = (_BLANK_LINE.split(block, maxsplit=1) + [b""])[:2]
        first, _, lines = head.partition(b"\n")
        status = (first.split() + [b"", b""])[1].decode("latin-1")
        if status != "200":
            return PassedOver(f"web archive: status {status[:3]}")
        http = _parse(lines)
        content_type = http.get("content-type", "")
        try:
            block = _content(body, http, limit)
        except (*DAMAGE, ValueError) as error:
            return DataError(f"{where} is damaged in its content: {error}.")
    if limit is not None and len(block) > limit:
        return too_long(where, limit)
    name, _, parameters = content_type.lower().partition(";")
    name = name.strip() or _type_by_looks(block)
    label = re.search(r"charset\s*=\s*([^;,\s]+)", parameters)
    try:
        if name == "text/plain":
            text, metadata = decode(block, True, where, charset_of(block, label and label[1], where) if label else "utf-8")
        elif name.startswith(("text/", "application/xhtml")):
            text, metadata = html_text(block, source, where, label and label[1])
        else:
            return PassedOver(f"web archive: content of type {shown(name)}")
    except DataError as error:
        return error
    return (text, metadata) if text.strip() else PassedOver("web archive: page without text")


def _type_by_looks(data):
    """Returns the type of content that names none."""
    if _HTML.search(data[:1024]):
        return "text/html"
    return "unknown" if b"\0" in data[:1024] else "text/plain"


def _content(body, http, limit):
    """Returns what a server sent without its chunks and compression; much archived content has neither any more.

    Raises one of `DAMAGE` or ValueError when it is cut or damaged.
    """
    if "chunked" in http.get("transfer-encoding", "").lower() and _CHUNK_SIZE.match(body):
        body = _joined(body)
    encoding = http.get("content-encoding", "").lower()
    if encoding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return _inflate(body, _GZIP, limit)
    if encoding == "deflate" and not body.lstrip().startswith(b"<"):
        is_wrapped = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
        return _inflate(body, 15 if is_wrapped else -15, limit)
    if encoding == "br" and not body.lstrip().startswith(b"<"):
        try:
            from fastwarc.stream_io import BrotliReader
        except ImportError:
            raise missing_extra("resiliparse", "content in Brotli's compression") from None
        return _read(BrotliReader(io.BytesIO(body)), len(body) << 16 if limit is None else limit + 1)
    return body


def _joined(body):
    """Returns the bytes of chunks, each behind its size."""
    parts, place = [], 0
    while chunk := _CHUNK_SIZE.match(body, place):
        size, start = int(chunk[1], 16), chunk.end()
        if not size:
            return b"".join(parts)
        if start + size > len(body):
            break
        parts.append(body[start : start + size])
        place = start + size + 2
    raise ValueError("its chunks are cut")


def _inflate(data, window_bits, limit):
    """Returns the content of all members (gzip may have several), cut behind `limit` bytes."""
    content, members = b"", data
    while True:
        stream = zlib.decompressobj(window_bits)
        content += stream.decompress(members, 0 if limit is None else max(1, limit + 1 - len(content)))
        if limit is not None and len(content) > limit:
            return content
        if not stream.eof:
            raise EOFError("it is cut in its compression")
        members = stream.unused_data
        if window_bits != _GZIP or not members.startswith(b"\x1f\x8b"):
            return content
