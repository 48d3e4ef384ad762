"""Personal data with a form of its own: e-mail, phone, IP address, card, IBAN, street address.

Every pattern has bounded repetitions and is only asked where a cheap scan found its mark (an @, six digits, a colon), so the
time is linear in the text, whatever it holds.
"""

import functools
import ipaddress
import re

from llmos_jax.data.clean.national_ids import bounded
from llmos_jax.errors import ConfigError

# Six digits and more with at most three separators between two of them: where numbers of all kinds are looked for.
_RUN = re.compile(r"[0-9](?:[ .\-/()\u00a0\u2010\u2011\u2013]{0,3}+[0-9]){5,}+")


# Words that begin as IBANs and ids do: two capitals and two digits, or five capitals.
_CAPITALS = re.compile(r"[A-Z](?<!\w.)[A-Z](?:[0-9]{2}|[A-Z]{3})", re.ASCII)


class View:
    """A text with what several detectors ask for: in lower case, and the (start, end) of runs of six digits and more."""

    def __init__(self, text):
        self.text, self.lowered = text, text.lower()
        if len(self.lowered) != len(text):  # a few letters become two
            self.lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        self.runs = [match.span() for match in _RUN.finditer(text)]

    @functools.cached_property
    def capitals(self):
        """Where words start that begin with two capitals and two digits, or with five capitals."""
        return [match.start() for match in _CAPITALS.finditer(self.text)]


# ---- e-mail
# Read backwards from the @.
_LOCAL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}+|\"[^\"\s]{1,62}\"")
_DOMAIN = re.compile(
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})(?!\w)|\[(?:IPv6:)?[0-9A-Fa-f.:]{3,45}\]"
)
_SPELT_AT = re.compile(r"[\[({] ?at ?[\])}] ?")
_SPELT_DOMAIN = re.compile(r"[\w-]{1,63}(?: ?(?:[\[({] ?dot ?[\])}]|\.) ?[\w-]{2,24}){1,4}")
# What sentences, quotes and markup leave before an address.
_NOT_FIRST = "'`*|{=/.&?~!#$%^-"
_FILE_ENDINGS = frozenset(
    [
        "png",
        "jpg",
        "jpeg",
        "gif",
        "svg",
        "webp",
        "css",
        "js",
        "ts",
        "py",
        "json",
        "html",
        "md",
        "txt",
        "so",
        "dll",
        "exe",
        "zip",
        "tar",
        "gz",
        "pdf",
    ]
)


class Email:
    """Finds e-mail addresses, those with international letters and those spelt `name [at] host [dot] org` too."""

    def find(self, view):
        """Yields (start, end, "email")."""
        text = view.text
        place = text.find("@")
        while place >= 0:
            domain = _DOMAIN.match(text, place + 1)
            start = domain and self._start(text, place)
            if domain and start < place and not self._is_other(text, domain):
                yield start, domain.end(), "email"
            place = text.find("@", place + 1)
        if (
            "at]" in view.lowered
            or "at)" in view.lowered
            or "at }" in view.lowered
            or "at ]" in view.lowered
            or "at )" in view.lowered
        ):
            for mark in _SPELT_AT.finditer(view.lowered):
                domain = _SPELT_DOMAIN.match(view.lowered, mark.end())
                before = mark.start() - text.endswith(" ", 0, mark.start())
                start = domain and self._start(text, before)
                if domain and start < before:
                    yield start, domain.end(), "email"

    @staticmethod
    def _start(text, end):
        """Returns where the local part that ends at `end` starts; `end` when there is none."""
        local = _LOCAL.match(text[max(0, end - 64) : end][::-1])
        if not local:
            return end
        start = end - local.end()
        while start < end and text[start] in _NOT_FIRST:
            start += 1
        return start

    @staticmethod
    def _is_other(text, domain):
        # logo@2x.png; git@host:path, where what follows is no port, no sentence and no markup
        last = domain[0].rpartition(".")[2].lower()
        follows = text[domain.end() : domain.end() + 2]
        return last in _FILE_ENDINGS or (
            follows[:1] == ":" and follows[1:].isalpha() and text[domain.start() - 4 : domain.start()] == "git@"
        )


# ---- IP addresses
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_DOTS = re.compile(r"\.\d{1,3}\.\d{1,3}\.", re.ASCII)
_IPV4 = re.compile(rf"(?<![\w.+-])(?<!\d[:/])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\d)", re.ASCII)
# The first colon of what may be one, and what it may be.
_FIRST_COLON = re.compile(r":(?<=[23fF][0-9A-Fa-f]{3}:)[0-9A-Fa-f:]")
_IPV6 = re.compile(r"[23fF][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,37}(?:\d{1,3}(?:\.\d{1,3}){3})?(?![\w:]|\.\d)", re.ASCII)
# Elsewhere hexadecimal words before "::" (Add::, Face::b) would be addresses.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_LOCAL_UNICAST = ipaddress.ip_network("fc00::/6")
_VERSION = re.compile(r"(?:version|release|firmware|build|ver|rev|section|§|chapter|oid)[.:\s#=v\"']{0,4}\Z", re.IGNORECASE)
# Four small numbers are a version or a section more often than an address, unless something says so.
_SMALL = re.compile(r"(?:[12]?\d\.){3}[12]?\d")
_IP_WORD = re.compile(r"(?:\bip|ipv4|host\w*|addr\w*|from|server|client|ping|peer|dns|gateway|//|@)[\W]{0,4}\Z", re.IGNORECASE)


def _is_version(text, match):
    before = (text, max(0, match.start() - 14), match.start())
    return bool(_VERSION.search(*before) or (_SMALL.fullmatch(match[0]) and not _IP_WORD.search(*before)))


class IpAddress:
    """Finds public IPv4 and IPv6 addresses; private, local and documentation ranges name nobody."""

    def __init__(self, with_private=False):
        self.with_private = with_private

    def find(self, view):
        """Yields (start, end, "ip")."""
        text = view.text
        for dots in _DOTS.finditer(text):
            match = _IPV4.search(text, max(0, dots.start() - 3), dots.end() + 5)
            if match and match.start() < dots.start() and self._is_meant(match[0]) and not _is_version(text, match):
                yield match.start(), match.end(), "ip"
        done = 0
        for colon in _FIRST_COLON.finditer(text):
            match = _IPV6.match(text, colon.start() - 4) if colon.start() - 4 >= done else None
            if match:
                done = match.end()
                before = text[match.start() - 1] if match.start() else " "
                if not (before.isalnum() or before in "_:.") and self._is_meant(match[0]):
                    yield match.start(), match.end(), "ip"

    def _is_meant(self, address):
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if parsed.version == 6 and parsed not in _GLOBAL_UNICAST:
            return self.with_private and parsed in _LOCAL_UNICAST
        return self.with_private or parsed.is_global


# ---- payment cards and accounts
_CARD = bounded(r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{4,5}|\d{12,19}")
# Issuer ranges (prefix, lengths). Twelve to fourteen digits are also much else: these need a word.
_ISSUERS = re.compile(
    r"4\d{15}(?:\d{3})?|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d|09)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}|(?:50|5[6-9]|6[0-9])\d{14}|(?:2131|1800)\d{11}"
)
_ISSUERS_NAMED = re.compile(r"4\d{12}|(?:50|5[6-9]|6\d)\d{10,17}")
_CARD_WORD = re.compile(r"card|visa|maestro|amex|karte|carte|tarjeta|cart[aã]o|payment|\bcc\b|\bpan\b", re.IGNORECASE)


class CreditCard:
    """Finds card numbers: an issuer's range, its lengths, and Luhn's check digit."""

    def find(self, view):
        """Yields (start, end, "credit_card")."""
        text = view.text
        for start, end in view.runs:
            if end - start < 12:
                continue
            for match in _CARD.finditer(text, start, end):
                digits = re.sub(r"[ -]", "", match[0])
                is_card = _ISSUERS.fullmatch(digits) or (
                    _ISSUERS_NAMED.fullmatch(digits) and _CARD_WORD.search(text, max(0, match.start() - 40), match.start())
                )
                if is_card and luhn(digits):
                    yield match.start(), match.end(), "credit_card"


def luhn(digits):
    """Whether the last digit is Luhn's check digit of the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) << (place & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


_IBAN = re.compile(r"[A-Z](?<![\w-].)[A-Z]\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?![\w])", re.ASCII)
_IBAN_COMPACT = re.compile(r"[ -]")


class Iban:
    """Finds IBANs: country, length and mod-97 check (ISO 13616)."""

    def __init__(self):
        try:
            from stdnum import iban
        except ImportError:
            raise ConfigError("IBANs need python-stdnum: pip install 'llmos-jax[privacy]'") from None
        self._is_valid = iban.is_valid

    def find(self, view):
        """Yields (start, end, "iban")."""
        done = 0
        for place in view.capitals:
            match = _IBAN.match(view.text, place) if place >= done else None
            if not match:
                continue
            done = match.end()
            # In running text a word in capitals may follow: try shorter ones, group by group.
            end = match.end()
            while end - match.start() >= 15:
                if self._is_valid(_IBAN_COMPACT.sub("", view.text[match.start() : end])):
                    yield match.start(), end, "iban"
                    break
                end = max(view.text.rfind(" ", match.start(), end), view.text.rfind("-", match.start(), end))


# ---- phone numbers
_SEPARATOR = r"[ .\-/\u00a0\u2010\u2011\u2013]"
# Nothing is tried twice (possessive throughout): digits, then groups of digits with or without parentheses.
_PHONE = re.compile(
    rf"(?<![\w.,=])(?<!\d[-/])(?:\+|\(\+|\()?+\d{{1,15}}+\)?+(?:{_SEPARATOR}{{0,2}}+\(?+\d{{1,15}}+\)?+){{0,7}}+(?![\w]|[-.,/]\d)",
    re.ASCII,
)
_PHONE_WORD = re.compile(
    r"(?:\b(?:tel|telephone|phone|mobile|mob|cell|fax|call|dial|whatsapp|sms|text|ring|t[eé]l[eé]phone|tel[eé]fono|telefon|telefoon"
    r"|telefone|celular|m[oó]vil|handy|cellulare|portable|hotline|contact)\b|☎|📞|电话|手机|電話)\W{0,4}(?:\w{1,8}\W{1,3}){0,3}\Z",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?:19|20)\d\d[-./ ][01]?\d[-./ ][0-3]?\d(?:\D.*)?|[0-3]?\d[-./ ][0-3]?\d[-./ ](?:19|20)\d\d(?:\D.*)?"
    r"|(?:19|20)\d\d\W{1,3}(?:19|20)\d\d"
)
_NEIGHBOUR = re.compile(r"\d\W\Z")
_NORTH_AMERICAN = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d([ .-])[2-9]\d\d\1\d{4})")


class Phone:
    """Finds phone numbers that `phonenumbers` (Google's libphonenumber) holds valid.

    A number with its country's code, or in North American form, is taken anywhere; with a trunk 0 and separators if it is
    valid in one of `regions`; any other number only behind a word like "phone".
    """

    def __init__(self, regions):
        try:
            import phonenumbers
        except ImportError:
            raise ConfigError("phone numbers need phonenumbers: pip install 'llmos-jax[privacy]'") from None
        self._library = phonenumbers
        self.regions = regions
        unknown = [region for region in regions if region not in phonenumbers.SUPPORTED_REGIONS]
        if unknown:
            raise ConfigError(f"phone_regions: {unknown[0]!r} is no region of phonenumbers; give ISO 3166 codes, as US or DE.")

    def find(self, view):
        """Yields (start, end, "phone")."""
        text, done = view.text, 0
        for start, end in view.runs:
            place = max(done, start - 5)
            for match in _PHONE.finditer(text, place, end):
                number = match[0]
                digits = sum(map(str.isdigit, number))
                if 7 <= digits <= 17 and self._is_phone(text, match, number, digits):
                    yield match.start(), match.end(), "phone"
                done = match.end()

    def _is_phone(self, text, match, number, digits):
        if number[0] == "+" or number.startswith(("(+", "00")):
            plain = number.replace("(0)", "")
            return self._is_valid(f"+{plain[2:]}" if plain.startswith("00") else plain, None)
        if _DATE.fullmatch(number):
            return False
        is_named = _PHONE_WORD.search(text, max(0, match.start() - 40), match.start())
        if _NORTH_AMERICAN.fullmatch(number):
            return self._is_valid(number, "US")
        if is_named:
            return any(self._is_valid(number, region) for region in self.regions)
        is_alone = (
            not _NEIGHBOUR.search(text, max(0, match.start() - 2), match.start())
            and not text[match.end() + 1 : match.end() + 2].isdigit()
        )
        return (
            number[0] in "0("
            and digits >= 9
            and is_alone
            and any(self._is_written_so(number, region) for region in self.regions)
        )

    def _is_written_so(self, number, region):
        """Whether the groups of a number are those of its country's own way of writing it."""
        library = self._library
        try:
            parsed = library.parse(number, region)
        except library.NumberParseException:
            return False
        if not library.is_valid_number(parsed):
            return False
        own = library.format_number(parsed, library.PhoneNumberFormat.NATIONAL)
        return not re.search(r"[-.]", number) and re.findall(r"\d+", own) == re.findall(r"\d+", number) and not own.isdigit()

    def _is_valid(self, number, region):
        library = self._library
        try:
            return library.is_valid_number(library.parse(number, region))
        except library.NumberParseException:
            return False


# ---- street addresses
_NAME = r"(?:[A-Z][\w'’.-]{0,24}|of|de|la|del|the) "
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|Parkway|Pkwy"
    "|Highway|Hwy|Circle|Cir|Trail|Trl|Crescent|Close|Alley|Plaza|Row|Mews|Gardens|Grove|Hill|Ridge|Walk|Heights|Turnpike|Expressway|Freeway"
)
_ENGLISH = (
    rf"[0-9]{{0,4}}[A-Za-z]? (?=[A-Zdlot])(?:{_NAME}){{1,4}}(?:{_STREETS})\b\.?"
    r"(?:,? (?:Apt|Suite|Ste|Unit|Flat|#)\.? ?\w{1,6})?"
)
# Looked for backwards from a house number: " 12" behind one of these.
_GERMANIC_ENDS = (
    "straße", "strasse", "Straße", "Strasse", "str.", "Str.", "allee", "Allee", "platz", "Platz", "gasse", "Gasse", "ring",
    "Ring", "weg", "Weg", "ufer", "damm", "straat", "laan", "gracht", "plein", "kade", "singel", "steeg", "dreef", "boulevard",
    "vägen", "gatan", "gata", "stigen", "torget", "gränd",
)  # fmt: skip
_HOUSE_NUMBER = re.compile(r" (?<=[a-zß.] )\d{1,4}(?:[/-]\d{1,3})?(?: ?[a-z]\b)?(?![\w])")
_GERMANIC = re.compile(r"(?:[A-ZÄÖÜ][\w-]{0,30}[ -]){0,2}[A-ZÄÖÜ][\w-]{2,40}\.?\Z")
_FRENCH = (
    r"[0-9]{0,3}(?: ?(?:bis|ter))?,? "
    r"(?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Cc]hemin|[Pp]lace|[Aa]llée|[Qq]uai) "
    r"(?:(?:[A-ZÀ-Ý][\w'’.-]{0,24}|du|de|des|la|le|les|et|au|aux) ){0,5}(?:[dl]['’])?[A-ZÀ-Ý][\w'’-]{1,24}"
)
_NUMBERED = re.compile(rf"[0-9](?<![\w.,/-].)(?:{_ENGLISH}|{_FRENCH})")
_ROMANCE = re.compile(
    r"[CAPVRTLS](?:alle|/|venida|v\.|aseo|laza|amino|onda|lameda|ia|iale|iazza|icolo|trada|orso|ua|ravessa|argo|raça) "
    r"(?=[A-ZÀ-Ýdl])(?:(?:[A-ZÀ-Ý][\w'’.-]{0,24}|de|del|della|delle|dei|dos|da|do|la|las|los|el|d') ){0,5}"
    r"[A-ZÀ-Ý][\w'’-]{1,24},? (?:n[.º°]? ?)?\d{1,4}\b"
)


class StreetAddress:
    """Finds street addresses with a house number, by the rules of English, German, Dutch, Swedish, French, Spanish,
    Italian and Portuguese. Addresses have no check digits: what rules can't tell from other text stays."""

    def find(self, view):
        """Yields (start, end, "address")."""
        text = view.text
        for match in _NUMBERED.finditer(text):
            yield match.start(), match.end(), "address"
        for number in _HOUSE_NUMBER.finditer(text):
            place = number.start()
            if text.endswith(_GERMANIC_ENDS, max(0, place - 8), place):
                match = _GERMANIC.search(text, max(0, place - 80), place)
                if match:
                    yield match.start(), number.end(), "address"
        for match in _ROMANCE.finditer(text):
            yield match.start(), match.end(), "address"
