"""Personal identity numbers of 45 countries: where a text may hold one, and python-stdnum's check of its digits.

A number whose form alone is rare (a letter, a date and check digits, separators of its own) is taken wherever it stands.
Eight to thirteen bare digits with one check digit are not: one in ten of all order numbers would pass. These need one of
their country's words nearby (`context`).
"""

import dataclasses
import re

from llmos_jax.data.clean.pii_view import bounded, compact
from llmos_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class NationalId:
    """One kind of number.

    kind: `country_name`, the name of its class. module: python-stdnum's, whose `is_valid` decides ("": the form does; "own":
    a check of this file).
    pattern: how it is written. context: words of which one must stand nearby (none: taken anywhere).
    """

    kind: str
    module: str
    pattern: str
    context: tuple[str, ...] = ()


# Written with separators of their own, or with a date, letters and check digits: taken anywhere.
_ANYWHERE = (
    NationalId("us_ssn", "us.ssn", r"\d{3}-\d\d-\d{4}"),
    NationalId("us_itin", "us.itin", r"9\d\d-\d\d-\d{4}"),
    NationalId("br_cpf", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d"),
    NationalId("cl_rut", "cl.rut", r"\d{1,2}\.\d{3}\.\d{3}-[\dkK]"),
    NationalId("ch_ahv", "ch.ssn", r"756\.?\d{4}\.?\d{4}\.?\d\d"),
    NationalId("se_personnummer", "se.personnummer", r"(?:19)?\d{6}[-+]\d{4}"),
    NationalId("fi_hetu", "fi.hetu", r"\d{6}[-+ABCDEFYXWVU]\d{3}[0-9A-Y]"),
    NationalId("kr_rrn", "kr.rrn", r"\d{6}-\d{7}"),
    NationalId("th_pin", "th.pin", r"\d-\d{4}-\d{5}-\d\d-\d"),
    NationalId("cn_ric", "own", r"[1-8]\d{5}(?:19|20)\d\d[01]\d[0-3]\d{4}[\dXx]"),
    NationalId("fr_nir", "fr.nir", r"[12] ?\d\d ?[0-9]\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"),
    NationalId("be_nn", "be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"),
    NationalId("rs_si_emso", "si.emso", r"[0-3]\d[01]\d(?:9\d\d|0[0-2]\d)\d{6}"),
    NationalId("ro_cnp", "ro.cnp", r"[1-8]\d\d[01]\d[0-3]\d{7}"),
    NationalId("za_id", "za.idnr", r"\d\d[01]\d[0-3]\d{5}[01]\d\d"),
    NationalId("es_dni", "es.dni", r"\d{8}[ -]?[A-Z]"),
    NationalId("es_nie", "es.nie", r"[XYZ][ -]?\d{7}[ -]?[A-Z]"),
    NationalId("gb_nino", "", r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"),
    NationalId("it_codice_fiscale", "it.codicefiscale", r"[A-Z]{6}[\dL-V]{2}[A-EHLMPR-T][\dL-V]{2}[A-Z][\dL-V]{3}[A-Z]"),
    NationalId("mx_curp", "mx.curp", r"[A-Z]{4}\d{6}[A-Z]{6}[A-Z\d]\d"),
    NationalId("in_pan", "in_.pan", r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]"),
    NationalId("tw_id", "own", r"[A-Z][12]\d{8}"),
)
# Bare digits with little to check: only near a word that names them.
_NAMED = (
    NationalId("us_ssn", "us.ssn", r"\d{3}[ .-]?\d\d[ .-]?\d{4}", ("ssn", "ssns", "social", "taxpayer")),
    NationalId("br_cpf", "br.cpf", r"\d{11}", ("cpf", "contribuinte")),
    NationalId("cl_rut", "cl.rut", r"\d{7,8}-?[\dkK]", ("rut", "run")),
    NationalId("ca_sin", "ca.sin", r"\d{3}[ -]?\d{3}[ -]?\d{3}", ("sin", "insurance", "nas")),
    NationalId("gb_nhs", "gb.nhs", r"\d{3}[ -]?\d{3}[ -]?\d{4}", ("nhs",)),
    NationalId("de_steuer_id", "de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", ("steuer", "steuerid", "idnr", "tin")
               + ("steueridentifikationsnummer", "identifikationsnummer", "steuernummer")),
    NationalId("nl_bsn", "nl.bsn", r"\d{4}\.?\d{2}\.?\d{3}", ("bsn", "burgerservicenummer", "sofinummer", "sofi")),
    NationalId("be_nn", "be.nn", r"\d{11}", ("rijksregisternummer", "registre", "insz", "niss", "rijksregister")),
    NationalId("pt_nif", "pt.nif", r"\d{3} ?\d{3} ?\d{3}", ("nif", "contribuinte", "fiscal")),
    NationalId("at_svnr", "at.vnr", r"\d{4} ?\d{6}", ("svnr", "sozialversicherungsnummer", "versicherungsnummer", "sv")),
    NationalId("pl_pesel", "pl.pesel", r"\d{11}", ("pesel",)),
    NationalId("se_personnummer", "se.personnummer", r"(?:\d\d)?\d{6}[-+]?\d{4}", ("personnummer", "personnr", "pnr")),
    NationalId("no_fodselsnummer", "no.fodselsnummer", r"\d{6} ?\d{5}", ("fødselsnummer", "fodselsnummer", "fnr")),
    NationalId("dk_cpr", "dk.cpr", r"\d{6}[- ]?\d{4}", ("cpr", "personnummer")),
    NationalId("ee_ik", "ee.ik", r"\d{11}", ("isikukood", "isikukoodi")),
    NationalId("lt_asmens", "lt.asmens", r"\d{11}", ("asmens", "kodas")),
    NationalId("lv_pk", "lv.pvn", r"\d{6}-?\d{5}", ("personas", "kods")),
    NationalId("cz_sk_rc", "cz.rc", r"\d{6}/?\d{3,4}", ("rodné", "rodne", "rč", "číslo")),
    NationalId("bg_egn", "bg.egn", r"\d{10}", ("egn", "егн")),
    NationalId("gr_amka", "gr.amka", r"\d{11}", ("amka", "αμκα")),
    NationalId("hr_oib", "hr.oib", r"\d{11}", ("oib",)),
    NationalId("tr_tckimlik", "tr.tckimlik", r"\d{11}", ("tc", "kimlik", "tckn")),
    NationalId("il_id", "il.idnr", r"\d{9}", ("teudat", "zehut", "זהות")),
    NationalId("ie_pps", "ie.pps", r"\d{7}[A-W][A-IW]?", ("pps", "ppsn")),
    NationalId("ar_dni", "ar.dni", r"\d{2}\.?\d{3}\.?\d{3}", ("dni", "documento")),
    NationalId("ec_ci", "ec.ci", r"\d{10}", ("cédula", "cedula", "ci")),
    NationalId("in_aadhaar", "in_.aadhaar", r"\d{4}[ -]?\d{4}[ -]?\d{4}", ("aadhaar", "aadhar", "uidai", "आधार")),
    NationalId("jp_my_number", "jp.in_", r"\d{4}[ -]?\d{4}[ -]?\d{4}", ("mynumber", "individual", "マイナンバー", "個人番号")),
    NationalId("th_pin", "th.pin", r"\d{13}", ("thai", "บัตรประชาชน")),
    NationalId("kr_rrn", "kr.rrn", r"\d{13}", ("rrn", "주민등록번호")),
    NationalId("my_nric", "my.nric", r"\d{6}-?\d{2}-?\d{4}", ("nric", "mykad", "ic")),
    NationalId("id_nik", "id.nik", r"\d{16}", ("nik", "ktp")),
    NationalId("ua_rntrc", "ua.rntrc", r"\d{10}", ("рнокпп", "ідентифікаційний", "rntrc", "іпн")),
    NationalId("ru_inn", "ru.inn", r"\d{12}", ("инн", "inn")),
    NationalId("au_tfn", "au.tfn", r"\d{3} ?\d{3} ?\d{2,3}", ("tfn", "tax")),
    NationalId("nz_ird", "nz.ird", r"\d{2,3}[- ]?\d{3}[- ]?\d{3}", ("ird",)),
    NationalId("is_kennitala", "is_.kennitala", r"\d{6}-?\d{4}", ("kennitala", "kt")),
)  # fmt: skip
KINDS = tuple(sorted({rule.kind for rule in _ANYWHERE + _NAMED}))
# How far before and after a number its name may stand, characters.
_BEFORE, _AFTER = 60, 25
# Numbers without six digits in a row; they start with five or six capitals, and a digit follows.
_FEW_DIGITS = ("it_codice_fiscale", "in_pan")
_WORD = re.compile(r"[^\W\d_]+")


class NationalIds:
    """Finds the national ids of `kinds`."""

    def __init__(self, kinds=KINDS):
        anywhere = [rule for rule in _ANYWHERE if rule.kind in kinds]
        self._of_digits = _Shapes([rule for rule in anywhere if not re.search(r"[A-Z]", rule.pattern)])
        letters = [rule for rule in anywhere if re.search(r"[A-Z]", rule.pattern)]
        self._of_letters = _Shapes([rule for rule in letters if rule.kind not in _FEW_DIGITS])
        self._of_few_digits = _Shapes([rule for rule in letters if rule.kind in _FEW_DIGITS])
        self._by_word = {}
        for rule in _NAMED:
            for word in rule.context if rule.kind in kinds else ():
                self._by_word.setdefault(word, []).append(_Shapes([rule]))
        self._scripts = tuple(word for word in self._by_word if ord(word[0]) > 0x0E00)  # written without spaces

    def find(self, view):
        """Yields (start, end, kind) for a `pii_view.View`."""
        text = view.text
        for place in view.behind_capitals:
            yield from self._of_few_digits.find(text, max(0, place - 6), place + 12)
        for start, end in view.runs:
            # A little more than the run, for what may not follow it.
            yield from self._of_digits.find(text, start, end + 2)
            yield from self._of_letters.find(text, max(0, start - 5), min(len(text), end + 10))
            for shapes in self._named(text[max(0, start - _BEFORE) : start], text[end : end + _AFTER]):
                # Behind the run there may be a check letter; far into a long one nothing is named any more.
                yield from shapes.find(text, start, min(end + 3, start + _BEFORE + _AFTER))

    @staticmethod
    def normal(value):
        """Returns an id without separators, in capitals."""
        return compact(value)

    def _named(self, before, after):
        words = _WORD.findall(before.lower()) + _WORD.findall(after.lower())
        named = [word for word in words if word in self._by_word]
        named += [word for word in self._scripts if word in before]
        return [shapes for word in dict.fromkeys(named) for shapes in self._by_word[word]]


class _Shapes:
    """Rules that are looked for together: one pattern finds the places, then each rule is asked."""

    def __init__(self, rules):
        self._pattern = bounded("|".join(rule.pattern for rule in rules) or r"(?!)")
        self._rules = [(rule.kind, bounded(rule.pattern), _check(rule)) for rule in rules]

    def find(self, text, start, end):
        for match in self._pattern.finditer(text, start, end):
            for kind, pattern, check in self._rules:
                if pattern.fullmatch(text, match.start(), match.end()) and check(match[0]):
                    yield match.start(), match.end(), kind
                    break


def _check(rule):
    """Returns the function that says whether the digits of a match are right."""
    if rule.module == "":
        return lambda number: True
    if rule.module == "own":
        return {"tw_id": _is_taiwan_id, "cn_ric": _is_chinese_id}[rule.kind]
    try:
        import stdnum.util
    except ImportError:
        raise ConfigError("national ids need python-stdnum: pip install 'llmos-jax[privacy]'") from None
    country, name = rule.module.split(".")
    is_valid = stdnum.util.get_cc_module(country.rstrip("_"), name).is_valid
    # Of the separators that people write, these checks know hyphens alone.
    return (lambda number: is_valid(compact(number))) if country == "us" else is_valid


def _is_taiwan_id(number):
    """Whether the digits of a Taiwanese id add up: the letter counts as two digits, weights 1, 9, 8, ... 1, 1, modulo 10."""
    letter = "ABCDEFGHJKLMNPQRSTUVXYWZIO".index(number[0]) + 10
    digits = [letter // 10, letter % 10, *map(int, number[1:])]
    return sum(d * w for d, w in zip(digits, (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1), strict=True)) % 10 == 0


def _is_chinese_id(number):
    """Whether the last digit checks the others (GB 11643: ISO 7064 mod 11,2). Regions are left out: many have changed."""
    total = sum(int(d) * 2 ** (17 - place) for place, d in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()
