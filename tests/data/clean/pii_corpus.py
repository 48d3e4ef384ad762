"""Personal data in sentences, and what only looks like it: made without the detector's patterns.

Numbers come from Faker's national providers, from phonenumbers' own formatting, and from check digits computed here.
"""

import random
import string
import uuid

import phonenumbers
from faker import Faker

from tests.data.clean.secret_corpus import SECRET_LOOKALIKES, secret

_LOCALES = {}


def faker(locale):
    """Returns the Faker of a locale, made once."""
    if locale not in _LOCALES:
        _LOCALES[locale] = Faker(locale)
    return _LOCALES[locale]


def digits(rng, count):
    return "".join(rng.choice(string.digits) for _ in range(count))


def luhn_digit(body):
    total = sum(int(d) if place % 2 else sum(divmod(2 * int(d), 10)) for place, d in enumerate(reversed(body)))
    return str(-total % 10)


def grouped(text, sizes, separator):
    parts, place = [], 0
    for size in sizes:
        parts.append(text[place : place + size])
        place += size
    return separator.join(parts)


# ---- personal data: each function returns (datum, words that stand before it)
def email(rng):
    locale = rng.choice(["en_US", "de_DE", "fr_FR", "pl_PL", "pt_BR"])
    fake = faker(locale)
    plain = rng.choice([fake.ascii_free_email, fake.ascii_company_email, fake.company_email, fake.free_email])()
    form = rng.randrange(12)
    local, domain = plain.split("@")
    if form == 8:
        mark = rng.choice(["\uff20", "@\u200b", "%40", "&#64;", "(at)", " AT "])
        return f"{local}{mark}{domain.replace('.', ' DOT ') if mark == ' AT ' else domain}", ""
    if form == 9:
        return f"{local}@{domain.partition('.')[0]}{rng.choice(['.com.py', '.py', '.md', '.so', '.edu.so'])}", "Write to "
    if form == 10:
        return f"{local}@{domain.replace('.', '[.]')}", ""
    if form == 11:
        return plain, rng.choice(["https://a12.com/", "//host.de/u/"])
    if form == 0:
        return f"{local}+news@{domain}", ""
    if form == 1:
        return plain.upper(), ""
    if form == 2:
        return f"{local}@mail.{domain}", ""
    if form == 3:
        head, _, tail = domain.rpartition(".")
        return f"{local} [at] {head} [dot] {tail}" if "." not in head else plain, "Write to "
    return plain, rng.choice(["", "Contact: ", "<mailto:", "e-mail ", "(", "From: "])


def phone(rng):
    region = rng.choice(["US", "GB", "DE", "FR", "ES", "IT", "NL", "BR", "IN", "AU", "JP", "MX", "PL", "SE", "CH"])
    while True:
        kind = rng.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE])
        number = phonenumbers.example_number_for_type(region, kind)
        text = str(number.national_number)
        number.national_number = int(text[:-4] + str(rng.randrange(1000, 10000)))
        if phonenumbers.is_valid_number(number):
            break
    forms = phonenumbers.PhoneNumberFormat
    named = rng.choice(["Phone: ", "Tel. ", "call me at ", "mobile ", "Fax: ", "Telefon: ", "WhatsApp "])
    form = rng.randrange(9)
    if form == 8:
        body = str(number.national_number)
        if region != "US":
            return phonenumbers.format_number(number, forms.E164), rng.choice(
                ["Anna,", "17,", "17,x,", "T.", "tel.", "Fax,", "3 "]
            )
        return rng.choice([f"({body[:3]}) {body[3:6]}-{body[6:]}", grouped(body, (3, 3, 4), "-")]), rng.choice(
            ["Anna,", "17,", "2024-01-05 10:00:00 ", "2024-01-05 ", "1. ", "id 12345 ", "Tel.", "12 ", "112,9, "]
        )
    if form == 7:
        national = phonenumbers.format_number(number, forms.NATIONAL)
        bare = national if region == "DE" else str(number.national_number)
        return bare.replace(" ", "-"), rng.choice(
            ["Cellphone: ", "workphone=", "Phones: ", "Ph: ", "Rufnummer ", "Mobiltelefon ", "Handynummer: ", "Telefonnummer: "]
            + ["mobil ", "Telefoonnummer ", "\u0442\u0435\u043b. ", "home phone ", "phone,"]
        )
    if form == 6:
        national = phonenumbers.format_number(number, forms.NATIONAL)
        if region == "FR":
            return national.replace(" ", "."), ""
        if region == "DE":
            return national.replace(" ", " / ", 1), named
        return str(number.national_number) if region == "US" else national, rng.choice(["phone=", "tel ", "phone_number: "])
    if form == 0:
        return phonenumbers.format_number(number, forms.INTERNATIONAL), ""
    if form == 1:
        return phonenumbers.format_number(number, forms.E164), rng.choice(["", named])
    if form == 2:
        return phonenumbers.format_number(number, forms.INTERNATIONAL).replace(" ", rng.choice([".", "-"])), ""
    if form == 3 and region == "US":
        body = str(number.national_number)
        return rng.choice(
            [
                f"({body[:3]}) {body[3:6]}-{body[6:]}",
                grouped(body, (3, 3, 4), "-"),
                grouped(body, (3, 3, 4), "."),
                grouped(body, (3, 3, 4), " "),
                "1-" + grouped(body, (3, 3, 4), "-"),
            ]
        ), ""
    return phonenumbers.format_number(number, forms.NATIONAL), named


def ip(rng):
    while True:
        octets = [rng.randrange(1, 224), *(rng.randrange(256) for _ in range(3))]
        if octets[0] not in (10, 100, 127, 169, 172, 192, 198, 203):
            break
    if rng.random() < 0.6:
        text = ".".join(map(str, octets))
        return text, rng.choice(
            [
                "",
                "from ",
                "client ",
                "http://",
                "[",
                "IP: ",
                "nameserver ",
                "Server: ",
                "DNS server ",
                "web-server=",
                "receiver ",
            ]
        )
    groups = [f"2{rng.randrange(0x400, 0xA00):03x}", *(f"{rng.randrange(1, 65536):x}" for _ in range(7))]
    if rng.random() < 0.5:
        return f"{groups[0]}:{groups[1]}:{groups[2]}::{groups[3]}", rng.choice(["", "from "])
    return rng.choice([str, str.upper])(":".join(groups)), ""


def credit_card(rng):
    prefix, length = rng.choice(
        [
            ("4", 16),
            ("4", 16),
            ("51", 16),
            ("55", 16),
            ("2221", 16),
            ("34", 15),
            ("37", 15),
            ("6011", 16),
            ("65", 16),
            ("3528", 16),
            ("36", 14),
            ("6221", 16),
            ("4", 19),
        ]
    )
    body = prefix + digits(rng, length - len(prefix) - 1)
    number = body + luhn_digit(body)
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (14,), 19: (4, 4, 4, 4, 3)}[length]
    if length == 15 and rng.random() < 0.3:
        sizes = (4, 4, 4, 3)
    separator = rng.choice(["", " ", "-", "\u00a0", "\u2013", ".", "  ", "\u202f", "_", "/"])
    return grouped(number, sizes, separator), rng.choice(["", "Visa ", "paid with "])


def iban(rng):
    fake = faker(rng.choice(["de_DE", "fr_FR", "nl_NL", "en_GB", "pl_PL", "de_CH", "de_AT", "no_NO"]))
    country, (length, letters) = rng.choice(list(_IBAN_FORMS.items()))
    if rng.random() < 0.3:
        text = fake.iban()
        # Faker knows the lengths, not the national check digits: keep those that have none.
        if text[:2] not in ("DE", "GB", "NL", "AT", "CH"):
            text = None
    else:
        text = None
    if text is None:
        body = "".join(rng.choice(string.ascii_uppercase) for _ in range(letters)) + digits(rng, length - 4 - letters)
        number = int("".join(str(int(c, 36)) for c in body + country + "00"))
        text = f"{country}{98 - number % 97:02d}{body}"
    spaced = rng.choice([" ", "-", "\u00a0", "."])
    spellings = [text, grouped(text, (4,) * 9, spaced).strip(spaced), text.lower()]
    return rng.choice(spellings), rng.choice(["", "IBAN: ", "account ", "IBAN"])


# Country: length, leading letters of the account; only countries whose accounts have no further check digits.
_IBAN_FORMS = {
    "DE": (22, 0),
    "GB": (22, 4),
    "NL": (18, 4),
    "AT": (20, 0),
    "CH": (21, 0),
    "IE": (22, 4),
    "LU": (20, 0),
    "SA": (24, 0),
}


def _verhoeff_digit(body):
    multiply = [[(i + j) % 5 if i < 5 and j < 5 else 0 for j in range(10)] for i in range(10)]
    for i in range(10):
        for j in range(10):
            a, b = i % 5, j % 5
            if i < 5 and j < 5:
                multiply[i][j] = (a + b) % 5
            elif i < 5:
                multiply[i][j] = 5 + (a + b) % 5
            elif j < 5:
                multiply[i][j] = 5 + (a - b) % 5
            else:
                multiply[i][j] = (a - b) % 5
    step = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    check = 0
    for place, d in enumerate(reversed(body), start=1):
        value = int(d)
        for _ in range(place):
            value = step[value]
        check = multiply[check][value]
    return str(multiply[check].index(0))


def _weighted(rng, count, weights, modulus, to_digit):
    while True:
        body = str(rng.randrange(1, 10)) + digits(rng, count - 1)
        check = to_digit(sum(int(d) * w for d, w in zip(body, weights, strict=True)) % modulus)
        if 0 <= check <= 9:
            return body + str(check)


def _steuer_id(rng):
    """Ten digits, one of which occurs twice; ISO 7064 mod 11,10."""
    chosen = rng.sample(string.digits, 9)
    while True:
        body = [*chosen, rng.choice(chosen)]
        rng.shuffle(body)
        if body[0] != "0":
            break
    product = 10
    for d in body:
        total = (int(d) + product) % 10 or 10
        product = total * 2 % 11
    return "".join(body) + str((11 - product) % 10)


def national_id(rng):
    name = rng.choice(list(_NATIONAL))
    make, words = _NATIONAL[name]
    return make(rng), rng.choice(words)


def _from(locale, method, words, change=str):
    return lambda rng: change(getattr(faker(locale), method)()), words


def _nino(rng):
    prefix = rng.choice(["AB", "CE", "JK", "PY", "SR", "WM", "HT"])
    return rng.choice([f"{prefix}{{}}{{}}{{}}{{}}", f"{prefix} {{}} {{}} {{}} {{}}"]).format(
        digits(rng, 2), digits(rng, 2), digits(rng, 2), rng.choice("ABCD")
    )


_ANY = ["", "ID: ", "(", "number "]
_NATIONAL = {
    "us_ssn": _from("en_US", "ssn", _ANY),
    "us_ssn_bare": _from("en_US", "ssn", ["SSN ", "my social is "], lambda s: s.replace("-", " ")),
    "us_ssn_dashes": _from("en_US", "ssn", _ANY, lambda s: s.replace("-", "\u2013")),
    "us_itin": _from("en_US", "itin", _ANY),
    "ca_sin": _from("en_CA", "ssn", ["SIN: ", "social insurance number "]),
    "gb_nino": (_nino, _ANY),
    "gb_nhs": (
        lambda rng: grouped(
            _weighted(rng, 9, range(10, 1, -1), 11, lambda r: (11 - r) % 11), (3, 3, 4), rng.choice(["", " ", "-"])
        ),
        ["NHS number ", "NHS no: "],
    ),
    "es_nif": _from("es_ES", "nif", _ANY),
    "es_nie": _from("es_ES", "nie", _ANY),
    "fr_nir": _from("fr_FR", "ssn", _ANY),
    "de_steuer_id": (
        lambda rng: grouped(_steuer_id(rng), (2, 3, 3, 3), rng.choice(["", " "])),
        ["Steuer-ID: ", "Steueridentifikationsnummer ", "IdNr. "],
    ),
    "it_codice_fiscale": _from("it_IT", "ssn", _ANY),
    "nl_bsn": _from("nl_NL", "ssn", ["BSN: ", "burgerservicenummer "]),
    "be_nn": _from("nl_BE", "ssn", ["rijksregisternummer ", "INSZ "]),
    "ch_ahv": _from("de_CH", "ssn", _ANY),
    "at_svnr": _from("de_AT", "ssn", ["SVNR ", "Sozialversicherungsnummer: "]),
    "pl_pesel": _from("pl_PL", "pesel", ["PESEL ", "PESEL: "]),
    "se_personnummer": _from("sv_SE", "ssn", _ANY),
    "no_fodselsnummer": _from("no_NO", "ssn", ["fødselsnummer ", "Fnr: "]),
    "fi_hetu": _from("fi_FI", "ssn", _ANY),
    "ee_ik": _from("et_EE", "ssn", ["isikukood ", "Isikukood: "]),
    "lv_pk": _from("lv_LV", "ssn", ["personas kods ", "Personas kods: "]),
    "cz_rc": _from("cs_CZ", "birth_number", ["rodné číslo ", "RČ: "]),
    "gr_amka": _from("el_GR", "ssn", ["AMKA ", "ΑΜΚΑ: "]),
    "hr_oib": _from("hr_HR", "ssn", ["OIB ", "OIB: "]),
    "ro_cnp": _from("ro_RO", "ssn", _ANY),
    "tr_tckimlik": _from("tr_TR", "ssn", ["TC Kimlik No: ", "T.C. kimlik "]),
    "il_id": _from("he_IL", "ssn", ["Teudat Zehut: ", "teudat zehut "]),
    "br_cpf": _from("pt_BR", "cpf", _ANY),
    "br_cpf_bare": _from("pt_BR", "ssn", ["CPF ", "CPF: "]),
    "cl_rut": _from("es_CL", "rut", _ANY),
    "mx_curp": _from("es_MX", "curp", _ANY),
    "in_aadhaar": (
        lambda rng: grouped(
            (body := str(rng.randrange(2, 10)) + digits(rng, 10)) + _verhoeff_digit(body), (4, 4, 4), rng.choice(["", " "])
        ),
        ["Aadhaar ", "Aadhaar number: "],
    ),
    "cn_ric": _from("zh_CN", "ssn", ["", "身份证号", "ID "]),
    "th_pin": _from("th_TH", "ssn", _ANY),
    "tw_id": _from("zh_TW", "ssn", _ANY),
    "au_tfn": (
        lambda rng: grouped(_weighted(rng, 8, (1, 4, 3, 7, 5, 8, 6, 9), 11, lambda r: r), (3, 3, 3), rng.choice(["", " "])),
        ["TFN ", "tax file number: "],
    ),
}


MAKERS = {
    "email": email,
    "phone": phone,
    "ip": ip,
    "credit_card": credit_card,
    "iban": iban,
    "national_id": national_id,
    "secret": secret,
}


# ---- look-alikes: each returns a text with nothing personal in it
def _wrong_card(rng):
    body = "4" + digits(rng, 14)
    return grouped(body + str((int(luhn_digit(body)) + rng.randrange(1, 10)) % 10), (4, 4, 4, 4), rng.choice(["", " ", "-"]))


def _wrong_iban(rng):
    country = rng.choice(["DE", "GB"])
    body = ("" if country == "DE" else "ABCD") + digits(rng, 18 if country == "DE" else 14)
    good = 98 - int("".join(str(int(c, 36)) for c in body + country + "00")) % 97
    return f"{country}{(good + rng.randrange(1, 50)) % 97:02d}{body}"


def _date(rng):
    y, m, d = rng.randrange(1950, 2030), rng.randrange(1, 13), rng.randrange(1, 29)
    return rng.choice(
        [f"{y}-{m:02d}-{d:02d}", f"{d:02d}.{m:02d}.{y}", f"{m}/{d}/{y}", f"{y}{m:02d}{d:02d}", f"{y}-{m:02d}-{d:02d} 12:30:45"]
    )


def _isbn(rng):
    body = "978" + digits(rng, 9)
    check = -sum(int(d) * (1, 3)[place % 2] for place, d in enumerate(body)) % 10
    return f"ISBN {body[:3]}-{body[3]}-{body[4:8]}-{body[8:12]}-{check}"


LOOKALIKES = {
    "mention": lambda rng: rng.choice(
        ["@alice said", "see @app.route('/x')", "a @ b", "user@localhost", "@property", "x = A@B.T"]
    ),
    "retina": lambda rng: f"icons/logo{rng.randrange(99)}@2x.png",
    "package": lambda rng: f"npm install react@{rng.randrange(20)}.{rng.randrange(20)}.{rng.randrange(9)}",
    "git": lambda rng: "git clone git@github.com:owner/repository",
    "file of a country": lambda rng: rng.choice(
        [
            f"icon{rng.randrange(9)}@{rng.randrange(2, 5)}x.md",
            f"libz@{rng.randrange(9)}.{rng.randrange(9)}.so",
            "@scope/file.py",
        ]
        + [
            "docs/guide@latest.md",
            "README@main.md",
            f"img/b@v{rng.randrange(9)}.py",
            "conf/site@app_config.py",
            "getty@tty.service",
            "HEAD@upstream.py",
            "memcpy@libc.so",
            "pthread_create@libpthread.so.0",
            "libfoo@plt.so",
        ]
    ),
    "other version": lambda rng: (
        rng.choice(["ver. ", "ver ", "Rev. ", 'AssemblyVersion("', "appVer=", "softwareVersion: ", "OID ", "firmware "])
        + ".".join(str(rng.randrange(1, 223)) for _ in range(4))
    ),
    "csv": lambda rng: ",".join(
        [f"row{rng.randrange(99)}", digits(rng, 10), digits(rng, 3), digits(rng, 7), f"{digits(rng, 2)}.{digits(rng, 6)}", "x"]
    ),
    "csv isbn": lambda rng: f"Title,{_isbn(rng)[5:]},{rng.randrange(99)}",
    "csv order": lambda rng: f"{digits(rng, 2)},{digits(rng, 3)}-{digits(rng, 7)}-{digits(rng, 7)},{digits(rng, 2)}",
    "thousands": lambda rng: f"{rng.randrange(1, 9)},{digits(rng, 3)},{digits(rng, 3)},{digits(rng, 4)} of them",
    "dashed part": lambda rng: rng.choice(
        [f"No. 1-{digits(rng, 3)}-555-{digits(rng, 5)}", f"{digits(rng, 3)}-{digits(rng, 3)}-{digits(rng, 5)}"]
        + [
            f"x=415-555-{digits(rng, 4)}",
            f"415-555-{digits(rng, 4)}-7",
            f"2.415-555-{digits(rng, 4)}",
        ]
    ),
    "degrees": lambda rng: f"{rng.uniform(-80, 80):.6f},{rng.uniform(-170, 170):.6f}",
    "disk": lambda rng: rng.choice(["100 GB HARD DRIVE", "3 MAIN ROADS", "5 Things", "12 4th graders", "7 1st Avenues"]),
    "version": lambda rng: f"version {rng.randrange(9)}.{rng.randrange(20)}.{rng.randrange(20)}.{rng.randrange(99)}",
    "oid": lambda rng: "1.3.6.1.4.1." + str(rng.randrange(9999)),
    "five numbers": lambda rng: (
        f"{rng.choice(['release', '>', 'if v >', 'OID'])} {'.'.join(str(rng.randrange(1, 99)) for _ in range(5))}"
    ),
    "bad octet": lambda rng: f"{rng.randrange(256, 999)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}",
    "private ip": lambda rng: rng.choice(
        [f"10.0.{rng.randrange(256)}.1", f"192.168.1.{rng.randrange(256)}", "127.0.0.1", "0.0.0.0", "::1"]
    ),
    "scope": lambda rng: rng.choice(["std::vector<int>", "Add::add", "a[::2]", "Face::b", "x[1::3]"]),
    "time": lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}",
    "mac": lambda rng: ":".join(f"{rng.randrange(256):02x}" for _ in range(6)),
    "date": _date,
    "date range": lambda rng: f"{rng.randrange(1900, 2000)}-{rng.randrange(2000, 2030)}",
    "timestamp": lambda rng: str(rng.randrange(1_500_000_000, 1_800_000_000)),
    "log name": lambda rng: (
        f"backup_20{rng.randrange(10, 26)}0{rng.randrange(1, 9)}1{rng.randrange(9)}-"
        f"{rng.randrange(24):02d}{rng.randrange(60):02d}.tar"
    ),
    "decimal": lambda rng: f"{rng.uniform(-180, 180):.9f}",
    "price": lambda rng: f"${rng.randrange(1, 999)},{digits(rng, 3)},{digits(rng, 3)}.{digits(rng, 2)}",
    "isbn": _isbn,
    "order": lambda rng: f"order {digits(rng, rng.choice([8, 9, 10, 11, 12]))}",
    "dashed order": lambda rng: f"invoice {digits(rng, 4)}-{digits(rng, 5)}-{digits(rng, 2)}",
    "wrong card": _wrong_card,
    "wrong iban": _wrong_iban,
    "wrong ssn": lambda rng: f"{rng.choice(['000', '666'])}-{digits(rng, 2)}-{digits(rng, 4)}",
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "hash": lambda rng: f"commit {rng.getrandbits(160):040x}",
    "md5": lambda rng: f"md5 {rng.getrandbits(128):032x}",
    "part": lambda rng: f"{rng.choice(['RTX', 'AB', 'XJ'])}-{digits(rng, 4)}{rng.choice(string.ascii_uppercase)}",
    "phone-like": lambda rng: f"{digits(rng, 3)} {digits(rng, 2)} {digits(rng, 3)} items",
    "table": lambda rng: " ".join(digits(rng, rng.randrange(1, 5)) for _ in range(12)),
    "math": lambda rng: f"{digits(rng, 3)} + {digits(rng, 4)} = {digits(rng, 5)}",
    "hex": lambda rng: f"0x{rng.getrandbits(64):016x}",
    "resolution": lambda rng: f"{rng.randrange(640, 4000)}x{rng.randrange(480, 3000)}",
    "public key": lambda rng: (
        "-----BEGIN PUBLIC KEY-----\n"
        + "".join(rng.choice(string.ascii_letters) for _ in range(64))
        + "\n-----END PUBLIC KEY-----"
    ),
    "range": lambda rng: f"pages {rng.randrange(100, 300)}-{rng.randrange(300, 999)}",
    "arxiv": lambda rng: rng.choice(
        [f"arXiv:{digits(rng, 4)}.{digits(rng, 5)}", f"(hep-ph/{digits(rng, 7)})", f"[astro-ph/{digits(rng, 7)}]"]
        + [f"pH 7.{digits(rng, 1)} {digits(rng, 7)}", f"ph: 7.{digits(rng, 7)}"]
    ),
    "rank": lambda rng: rng.choice(["In 2014 3rd Place", "Table 3 1st Row", "Chapter 12 2nd Row", "page 24 9th Circle"]),
    **SECRET_LOOKALIKES,
    "doi": lambda rng: f"doi:10.{digits(rng, 4)}/s{digits(rng, 5)}-{digits(rng, 3)}-{digits(rng, 5)}-{digits(rng, 1)}",
}

_BEFORE = ["We met on Monday. ", "The record says: ", "", "As agreed, ", "// see ", "In the annex,\n", "– "]
_AFTER = [" and nothing else.", ".", "\n", ", which was noted.", " ", ";", ""]
# Numbers beside the datum: of items, rooms, years; opening hours, postcodes.
_BEFORE += ["1) ", "2) see ", "12\n", "12\t", "Room 5, ", "2014: ", "(24h) "]
_AFTER += [" 24 hours", " - 24 hours", " (24h)", " (9 am - 5 pm)", " / 3", " 75008 Paris", " - 75008 Paris", " 24/7"]
_AFTER += ["\n12 more", ": 12", ": refused"]


def personal(seed, count):
    """Returns `count` (class, datum, text that holds it) for every class."""
    rng = random.Random(seed)
    for locale in ("en_US", "de_DE", *_LOCALES):
        faker(locale)
    Faker.seed(seed)
    made = []
    for name, make in MAKERS.items():
        for _ in range(count):
            if name == "secret":  # what stands around it is half of it
                datum, text = make(rng)
                made.append((name, datum, rng.choice(["", "See below:\n", "# "]) + text + rng.choice(["", "\n", " "])))
                continue
            datum, words = make(rng)
            closing = {"<": ">", "(": ")", "[": "]"}.get(
                words[:1], '"' if words.endswith('"') else "'" if words.endswith("'") else ""
            )
            made.append((name, datum, f"{rng.choice(_BEFORE)}{words}{datum}{closing}{rng.choice(_AFTER)}"))
    return made


def lookalikes(seed, count):
    """Returns `count` (kind, text) for every kind of look-alike."""
    rng = random.Random(seed)
    return [
        (kind, f"{rng.choice(_BEFORE)}{make(rng)}{rng.choice(_AFTER)}")
        for kind, make in LOOKALIKES.items()
        for _ in range(count)
    ]
