"""Personal data: recall and precision on generated data, replacement, masks, hostile texts."""

import collections
import sys

import numpy as np
import pytest

from llmos_jax.config import parse
from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.pii import CLASSES, Pii, Scanner, masked, scanner
from llmos_jax.errors import ConfigError
from tests.data.clean import pii_corpus

LEAST_RECALL, LEAST_PRECISION = 0.98, 0.95
_KEY, _LINES = "-----BEGIN RSA PRIVATE KEY-----", "\nProc-Type: 4,ENCRYPTED\n\n" + "\n".join(["MIIEpAIBq8Zt" * 5] * 4)
_TWO_NUMBERS = [("030 901820", "030 901821"), ("020 7946 0958", "020 7946 0959"), ("06 12 34 56 78", "06 12 34 56 79")]


def find(text, **settings):
    return [(text[f.start : f.end], f.name) for f in scanner(Pii(**settings)).find(text)]


def clean(text, **settings):
    (cleaned,), counts, _ = Pii(**settings).transform(Documents.of([text]))
    return cleaned


@pytest.mark.parametrize("seed", [11, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(901, 907))])
def test_recall_and_precision_by_class(seed):
    """Prints the table (`-s`); the slow ones are seeds that nothing was mended by."""
    items, others = pii_corpus.personal(seed=seed, count=320), pii_corpus.lookalikes(seed=seed + 1, count=60)
    assert len(items) >= 2000 and len(others) >= 2000
    scan, found, wrong, missed = scanner(Pii()), collections.Counter(), collections.Counter(), collections.defaultdict(list)
    for name, datum, text in items:
        start, stop = text.index(datum), text.index(datum) + len(datum)
        findings = scan.find(text)
        is_found = any(f.name == name and f.start <= start and stop <= f.end for f in findings)
        found[name] += is_found
        wrong.update(f.name for f in findings if f.name != name or f.end <= start or stop <= f.start)
        if not is_found:
            missed[name].append(text)
    wrong.update(f.name for _, text in others for f in scan.find(text))
    recalls = {name: found[name] / 320 for name in pii_corpus.MAKERS}
    precisions = {name: found[name] / (found[name] + wrong[name]) for name in pii_corpus.MAKERS}
    print(seed, {name: (round(recalls[name], 3), round(precisions[name], 3)) for name in recalls})
    for name in pii_corpus.MAKERS:
        assert recalls[name] >= LEAST_RECALL, (name, missed[name][:10])
        assert precisions[name] >= LEAST_PRECISION, name


@pytest.mark.parametrize("name", list(pii_corpus._NATIONAL))
def test_every_national_id(name):
    """A few percent of a provider's numbers may be none: a birthday in the future, a name without letters."""
    make, words = pii_corpus._NATIONAL[name]
    rng = pii_corpus.random.Random(name)
    pii_corpus.Faker.seed(5)
    numbers = [make(rng) for _ in range(20)]
    found = [n for n in numbers for w in words[:1] if (n, "national_id") in find(f"He wrote: {w}{n}, and left.")]
    assert len(found) >= 18, sorted(set(numbers) - set(found))
    # One digit changed: what has a check digit is no longer one (nine of ten times and more); a form alone can't tell.
    if name not in ("us_ssn", "us_ssn_bare", "us_ssn_dashes", "us_itin", "gb_nino"):
        last = [place for place, c in enumerate(numbers[0]) if c.isdigit()][-1]
        changed = [n[:last] + str((int(n[last]) + 1) % 10) + n[last + 1 :] for n in numbers if n[last : last + 1].isdigit()]
        still = [n for n in changed for w in words[:1] if (n, "national_id") in find(f"He wrote: {w}{n}, and left.")]
        assert len(still) <= 4, still


@pytest.mark.parametrize(
    ("text", "datum", "name"),
    [
        ("We live at 12 Old Mill Road, since May", "12 Old Mill Road", "address"),
        ("wohnt in der Lindenstraße 12a, Berlin", "Lindenstraße 12a", "address"),
        ("habite 5 bis, rue de la Paix à Paris", "5 bis, rue de la Paix", "address"),
        ("vive en Calle de Alcalá, 45 desde", "Calle de Alcalá, 45", "address"),
        ("postgres://admin:s3cr3tPass@db.internal/x", "s3cr3tPass@db.internal", "secret"),
        ("Authorization: Bearer 9f8a7B6c5D4e3F2a1b0C9d8E", "9f8a7B6c5D4e3F2a1b0C9d8E", "secret"),
        ("bei max.müller@bücher-straße.de fragen", "max.müller@bücher-straße.de", "email"),
        ('"john smith"@example.org', "@example.org", None),
        ("mail bob at site dot org", "bob at site dot org", "email"),
        ("look at the red dot on the map", "the red dot on", None),
        ("ring 8 (495) 123-45-67", "8 (495) 123-45-67", "phone"),
        ("tel 13800138000", "13800138000", "phone"),
        ("Tel.: 030 / 90 18 20", "030 / 90 18 20", "phone"),
        ("+44 20 7946 0958 - 24 hours", "+44 20 7946 0958", "phone"),
        ("+33 1 42 68 53 00 - 75008 Paris", "+33 1 42 68 53 00", "phone"),
        ("+33 1 42 68 53 00 75008 Paris", "+33 1 42 68 53 00", "phone"),
        ("+33-1-42-68-53-00-75-00-8-1-2", "+33-1-42-68-53-00", "phone"),
        ("+49 171 1234567 (24h)", "+49 171 1234567", "phone"),
        ("+33 1 42 68 53 00 9h-18h", "+33 1 42 68 53 00", "phone"),
        ("+91 98765 43210 24x7", "+91 98765 43210", "phone"),
        ("+44 20 7946 0958 / 2020", "+44 20 7946 0958", "phone"),
        ("+41 44 668 18 00 8002 Zürich", "+41 44 668 18 00", "phone"),
        ("Fax: +44 20 7946 0958 020 7946 0959", "+44 20 7946 0958", "phone"),
        ("Tél. 01 42 68 53 00 - 75008 Paris", "01 42 68 53 00", "phone"),
        ("tél. : 142685300 75008 Paris", "142685300", "phone"),
        ("Phone 020 7946 0958 (9 am - 5 pm)", "020 7946 0958", "phone"),
        ("in London 020 7946 0958 - 24 hours", "020 7946 0958", "phone"),
        ("at 01.42.68.53.00 24 hours", "01.42.68.53.00", "phone"),
        ("at 650.253.0000 94043 Mountain View", "650.253.0000", "phone"),
        ("1) 01512 3457103 and", "01512 3457103", "phone"),
        ("(1) 01512 3457103 and", "01512 3457103", "phone"),
        ("12\n01512 3457103\n12", "01512 3457103", "phone"),
        ("3 - 01512 3457103 and", "01512 3457103", "phone"),
        ("|12|01512 3457103|7|", "01512 3457103", "phone"),
        ("(11) 91234-5678 is a number", "1234-5678", None),
        ("rows 12 01512 3457103 14 15 16", "01512 3457103", None),
        ("0158-24-7-1-2-3-4-5-6", "0158-24-7", None),
        (
            "(\u0664\u0661\u0665) \u0665\u0665\u0665-\u0662\u0666\u0667\u0661",
            "(\u0664\u0661\u0665) \u0665\u0665\u0665-\u0662\u0666\u0667\u0661",
            "phone",
        ),
        ("sha 4111111111111111aaaa", "4111111111111111", None),
        ("8.8.4.4:53", "8.8.4.4", "ip"),
        ("https://user:p@ssw0rd@host/x", "p@ssw0rd", "secret"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZDEyMw==", "dXNlcjpwYXNzd29yZDEyMw==", "secret"),
        ("mysql -uroot -pS3cr3tP4ss", "S3cr3tP4ss", "secret"),
        ("password: hunter2", "hunter2", "secret"),
        ('password = "correcthorsebattery"', "correcthorsebattery", "secret"),
        ("log in (password Rachel1994) and", "Rachel1994", "secret"),
        ("(password SHA256)", "SHA256", None),
        ("phone: 4155552671,4155552672", "4155552672", "phone"),
        ("phone: 415-555-2671/415-555-2672", "415-555-2672", "phone"),
        ("415-555-2671,415-555-2672", "415-555-2671", "phone"),
        ("415-555-2671,415-555-2672", "415-555-2672", "phone"),
        ("Phone,+1 415 555 2671,Fax,+1 415 555 2672,x", "+1 415 555 2672", "phone"),
        ("call 4155552671 or 4155552672 now", "4155552672", "phone"),
        ("order 4155552671,4155552672", "4155552672", None),
        ("81.2.69.142-81.2.69.150", "81.2.69.150", "ip"),
        ("81.2.69.142-81.2.69.150", "81.2.69.142", "ip"),
        ("lib-81.2.69.142", "81.2.69.142", None),
        ("the server 9.9.9.9 answered", "9.9.9.9", "ip"),
        ("64 bytes from 2a00:1450:4001:81b::200e: icmp_seq=1", "2a00:1450:4001:81b::200e", "ip"),
        ("client 2a00:1450:4001:81b:0:0:0:200e: refused", "2a00:1450:4001:81b:0:0:0:200e", "ip"),
        ("2a00:1450:4001:81b::200e:message", "2a00:1450:4001:81b::200e", "ip"),
        ("hop 2a00:1450:4001:81b:: of", "2a00:1450:4001:81b::", "ip"),
        ("hop 2a00:1450:4001:81b::: of", "2a00:1450:4001:81b::", "ip"),
        ("IP6 2a00:1450:4001:81b::200e.443: Flags", "2a00:1450:4001:81b::200e", "ip"),
        ("IP6 2a00:1450:4001:81b::200e.443 > 2a00:1450:4001:81b::1.5353: UDP", "2a00:1450:4001:81b::1", "ip"),
        ("at 2a00:1450:4001:81b::200e.443.", "2a00:1450:4001:81b::200e", "ip"),
        ("IP 81.2.69.142.52344 > 142.250.1.1.443: Flags", "81.2.69.142", "ip"),
        ("IP 81.2.69.142.52344 > 142.250.1.1.443: Flags", "142.250.1.1", "ip"),
        ("IP 81.2.69.142.52344 > 8.8.8.8.domain: 1+ A?", "81.2.69.142", "ip"),
        ("IP 8.8.8.8.53 > 9.9.9.9.53: 1+ A?", "9.9.9.9", "ip"),
        ("length 60)\n    81.2.69.142.52344 > 8.8.8.8.53: 1+", "8.8.8.8", "ip"),
        ("1.2.3.4.5 > 1.2.3.4.4: the newer", "1.2.3.4", None),
        ("81.2.69.142.5 > 3", "81.2.69.142", None),
        ("a > 81.2.69.142.5: b", "81.2.69.142", None),
        ("OID 1.3.6.1.4: b, 81.2.69.142.1: c", "81.2.69.142", None),
        ("2001:1:2:3:4 and 2001:10:11: noon", "2001:10:11", None),
        ("in ver. 81.2.69.142", "81.2.69.142", None),
        ("see https://a12.com/u5@x.com", "u5@x.com", "email"),
        ("john [at] company[.]com", "john [at] company[.]com", None),
        ("lives at 123 5th Avenue in", "123 5th Avenue", "address"),
        ("45 West 34th Street", "45 West 34th Street", "address"),
        ("AT 123 MAIN STREET SINCE", "123 MAIN STREET", "address"),
        (
            "sk-svcacct-abcDEF123456ghiJKL789012mnoPQR345678stuVWX",
            "sk-svcacct-abcDEF123456ghiJKL789012mnoPQR345678stuVWX",
            "secret",
        ),
        ("use sk-or-v1-" + "0123456789abcdef" * 4, "sk-or-v1-" + "0123456789abcdef" * 4, "secret"),
        ("app.config[SECRET]='Tr0ub4dor&3'", "Tr0ub4dor&3", "secret"),
        ("[SECRET]: Tr0ub4dor&3", "Tr0ub4dor&3", "secret"),
        ("[phone]: 4155552671", "4155552671", "phone"),
        ("pass: Tr0ub4dor&3", "Tr0ub4dor&3", "secret"),
        ("userpass: hunter22x", "hunter22x", "secret"),
        ("user=x pass=Hunter22", "Hunter22", "secret"),
        ('{"user":"bob","pass":"hunter22"}', "hunter22", "secret"),
        ("root pass: hunter22", "hunter22", "secret"),
        ("The password is\n\nTr0ub4dor&3x", "Tr0ub4dor&3x", "secret"),
        ("The password is\n  Tr0ub4dor&3x", "Tr0ub4dor&3x", "secret"),
        ("The password is:\nTr0ub4dor&3x", "Tr0ub4dor&3x", "secret"),
        ("Password:\nTr0ub4dor&3x\nnext", "Tr0ub4dor&3x", "secret"),
        ("Password:\n  Foo2Bar: text", "Foo2Bar", None),
        ("passcode: Tr0ub4dor&3x", "Tr0ub4dor&3x", "secret"),
        ("jane/roe@company.com", "jane/roe@company.com", "email"),
        ("libby@company.md", "libby@company.md", "email"),
        ("jane_roe@company.so", "jane_roe@company.so", "email"),
        *(
            (f"Tel. {a}{between}{b}", number, "phone")
            for a, b in _TWO_NUMBERS
            for between in (" / ", "/", " - ")
            for number in (a, b)
        ),
        ("PASS: Tr0ub4dor2", "Tr0ub4dor2", None),
        ("contraseña: Verano2024!", "Verano2024!", "secret"),
        ("пароль: Leto2024!", "Leto2024!", "secret"),
        ("lösenord: Sommar2024!", "Sommar2024!", "secret"),
        ("hasło: Lato2024!", "Lato2024!", "secret"),
        ("wachtwoord: Zomer2024!", "Zomer2024!", "secret"),
        (f"cut off: {_KEY}{_LINES}\nnext", f"{_KEY}{_LINES}", "secret"),
        (f"as '{_KEY}\\n{_LINES[-60:]}' in JSON", f"{_KEY}\\n{_LINES[-60:]}", "secret"),
        (f"{_KEY}\\nMIIEpA\\n{_KEY.replace('BEGIN', 'END')}", f"{_KEY}\\nMIIEpA\\n{_KEY.replace('BEGIN', 'END')}", "secret"),
        (f'a = "{_KEY}"\nb = b"{_KEY.replace("BEGIN", "END")}"', f'{_KEY}"\nb = b"{_KEY.replace("BEGIN", "END")}', None),
        (f'files with "{_KEY}", must be converted first, as all of us know by now', _KEY, None),
    ],
)
def test_single_forms(text, datum, name):
    assert ((datum, name) in find(text)) == (name is not None)


def test_a_text_without_personal_data_is_the_same_object():
    documents = Documents.of(["Nothing personal.", "Mail bob@site.org twice: bob@site.org"])
    texts, counts, removed = Pii().transform(documents)
    assert texts[0] is documents.texts[0]
    assert texts[1] == "Mail [EMAIL] twice: [EMAIL]"
    assert counts["pii_email"].tolist() == [0, 2] and counts["pii_email"].dtype == np.int32
    assert removed[0] is None and removed[1].splitlines() == ["email: b**@****.***"] * 2


@pytest.mark.parametrize("replacement", ["label", "pseudonym"])
def test_what_was_replaced_is_not_found_again(replacement, tmp_path):
    (tmp_path / "key").write_bytes(b"k" * 32)
    step = Pii(replacement=replacement, secret_file=str(tmp_path / "key"))
    texts = [text for _, _, text in pii_corpus.personal(seed=4, count=60)]
    texts += [f"postgres://app:{password}@db.corp.net:5432/main" for password in ("0fb4ll1", "4lm05+fr33!", "jneisktrdystt")]
    texts += ["+44 20 7946 0958: 4155552671", "+44 20 7946 0958 75008 1234567"]
    once = step.protect(texts)
    for text, first, second in zip(texts, once, step.protect(once), strict=True):
        assert first == second, text


def test_overlapping_data_go_as_one():
    cleaned = clean("https://bob:Tr0ub4dor9@77.12.9.200/x and 4111-1111-1111-1111@mail.org")
    assert cleaned == "https://bob:[SECRET]@[IP]/x and [CREDIT_CARD]"


def test_pseudonyms_are_the_same_for_all_spellings_and_need_the_key(tmp_path):
    keys = [tmp_path / "one", tmp_path / "two"]
    for number, key in enumerate(keys):
        key.write_bytes(bytes([65 + number]) * 32)
    one, two = ({"replacement": "pseudonym", "secret_file": str(key)} for key in keys)
    assert clean("Bob@Site.org", **one) == clean("bob@site.org", **one) != clean("eve@site.org", **one)
    assert clean("4111 1111 1111 1111", **one) == clean("4111111111111111", **one)
    assert clean("bob@site.org", **one) != clean("bob@site.org", **two)
    assert clean("bob@site.org", **one).startswith("[EMAIL-") and not find(clean("bob@site.org", **one))
    assert Pii(**one).fingerprint != Pii(**two).fingerprint


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("DE89 3704 0044 0532 0130 00", "de89370400440532013000"),
        ("+1 (415) 555-2671", "(415) 555-2671"),
        ("0041 44 668 18 00", "+41446681800"),
        ("AB123456C", "AB 12 34 56 C"),
        ("2001:4860:4860::8888", "2001:4860:4860:0:0:0:0:8888"),
        ("John.Doe [at] site [dot] org", "john.doe@site.org"),
        ("4111\u00a01111\u00a01111\u00a01111", "4111-1111-1111-1111"),
    ],
)
def test_spellings_of_a_datum_have_one_pseudonym_and_one_place_in_the_allow_list(one, other, tmp_path):
    key, listed = tmp_path / "key", tmp_path / "allowed.txt"
    key.write_bytes(b"k" * 32)
    listed.write_text(one)
    names = [clean(f"see: {text}.", replacement="pseudonym", secret_file=str(key)) for text in (one, other)]
    assert names[0] == names[1] and "-" in names[0] and not find(names[0])
    assert find(f"see: {other}.") and not find(f"see: {other}.", allow_file=str(listed))


def test_allow_lists(tmp_path):
    listed = tmp_path / "allowed.txt"
    listed.write_text("Press@Site.org\n\n+1 212 555 0123\n")
    text = "press@site.org, bob@corp.example, eve@site.org, +1 (212) 555-0123"
    assert find(text, allow=(r".*@corp\.example",), allow_file=str(listed)) == [("eve@site.org", "email")]


def test_masks_show_a_form_only():
    assert masked("john.doe@mail.org") == "j***.***@****.***"
    assert masked("4111 1111") == "4*** ****"
    assert masked("p!@#$%^&", "secret") == "********" and masked("p!#$%^&") == "p******"
    for name, datum, _ in pii_corpus.personal(seed=6, count=40):
        shown = masked(datum, name)
        assert len(shown) <= 40 and sum(c.isalnum() for c in shown) <= (name != "secret"), (name, shown)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replacement": "pseudonym"}, ["secret_file"]),
        ({"allow": ["("]}, ["pii.allow", "regular expression"]),
        ({"classes": ["emial"]}, ["'emial'", "did you mean 'email'"]),
        ({"phone_regions": ["UK"]}, ["'UK'", "ISO 3166"]),
        ({"allow_file": "/nowhere"}, ["pii.allow_file=/nowhere", "No such file"]),
        ({"replacement": "pseudonym", "secret_file": "SHORT"}, ["5 bytes", "16"]),
    ],
)
def test_bad_settings(settings, words, tmp_path):
    short = tmp_path / "SHORT"
    short.write_bytes(b"short")
    if settings.get("secret_file"):
        settings = settings | {"secret_file": str(short)}
    with pytest.raises(ConfigError) as error:
        Scanner(parse(Pii, settings))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("name", "module"), [("phone", "phonenumbers"), ("national_id", "stdnum"), ("iban", "stdnum"),
                                              ("person", "presidio_analyzer")])  # fmt: skip
def test_a_missing_library_is_named(name, module, monkeypatch):
    for known in [m for m in sys.modules if m.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, known, None)
    with pytest.raises(ConfigError, match="pip install"):
        Scanner(Pii(classes=(name,)))


def test_classes_are_looked_for_one_by_one():
    text = "bob@site.org 77.12.9.200 4111 1111 1111 1111"
    assert find(text, classes=("ip",)) == [("77.12.9.200", "ip")]
    assert set(pii_corpus.MAKERS) | {"address", "person"} == set(CLASSES)


_SIZE = 50_000
HOSTILE = (
    "a", "@", "a@", "a@a.", "a(@", "1.", "1.2.3.", ":", "2001:", " 2001::::::::", "1", "1 ", "12345678 ", "+1 (212) ", "(1",
    "0 ", "01234 ", "tel 0 tel 1 ", "AB12 ", "GB12 ABCD 1234 ", "A", "ABCDE1234 ", "-----BEGIN RSA PRIVATE KEY-----\n",
    "eyJ-", "-eyJaaaaaaaaa.", "api_key='", "token:", "secret   ", "://a:", "[at]", "a [at] b ", "1 A ", "12 Aaaa Bbbb ",
    "Straße 1 ", "A-a ", "Via ", "Via de la ", "1 rue ", " ", "\n", "bsn 123456 ", "İ", "bearer ", "4111 1111 1111 ",
    "2024-01-15 ", '"@', "\ud800", "1---", "a@xn--", "@a.b.", "token=key=", "tokenkey", "password=passwords",
    "a dot ", "a at b dot ",
    "415-555-", "(415) 555-", "1,4155", "4155552671,", "tel 4155552671,", "a@b[.]", "a@b [dot] ", "a@a.md",
    "81.2.69.142-", "pass:", "pass: a", "db_pass=", "password of a ", "password of a is\n", "12 5th ", "4111/1111/",
    "DE12.1234.", "Tel 0123456/", "Tel. 06 12 34 56 78 - ", "+44 20 7946 0958 / ", "1) 0",
    "81.2.69.142.5 > ", "2a00::1.", "2a00::1: ", "+1 2 3 4 5 6 7 8 9 ",
    "phone 1 2 3 4 5 6 7 8 9 ", "0123 (", "Password:\n", "password is\n\n", "a/b@c.de ", "PASS=",
    "user=pass=", "authorization:", "mysql -p", "curl -u a", "{{ a", "A-A-Straße 1 ",
)  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_linear_time(piece):
    """A pattern that backtracks over 50,000 characters would run for hours: the limit is not a measurement."""
    text = piece * (_SIZE // len(piece))
    found = scanner(Pii()).find(text)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["token=key=", "secrets", "password", "token=", "api_key='passwordsecrets", "key=passwords,"])
@pytest.mark.parametrize("end", ["x", "'x"])
def test_words_that_say_no_secret_are_told_in_linear_time(piece, end):
    """Joined words can be split in many ways: who tries all of them is not back before the limit."""
    text = "password=" + piece * (20_000 // len(piece)) + end
    assert all(f.name == "secret" for f in scanner(Pii()).find(text))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("word", ["password", "SECRET"])
def test_a_word_of_nothing_but_names_takes_linear_time(word):
    """What follows each name is looked at no further than names go on: who reads to the end of the word takes minutes."""
    assert not find(word * (700_000 // len(word)))


@pytest.mark.parametrize("value", ["mysecretpassword", "TOKENKEYS", "bcryptpasswordhere", "passwords_secrets"])
def test_joined_words_are_no_secret_and_with_something_else_they_are(value):
    assert not find(f'password = "{value}"')
    assert find(f'password = "{value}Zq7"') == [(f"{value}Zq7", "secret")]


@pytest.mark.parametrize("name", ["", "phone", "note"])
def test_the_name_of_a_field_counts_and_stays_out_of_the_text(name):
    texts = Pii().protect(["4155552671", "bob@site.org", "nothing", ""], [name, "eve@site.org", name, name])
    assert texts == ["[PHONE]" if name == "phone" else "4155552671", "[EMAIL]", "nothing", ""]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("password", "Tr0ub4dor & 3 horses", "[SECRET]"),
        ("db_Password", "correct horse battery staple 9", "[SECRET]"),
        ("auth_pass", "Sommer2024!", "[SECRET]"),
        ("password", "12345678", "[SECRET]"),
        ("password", "<your password>", "<your password>"),
        ("password", "true", "true"),
        ("password_hint", "the name of a horse", "the name of a horse"),
        ("pass", "yes, all", "yes, all"),
        ("server", "81.2.69.142", "[IP]"),
        ("phones", "415-555-2671,415-555-2672", "[PHONE],[PHONE]"),
        ("cellphone", "4155552671", "[PHONE]"),
        ("mobil", "01711234567", "[PHONE]"),
        ("Telefonnummer", "0171-1234567", "[PHONE]"),
    ],
)
def test_fields_of_metadata(name, value, expected):
    assert Pii().protect([value], [name]) == [expected]


def test_a_field_that_is_a_password_follows_the_settings():
    assert Pii(classes=("email",)).protect(["Tr0ub4dor & 3 horses"], ["password"]) == ["Tr0ub4dor & 3 horses"]
    assert Pii(allow=("Tr0ub4dor.*",)).protect(["Tr0ub4dor & 3 horses"], ["password"]) == ["Tr0ub4dor & 3 horses"]
