"""Bytes to characters: what is no UTF-8 is repaired whole, line by line, or not at all; nothing goes without a count."""

import pytest

from llmos_jax.data.encodings import charset_of, decode
from llmos_jax.errors import DataError

GERMAN = "Größe, Äpfel und Übermut: «ça va», naïve. "
JAPANESE = "これは日本語の文章です。"
RUSSIAN = "Это русский текст, записанный иначе. "


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "latin-1"), (GERMAN, "cp1252"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"), ("这是中文的文章，很长的。", "gb18030"), ("한국어 문장입니다. ", "euc_kr"),
        ("這是中文的文章，很長的。", "big5"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-32"), (JAPANESE, "utf-32"),
    ],
)  # fmt: skip
def test_whole_texts_of_an_encoding(text, encoding):
    text = "\n".join([text] * 9)
    assert decode(text.encode(encoding), True, "f")[0] == text
    with pytest.raises(DataError, match="^f is not UTF-8"):
        decode(text.encode(encoding), False, "f")


@pytest.mark.parametrize(("text", "encoding"), [(GERMAN, "latin-1"), (RUSSIAN, "cp1251"), (JAPANESE * 3, "shift_jis")])
def test_lines_of_two_encodings_keep_every_character(text, encoding):
    """The middle of a UTF-8 file is of another encoding, as after files were joined."""
    parts = [f"{text}\n" * 5, f"{text}\n" * 3, f"{text}\n"]
    data = parts[0].encode() + parts[1].encode(encoding) + parts[2].encode()
    done, metadata = decode(data, True, "f")
    assert done == "".join(parts) and metadata["repaired_from"].startswith("utf-8 and ") and "lost_characters" not in metadata


def test_short_lines_of_another_encoding_that_are_valid_utf8_by_chance():
    lines = ["联通", "这是中文的文章，很长的，其他的文章也很长。", "通"] * 4  # the second character's bytes are one of UTF-8
    assert b"\xcd\xa8".decode("utf-8")
    data = "\n".join(lines).encode("gb18030")
    assert decode(data, True, "f")[0] == "\n".join(lines)


def test_lost_characters_are_counted_and_too_many_are_an_error():
    line = GERMAN.encode()
    text, metadata = decode(line * 9 + line[:3], True, "f")  # cut within its first umlaut
    assert text == GERMAN * 9 + "Gr\ufffd" and metadata == {"repaired_from": "utf-8", "lost_characters": 1}
    # Byte 0x81 is none of cp1252's.
    text, metadata = decode((GERMAN * 9).encode("cp1252") + b" \x81", True, "f")
    assert metadata == {"repaired_from": "cp1252", "lost_characters": 1} and text.endswith(" \ufffd")
    with pytest.raises(DataError, match=r"^f looks like .* characters are not of it"):
        decode(bytes(range(128, 256)) * 9, True, "f")


def test_labels_that_are_no_encoding_are_not_believed():
    page = f"<html><body><p>{GERMAN}</p></body></html>".encode("latin-1")
    for label in ("utf8mb4", "foo", "hex", "undefined", "rot13", "", None, "unicode_escape"):
        assert decode(page, True, "f", charset_of(page, label, "f"))[0] == page.decode("latin-1"), label
    assert charset_of(page, " 'ISO-8859-1';", "f") == "cp1252"
    assert charset_of(b"<p>plain</p>", "utf-16", "f") == "utf-8"
    japanese = JAPANESE.encode("shift_jis")
    assert decode(japanese, True, "f", charset_of(japanese, "x-sjis", "f"))[0] == JAPANESE
    false = f"<p>{GERMAN}</p>".encode()  # a server that says ASCII of UTF-8
    assert GERMAN in decode(false, True, "f", "ascii")[0]
