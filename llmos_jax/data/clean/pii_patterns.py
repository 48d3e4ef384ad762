"""Personal data with a form of its own: e-mail, IP address, card, IBAN, street address. Phone numbers: `phones.py`.

Every pattern has bounded repetitions and is only asked where a cheap scan found its mark (an @, six digits, a colon), so the
time is linear in the text, whatever it holds.
"""

import ipaddress
import re
import unicodedata

from llmos_jax.data.clean.pii_view import bounded, compact, plain
from llmos_jax.errors import ConfigError

# ---- e-mail
# What is there and not seen: soft hyphen, zero-width space, word joiner, byte order mark.
_UNSEEN = "\u00ad\u200b\u2060\ufeff"
# Read backwards from the @.
_LOCAL = re.compile(rf"[\w.!#$%&'*+=?^`{{|}}~{_UNSEEN}-]{{1,64}}+|\"[^\"\s]{{1,62}}\"")
_DOMAIN = re.compile(
    rf"[{_UNSEEN}]{{0,2}}(?:(?:[^\W_](?:[\w-]{{0,61}}[^\W_])?\.){{1,8}}(?:[^\W\d_]{{2,24}}|xn--[a-z0-9-]{{2,59}})(?!\w)"
    r"|\[(?:IPv6:)?[0-9A-Fa-f.:]{3,45}\])"
)
_DEFANGED = re.compile(r"[\w.-]{1,63}+(?: ?(?:\[\.\]|[\[({<] ?dot ?[\])}>]) ?[\w-]{2,24}+){1,4}", re.IGNORECASE)
# Other ways of writing an @, and the dot: `name [at] host [dot] org`, `name%40host.org`, `name&#64;host.org`.
_SPELT_AT = re.compile(r"[\[({<%&](?:(?<![%&]) ?at ?[\])}>] ?|(?<=%)40|(?<=&)(?:#0{0,2}64|#x0{0,2}40|commat);)")
_SPELT_DOMAIN = re.compile(r"[\w-]{1,63}(?: ?(?:[\[({<] ?dot ?[\])}>]|&#46;|\.) ?[\w-]{2,24}){1,4}", re.IGNORECASE)
# `name at host dot org`: only with an ending that is no word of a sentence about dots.
_SPOKEN = re.compile(
    r"[\w.+-]{1,64}(?: dot [\w.+-]{1,40}){0,3} at (?:[\w-]{1,63} dot ){1,4}(?:com|org|net|edu|gov|info|io|dev|app|co|uk|de"
    r"|fr|es|nl|pl|se|ch|eu|ca|au|jp|br|ru|cz|dk|fi|pt|ie|nz|mx|us)(?!\w)",
    re.IGNORECASE,
)
# What sentences, quotes and markup leave before an address.
_NOT_FIRST = "'`*|{=.&?~!#$%^-"
# `jane/roe@host.org` is an address; in a path or a URL, only what follows the last slash.
_WHOLE_LOCAL = re.compile(r"(?<![\w./:@=?&%~-])[^\W\d_]{2,24}/\Z")
_FILE_ENDINGS = frozenset((
    "png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "py", "json", "html", "md", "txt", "so", "dll", "exe", "zip",
    "tar", "gz", "pdf", "conf", "service", "socket", "timer", "mount", "slice",
))  # fmt: skip
# Endings that are countries, too, behind what is no name of a host: a version, a branch, a word of one letter or with a _.
_COUNTRIES = frozenset(("md", "py", "so"))
_NO_HOST = re.compile(
    r"(?!.*\b(?:com|org|net|edu|go[bv])\.)(?:v?\d|.\.|\w*_|(?:main|master|head|trunk|latest|next|dev|stable|beta|test)\.)", re.I
)


class Email:
    """Finds e-mail addresses, those with international letters and those spelt `name [at] host [dot] org` too."""

    def find(self, view):
        """Yields (start, end, "email")."""
        text = view.text
        place = text.find("@")
        while place >= 0:
            domain = _DOMAIN.match(text, place + 1) or _DEFANGED.match(text, place + 1)
            start = domain and self._start(text, place)
            if domain and start < place and not self._is_other(text, start, domain):
                rest = _WHOLE_LOCAL.search(text, max(0, start - 30), start)
                yield rest.start() if rest else start, domain.end(), "email"
            place = text.find("@", place + 1)
        for mark in filter(None, (_SPELT_AT.match(view.lowered, place) for place in view.brackets)):
            domain = _SPELT_DOMAIN.match(text, mark.end())
            before = mark.start() - text.endswith(" ", 0, mark.start())
            start = domain and self._start(text, before)
            if domain and start < before and not self._is_other(text, start, domain):
                yield start, domain.end(), "email"
        place = view.lowered.find(" dot ")
        while place >= 0:
            match = _SPOKEN.search(text, max(0, place - 140), place + 140)
            if match:
                yield match.start(), match.end(), "email"
            place = view.lowered.find(" dot ", max(place + 5, match.end() if match else 0))

    @staticmethod
    def normal(value):
        """Returns an address in small letters with a plain @ and plain dots."""
        value = unicodedata.normalize("NFKC", plain(value)).casefold()
        value = re.sub(f"[{_UNSEEN}]", "", value)
        value = re.sub(rf"\s*(?:{_SPELT_AT.pattern})\s*| at ", "@", value, count=1)
        return re.sub(r"\s*[\[({<] ?(?:dot|\.) ?[\])}>]\s*| dot |&#46;|\s", lambda m: "." if m[0].strip() else "", value)

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
    def _is_other(text, start, domain):
        # logo@2x.png; git@host:path, where what follows is no port, no sentence and no markup
        last = domain[0].rpartition(".")[2].lower()
        is_code = text.startswith("HEAD@", start) or (last == "so" and re.search(r"\blib", text[start : domain.end()]))
        if last in _COUNTRIES and text[start - 1 : start] != "/" and not is_code and not _NO_HOST.match(domain[0]):
            return False
        follows = text[domain.end() : domain.end() + 2]
        return last in _FILE_ENDINGS or (
            follows[:1] == ":" and follows[1:].isalpha() and text[domain.start() - 4 : domain.start()] == "git@"
        )


# ---- IP addresses
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_DOTS = re.compile(r"\.\d{1,3}\.\d{1,3}\.", re.ASCII)
# A hyphen before or after it parts two of them, or belongs to something else.
_IPV4 = re.compile(
    rf"(?<![\w.+])(?<!(?<!\d\d\.\d)(?<!\d\.\d\d)(?<!\.\d\d\d)-)(?<!\d[:/])(?:{_OCTET}\.){{3}}{_OCTET}"
    rf"(?!\w|\.\d(?!\d{{0,4}}(?: >|:))|-(?!{_OCTET}\.\d))",
    re.ASCII,
)
# As tcpdump writes two addresses with their ports. A fifth number elsewhere is one of a version or an OID.
_DUMPED = re.compile(
    rf"(?<![\w.])((?:{_OCTET}\.){{3}}{_OCTET})(?:\.[\w-]{{1,20}})? > ((?:{_OCTET}\.){{3}}{_OCTET})(?:\.[\w-]{{1,20}})?:(?!\w)",
    re.ASCII,
)
_LONGEST_DUMPED = 90
# The first colon of what may be one, and what it may be.
_FIRST_COLON = re.compile(r":(?<=[23fF][0-9A-Fa-f]{3}:)[0-9A-Fa-f:]")
_IPV6 = re.compile(
    r"[23fF][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,37}(?:\d{1,3}(?:\.\d{1,3}){3})?(?!\w|:[0-9A-Fa-f:]|\.\d(?!\d{0,4}\.?(?![\w.])))",
    re.ASCII,
)
# That of a sentence: "from 2a00::1: no answer".
_COLON_BEHIND = re.compile(r"(?:(?<=[^:])|(?<=::)):\Z")
# Elsewhere hexadecimal words before "::" (Add::, Face::b) would be addresses.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_LOCAL_UNICAST = ipaddress.ip_network("fc00::/6")
_VERSION = re.compile(
    r"(?:version|release|firmware|build|section|§|chapter|(?-i:Ver|Rev)|(?<![a-z])(?:ver|rev|oid))[.:\s#=(v\"']{0,4}\Z",
    re.IGNORECASE,
)
# Four small numbers are a version or a section more often than an address, unless something says so.
_SMALL = re.compile(r"(?:[12]?\d\.){3}[12]?\d")
_GOES_ON = re.compile(r"\.\d", re.ASCII)
_PORT = re.compile(r":\d{2,5}(?![\w:])", re.ASCII)
_IP_WORD = re.compile(r"(?:\bip|ipv4|host\w*|addr\w*|from|server|client|ping|peer|dns|gateway|//|@)[\W]{0,4}\Z", re.IGNORECASE)


def _is_version(text, match):
    start = match.start()
    if _GOES_ON.match(text, match.end()):
        dumped = _DUMPED.search(text, max(0, start - _LONGEST_DUMPED), start + _LONGEST_DUMPED)
        is_sure = dumped and (text.endswith("IP ", 0, dumped.start()) or not all(map(_SMALL.fullmatch, dumped.groups())))
        return not (is_sure and start in (dumped.start(1), dumped.start(2)))
    before = (text, max(0, start - 14), start)
    is_small = _SMALL.fullmatch(match[0]) and not _PORT.match(text, match.end())
    return bool(_VERSION.search(*before) or (is_small and not _IP_WORD.search(*before)))


class IpAddress:
    """Finds public IPv4 and IPv6 addresses; private, local and documentation ranges name nobody."""

    def __init__(self, with_private=False):
        self.with_private = with_private

    def find(self, view):
        """Yields (start, end, "ip")."""
        text = view.text
        for dots in _DOTS.finditer(text):
            match = _IPV4.search(text, max(0, dots.start() - 3), dots.end() + 14)
            if match and match.start() < dots.start() and self._is_meant(match[0]) and not _is_version(text, match):
                yield match.start(), match.end(), "ip"
        done = 0
        for colon in _FIRST_COLON.finditer(text):
            match = _IPV6.match(text, colon.start() - 4) if colon.start() - 4 >= done else None
            if match:
                done = match.end()
                before = text[match.start() - 1] if match.start() else " "
                stop = done - bool(_COLON_BEHIND.search(match[0]))
                if not (before.isalnum() or before in "_:.") and self._is_meant(text[match.start() : stop]):
                    yield match.start(), stop, "ip"

    @staticmethod
    def normal(value):
        """Returns an address in its shortest form."""
        return ipaddress.ip_address(plain(value)).compressed

    def _is_meant(self, address):
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if parsed.version == 6 and parsed not in _GLOBAL_UNICAST:
            return self.with_private and parsed in _LOCAL_UNICAST
        return self.with_private or parsed.is_global


# ---- payment cards and accounts
# Groups of digits with the same separator between them, once or twice.
_CARD = bounded(r"\d{4}([ ._/-]{1,2})\d{4}\1\d{4}\1\d{3,4}(?:\1\d{3})?|3\d{3}([ ._/-]{1,2})\d{6}\2\d{4,5}|\d{12,19}")
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
            # A little more than the run, for what may not follow it.
            for match in _CARD.finditer(text, start, end + 2):
                digits = compact(match[0])
                is_card = _ISSUERS.fullmatch(digits) or (
                    _ISSUERS_NAMED.fullmatch(digits) and _CARD_WORD.search(text, max(0, match.start() - 40), match.start())
                )
                if is_card and luhn(digits):
                    yield match.start(), match.end(), "credit_card"

    @staticmethod
    def normal(value):
        """Returns the digits of a card."""
        return compact(value)


def luhn(digits):
    """Whether the last digit is Luhn's check digit of the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) << (place & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


_IBAN = re.compile(r"[A-Za-z]{2}\d{2}(?:[ .-]?[A-Za-z0-9]{4}){2,7}(?:[ .-]?[A-Za-z0-9]{1,3})?(?!\w)", re.ASCII)
# Before a run of digits: the country, the check digits, the letters of a bank, maybe the word itself.
_BEFORE_IBAN = re.compile(r"(?<![A-Za-z0-9_-])(?:iban)?(?=[a-z]{2}\d\d)", re.ASCII | re.IGNORECASE)


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
        text, done = view.text, 0
        for run, end in view.runs:
            if end - run < 9:
                continue
            before = _BEFORE_IBAN.search(text, max(done, run - 14), run + 4)
            match = _IBAN.match(text, before.end()) if before else None
            if not match:
                continue
            done = match.end()
            # In running text a word may follow: try shorter ones, group by group.
            end = match.end()
            while end - match.start() >= 15:
                if self._is_valid(compact(text[match.start() : end])):
                    yield match.start(), end, "iban"
                    break
                end = max(text.rfind(mark, match.start(), end) for mark in " .-")

    @staticmethod
    def normal(value):
        """Returns an IBAN without separators, in capitals."""
        return compact(value)


# ---- street addresses
_NAME = r"(?:[A-Z][\w'’.-]{0,24}|of|de|la|del|the|\d{1,3}(?:st|nd|rd|th|ST|ND|RD|TH)) "
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|Parkway|Pkwy"
    "|Highway|Hwy|Circle|Cir|Trail|Trl|Crescent|Close|Alley|Plaza|Row|Mews|Gardens|Grove|Hill|Ridge|Walk|Heights|Turnpike|Expressway|Freeway|STREET|AVENUE|AVE|ROAD|BOULEVARD|BLVD"
)
_ENGLISH = (
    rf"[0-9]{{0,4}}[A-Za-z]? (?=[A-Zdlot1-9])(?:{_NAME}){{1,4}}(?:{_STREETS})\b\.?"
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


# A year, a table, a page before "3rd Place".
_RANK = re.compile(r"\d{1,4} \d{1,3}(?:st|nd|rd|th) (?:Place|Row|Circle|Court|Square|Close)\.?", re.IGNORECASE)
_BEFORE_RANK = re.compile(r"(?<!\w)(?:in|table|chapter|page|figure|section|on|season|round|volume) \Z", re.IGNORECASE)


class StreetAddress:
    """Finds street addresses with a house number, by the rules of English, German, Dutch, Swedish, French, Spanish,
    Italian and Portuguese. Addresses have no check digits: what rules can't tell from other text stays."""

    def find(self, view):
        """Yields (start, end, "address")."""
        text = view.text
        for places, pattern in ((view.numbers, _NUMBERED), (view.romance, _ROMANCE)):
            done = 0
            for place in places:
                match = pattern.match(text, place) if place >= done else None
                if match and not (_RANK.fullmatch(match[0]) and _BEFORE_RANK.search(text, max(0, place - 9), place)):
                    done = match.end()
                    yield place, done, "address"
        for number in filter(None, (_HOUSE_NUMBER.match(text, place - 1) for place in view.street_numbers)):
            place = number.start()
            if text.endswith(_GERMANIC_ENDS, max(0, place - 8), place):
                match = _GERMANIC.search(text, max(0, place - 80), place)
                if match:
                    yield match.start(), number.end(), "address"

    @staticmethod
    def normal(value):
        """Returns an address in small letters without commas, with single spaces."""
        return " ".join(re.sub(r"[,.]", " ", plain(value)).casefold().split())
