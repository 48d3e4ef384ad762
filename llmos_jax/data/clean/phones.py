"""Phone numbers: patterns find what may be one, `phonenumbers` (Google's libphonenumber) says what is.

Every pattern has bounded, possessive repetitions and is only asked at runs of digits, so the time is linear in the text.
"""

import re

from llmos_jax.data.clean.pii_view import compact, plain
from llmos_jax.errors import ConfigError

# Nothing is tried twice (possessive throughout): digits, then groups of digits with or without parentheses. A group that ends
# in letters (24h) is none of them, but for an extension. Behind a comma that stands after digits a number begins only where
# four precede it: 1,415,555.
_DIGITS = r"\d{1,17}+(?!(?!x\d)\w)\)?+"
_NUMBER = rf"(?:\(?\+|(?<!\d\.)(?<!(?<!\d{{4}})(?<=\d),)\(?){_DIGITS}(?:[ .\-/]{{0,3}}+\(?+{_DIGITS}){{0,7}}+"
_PHONE, _NEXT_PHONE = re.compile(rf"(?<!\w)(?<!\d[-/]){_NUMBER}", re.ASCII), re.compile(_NUMBER, re.ASCII)
# Two numbers and no groups of one, if there are seven digits on both of its sides.
_BORDER_OF_TWO = re.compile(r" ?/ ?| - ")
# The number of an item: 1) 020 7946 0958. In (11) 91234-5678 it is an area's.
_ITEM = re.compile(r"[1-9]\d?\) ?(?=[\d(])|\([1-9]\d?\) ?(?=0)", re.ASCII)
# Where a group may be none of the number's: opening hours, postcodes. Some of these part more than groups.
_SEPARATOR = re.compile(r"[ .\-/(]++(?=\d)", re.ASCII)
_WIDE_SEPARATOR = re.compile(r" (?:[-/] |(?=\())|(?:(?<=[.-]\d\d)|(?<=[.-]\d{3})|(?<=[.-]\d{4})) (?=\d)", re.ASCII)
# A form that no other number has, to be found among others: behind a date, an item's number, a field's comma, another one.
_NORTH_AMERICAN = re.compile(
    r"[(2-9](?<![\w+=-].)(?<!\d\..)(?<!(?<!\d{4})/.)(?:(?<=\()[2-9]\d\d\) ?|(?<!\()\d\d-)[2-9]\d\d-\d{4}(?!\w|[-.]\d)", re.ASCII
)
# What stands between two numbers of which the first is known to be one.
_BETWEEN = re.compile(r"\s{0,2}(?:[,;/|&]|or|and|und|oder|et|ou|y|e)\s{0,2}|\s-\s", re.IGNORECASE)
# The label that stands for one is no such word, and ends its reach.
_PHONE_WORD = re.compile(
    r"(?:(?<![^\W_])(?!(?<=\[)(?-i:PHONE)\])(?:t[eé]ls?|(?:cell|work|home|office|mobile|user|tele)?phones?|(?<!-)(?-i:[Pp]h|PH)(?!/)|mobile?|mob|cell|fax|call|dial|whatsapp|sms|text"
    r"|ring|t[eé]l[eé]phone|tel[eé]fono|(?:mobil)?telefon|telefoon|telefone|celular|m[oó]vil|handy|cellulare|portable|hotline|contact"
    r"|ruf(?=n)|msisdn|тел|телефон|моб|мобильный)(?:[ _-]?(?:numbers?|num|nummer|no|nr))?(?![^\W_])"
    r"|☎|📞|电话|手机|電話)[\W_]{0,4}(?:(?!(?<=\[)(?-i:[A-Z_]{2,11})\])\w{1,8}\W{1,3}){0,3}\Z",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"[-./]\d", re.ASCII)
# A date, or a number with decimals.
_DATE = re.compile(
    r"(?:19|20)\d\d[-./ ][01]?\d[-./ ][0-3]?\d(?:\D.*)?|[0-3]?\d[-./ ][0-3]?\d[-./ ](?:19|20)\d\d(?:\D.*)?"
    r"|(?:19|20)\d\d\W{1,3}(?:19|20)\d\d|\d\.\d+|\d\.\d{5,}\D.*"
)
# What parts a number from another one beside it.
_ENDS_CELL = "\n\r\t|)"
_NEIGHBOUR = re.compile(rf"\d[^\w{_ENDS_CELL}]\Z")
# Forms that say by themselves which country's number they hold.
_NATIONAL_FORMS = re.compile(
    r"(?P<US>(?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d(?P<u>[ .-])[2-9]\d\d(?P=u)\d{4}))"
    r"|(?P<FR>0[1-9](?P<f>[ .-])\d\d(?P=f)\d\d(?P=f)\d\d(?P=f)\d\d)|(?P<RU>8[ -]?\(\d{3}\)[ -]?\d{3}[ -]\d\d[ -]\d\d)"
    r"|(?P<KR>01[016-9]-\d{3,4}-\d{4})|(?P<JP>0[5789]0-\d{4}-\d{4})|(?P<CN>1[3-9]\d(?P<c>[ -])\d{4}(?P=c)\d{4})"
)


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
        text, place, last = view.text, 0, 0
        for start, end in view.runs:
            place = max(place, start - 5)
            match = _PHONE.search(text, place, end + 2)
            while match and match.start() < end:
                match, place = _first_of_two(text, match, end)
                stop = self._stop(text, match, last)
                if stop:
                    yield match.start(), stop, "phone"
                    last, place = stop, place if stop == match.end() else stop
                elif wide := _digits(match[0]) > 7 and _WIDE_SEPARATOR.search(text, match.start(), match.end()):
                    place = min(place, wide.end())
                match = _NEXT_PHONE.match(text, place, end + 2) or _PHONE.search(text, place, end + 2)
            for match in _NORTH_AMERICAN.finditer(text, max(last, start - 1), end + 2):
                if self._is_valid(match[0], "US"):
                    last = match.end()
                    yield match.start(), last, "phone"

    def normal(self, value):
        """Returns a number as +41446681800: in the region of its form, else in the first of `regions` where it is written so.

        Of a number that several countries write alike, the first country's is taken.
        """
        number = _without_trunk(plain(value))
        regions = [None] if number[:1] == "+" else [_region_of(number)]
        if regions == [None] and number[:1] != "+":
            regions = sorted(self.regions, key=lambda region: not self._is_written_so(number, region))
        for region in regions:
            if self._is_valid(number, region):
                return self._library.format_number(self._library.parse(number, region), self._library.PhoneNumberFormat.E164)
        return compact(value)

    def _stop(self, text, match, last):
        """Returns where the number ends that a match begins with, None where it begins with none: what follows may be hours."""
        start = match.start()
        if _digits(match[0]) < 7 or _DATE.fullmatch(match[0]):
            return None
        is_named = bool((last and _BETWEEN.fullmatch(text, last, start)) or _PHONE_WORD.search(text, max(0, start - 40), start))
        is_sure = is_named or match[0].startswith(("+", "(+"))
        return next((stop for stop in _stops(match, is_sure) if self._is_phone(text, start, stop, is_named)), None)

    def _is_phone(self, text, start, stop, is_named):
        digits = _digits(text[start:stop])
        if not 7 <= digits <= 17:
            return False
        number = _without_trunk(text[start:stop])
        if number[0] == "+":
            return self._is_valid(number, None)
        if _DATE.fullmatch(number) or (not is_named and text[max(0, start - 1) : start] in ("=", ".")):
            return False
        region = _region_of(number)
        if region:
            return self._is_valid(number, region)
        if is_named:
            return any(self._is_valid(number, region) for region in self.regions)
        is_alone = not _NEIGHBOUR.search(text, max(0, start - 2), start) and (
            text[stop : stop + 1] in _ENDS_CELL or not text[stop + 1 : stop + 2].isdigit()
        )
        return (
            number[0] in "0("
            and digits >= 9
            and is_alone
            and any(self._is_written_so(number, region) for region in self.regions)
        )

    def _is_written_so(self, number, region):
        """Whether the groups of a number are those of its country's own way of writing it."""
        if number.isdigit() or re.search(r"[-.]", number):
            return False
        library = self._library
        try:
            parsed = library.parse(number, region)
        except library.NumberParseException:
            return False
        if not library.is_valid_number(parsed):
            return False
        own = library.format_number(parsed, library.PhoneNumberFormat.NATIONAL)
        return re.findall(r"\d+", own) == re.findall(r"\d+", number)

    def _is_valid(self, number, region):
        library = self._library
        try:
            return library.is_valid_number(library.parse(number, region))
        except library.NumberParseException:
            return False


def _first_of_two(text, match, end):
    """Returns (the match of the first number in what may be two of them, where the next one may begin)."""
    item = _ITEM.match(match[0])
    if item:
        match = _NEXT_PHONE.match(text, match.start() + item.end(), end + 2) or match
    start = match.start()
    for border in _BORDER_OF_TWO.finditer(text, start, match.end() + 3):
        if _digits(text[start : border.start()]) >= 7 <= _digits(text[border.end() : min(end, border.end() + 25)]):
            return _NEXT_PHONE.match(text, start, border.start()) or match, border.end()
    return match, match.end()


def _stops(match, is_sure):
    """Yields where a number may end that a match begins with: all of it, without its last group, without two, ...

    Of what may be no number at all only what stands before a wide separator, and nothing where more groups follow.
    """
    text, start, end = match.string, match.start(), match.end()
    if is_sure or not _GOES_ON.match(text, end):
        yield end
    if is_sure:
        yield from [separator.start() for separator in _SEPARATOR.finditer(text, start + 1, end)][::-1]
    elif wide := _WIDE_SEPARATOR.search(text, start, end):
        yield wide.start()


def _digits(value):
    return sum(map(str.isdigit, value))


def _without_trunk(number):
    """Returns a number with + for 00, and without the trunk 0 that some write behind the country, as +44 (0)20."""
    number = number.replace("(+", "+", 1) if number.startswith("(+") else number
    if number.startswith(("+", "00")):
        number = number.replace("(0)", "", 1)
        return f"+{number[2:]}" if number.startswith("00") else number
    return number.replace("(0)", "0", 1)


def _region_of(number):
    form = _NATIONAL_FORMS.fullmatch(number)
    return form and next(name for name, value in form.groupdict().items() if value and name.isupper())
