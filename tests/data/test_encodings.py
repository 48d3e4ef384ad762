"""Bytes to characters: what is no UTF-8 is repaired whole, line by line, or not at all; nothing goes without a count."""

import json
import random

import pytest

from llmos_jax.data.encodings import charset_of, decode, is_damaged_utf8
from llmos_jax.errors import DataError
from tests.data.test_readers import read

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


def in_json(text, encoding="utf-8", cut=0):
    data = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
    return data if not cut else data[: -2 - cut] + b'"}'


@pytest.mark.parametrize(
    ("around", "encoding"), [(RUSSIAN, "cp1251"), (GERMAN, "cp1252"), (JAPANESE, "cp932"), (JAPANESE, "gb18030")]
)
@pytest.mark.parametrize(
    "text", ["Καλημέρα κόσμε, ένα κείμενο για τον καιρό", GERMAN + "ü", RUSSIAN + "я", JAPANESE, "今天天气很好，去公园"]
)
def test_a_damaged_line_of_utf8_is_neither_read_as_the_others_nor_are_they_as_it(text, around, encoding, tmp_path):
    lines = [in_json(f"{around} {number}", encoding) for number in range(5)]
    for place in (0, 3, 5):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:place], in_json(text, cut=1), *lines[place:]]))
        documents, bad = read(tmp_path / "a.jsonl", repair=True)
        texts = [f"{around} {number}" for number in range(5)]
        assert not bad and [text for _, text, _ in documents] == [*texts[:place], text[:-1] + "\ufffd", *texts[place:]]
        assert documents[place][2] == {"repaired_from": "utf-8", "lost_characters": 1}
    whole = b"\n".join([around.encode(encoding) * 3] * 9 + [text.encode()[:-1]] * 2)
    got, metadata = decode(whole, True, "f")
    assert got.endswith(f"\n{text[:-1]}\ufffd" * 2) and got.startswith(around * 3) and metadata["lost_characters"] == 2


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "cp949", "euc_jp", "cp932", "cp874", "cp1251", "koi8-r", "cp1256"])
def test_lines_of_no_other_encoding_are_taken_for_damaged_utf8(encoding):
    """Characters by chance: worse than any language, whose common ones lie where they are not UTF-8."""
    numbers = random.Random(0)
    letters = [character for character in map(chr, range(0xA1, 0xD7A4)) if is_letter_of(character, encoding)]
    lines = ["".join(numbers.choices(letters, k=numbers.randrange(4, 40))).encode(encoding) for _ in range(5000)]
    assert not [line for line in lines if is_damaged_utf8(line)]


def is_letter_of(character, encoding):
    try:
        return character.isalpha() and bool(character.encode(encoding))
    except UnicodeEncodeError:
        return False
