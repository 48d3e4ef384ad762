"""Credentials in text: keys of known services, private key blocks, and values that their place gives away.

Such a value stands behind a name (`password = "..."`, `DB_PASSWORD=...`, `<password>...</password>`, `--password ...`), in a
header, in the address of a service, or in a command. Whether it is a credential or stands in for one is asked of the value.
"""

import base64
import binascii
import re

from llmos_jax.data.clean.randomness import is_random

# literal -> pattern that holds it. A text without the literal is not searched.
_KNOWN = {
    "AKIA": r"AKIA[0-9A-Z]{16}",
    "ASIA": r"ASIA[0-9A-Z]{16}",
    "ghp_": r"ghp_[0-9A-Za-z]{36}",
    "gho_": r"gho_[0-9A-Za-z]{36}",
    "ghu_": r"ghu_[0-9A-Za-z]{36}",
    "ghs_": r"ghs_[0-9A-Za-z]{36}",
    "ghr_": r"ghr_[0-9A-Za-z]{36,76}",
    "github_pat_": r"github_pat_[0-9A-Za-z_]{82}",
    "glpat-": r"glpat-[0-9A-Za-z_-]{20,64}",
    "xoxb-": r"xoxb-[0-9A-Za-z-]{20,120}",
    "xoxp-": r"xoxp-[0-9A-Za-z-]{20,120}",
    "xoxa-": r"xoxa-[0-9A-Za-z-]{20,120}",
    "xapp-": r"xapp-[0-9A-Za-z-]{20,120}",
    "hooks.slack.com/services/": r"(?:https://)?hooks\.slack\.com/services/[0-9A-Za-z/]{30,80}",
    "sk_live_": r"sk_live_[0-9A-Za-z]{16,128}",
    "rk_live_": r"rk_live_[0-9A-Za-z]{16,128}",
    "sk_test_": r"sk_test_[0-9A-Za-z]{16,128}",
    "whsec_": r"whsec_[0-9A-Za-z]{24,64}",
    "sk-ant-": r"sk-ant-[0-9A-Za-z_-]{32,128}",
    "sk-proj-": r"sk-proj-[0-9A-Za-z_-]{32,180}",
    "sk-svcacct-": r"sk-svcacct-[0-9A-Za-z_-]{32,180}",
    "sk-or-v1-": r"sk-or-v1-[0-9a-f]{48,64}",
    "sk-": r"sk-(?!ant-|proj-)[0-9A-Za-z]{32,64}",
    "hf_": r"hf_[0-9A-Za-z]{34}",
    "gsk_": r"gsk_[0-9A-Za-z]{52}",
    "AIza": r"AIza[0-9A-Za-z_-]{35}",
    "ya29.": r"ya29\.[0-9A-Za-z_-]{20,200}",
    "GOCSPX-": r"GOCSPX-[0-9A-Za-z_-]{28}",
    "SG.": r"SG\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}",
    "npm_": r"npm_[0-9A-Za-z]{36}",
    "pypi-": r"pypi-AgE[0-9A-Za-z_-]{50,250}",
    "dckr_pat_": r"dckr_pat_[0-9A-Za-z_-]{27}",
    "hvs.": r"hvs\.[0-9A-Za-z_-]{24,120}",
    "dop_v1_": r"dop_v1_[0-9a-f]{64}",
    "shpat_": r"shpat_[0-9a-fA-F]{32}",
    "EAAC": r"EAAC[0-9A-Za-z]{30,250}",
    "key-": r"key-[0-9a-f]{32}",
    "dapi": r"dapi[0-9a-f]{32}",
    ":AA": r"[0-9]{8,10}:AA[0-9A-Za-z_-]{33}",
    "AGE-SECRET-KEY-1": r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
    # A signed token: three parts of base64, the first of which is a JSON object.
    "eyJ": r"eyJ[0-9A-Za-z_-]{8,2000}=*\.eyJ[0-9A-Za-z_-]{8,4000}=*\.[0-9A-Za-z_-]{20,1000}=*",
}
_PRIVATE_KEY = "-----BEGIN "
_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?)-----")
# What tells a key from its mention: a line by lot, or between both marks nothing but lines. The lines of one without an end.
_KEY_BODY, _SHORT_BODY = re.compile(r"[0-9A-Za-z+/]{24,}+"), re.compile(r"[0-9A-Za-z+/=\r\n\t\"',\\]{6,300}")
_KEY_LINES = re.compile(
    r"(?:\s?[A-Z][\w-]{2,20}: [^\n]{1,100}|[\s\"'+,\\]{1,12}+(?:n(?=\S{20}))?[0-9A-Za-z+/=]{20,}+){0,400}+", re.ASCII
)
_BEFORE_BODY, _LONGEST_KEY = 300, 20_000
# The last @ before the host ends the password: people write one into it unescaped.
_URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/\"'<>]{3,200})@(?=[\w.\[-])")

# ---- names that say what the value behind them is
_NAMES = ("passw", "passphrase", "pwd", "secret", "credential", "senha", "kennwort", "mot de passe", "wachtwoord")
_NAMES += ("passcode", "pass", "token", "key")
# A view's small letters are ASCII, with a ? for each other letter; names without any are looked for in the text.
_ACCENTED_NAMES = ("contrase?a", "l?senord", "has?o")
_OTHER_NAMES = ("пароль", "Пароль", "ПАРОЛЬ", "密码")
# What was put in a credential's place is no name of what follows, as of a port.
_OWN_LABEL = re.compile(r"(?<!\w)\[SECRET(?:-[b-t]{12}\]|\](?! ?=|: ))")
# A key needs a word before it that says whose.
_KEY_OF = re.compile(r"(?:api|access|private|auth|secret|encryption|master|account|client|signing|deploy|service|aes)[ _-]?\Z")
# The rest of a name: what may go on in the same word, and what says that the value is something about the credential.
_REST = re.compile(r"([a-z]{1,12}+|[A-Z]{1,12}(?![a-z])|)([\w-]{0,24})", re.ASCII)
_GOES_ON = frozenset(("", "s", "ord", "ords", "d", "ort", "key", "keys", "token", "value", "phrase", "text"))
_IS_ABOUT = re.compile(
    r"(?:hash|hashed|ids?|type|name|file|path|dir|url|uri|endpoint|field|label|length|len|size|count|policy|prefix|suffix|regex|pattern"
    r"|ref|expires|expiry|ttl|index|usage|mode|format|enc|required|enabled|algorithm|class|hint|prompt|title|text)[_-]?\Z",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(
    r"(?:\\?[\"'`])?\]?(?:(?P<xml>>)|(?P<space> {1,3}(?=[^\s:=]))|\s{0,3}(?::\s?[A-Za-z_]\w{0,20}(?: (?==[^=])|(?==[\"'])))?"
    r"(?P<sign>=>|:=|=(?!=)|:(?!:))[ \t]{0,3})",
    re.ASCII,
)
_OPTION = re.compile(r"(?<![\w-])--[\w-]{0,28}\Z")
# A line of a shell script or an .env file, up to its value; it may be a comment.
_SETTING = re.compile(r"\s*(?:[#;] ?)?(?:export |set |ENV )?[A-Z][A-Z0-9_]*=|(?:export )?[a-z][\w-]*=", re.ASCII)
_TAG = re.compile(r"<[\w:-]{0,39}\Z")
_PROSE_IS = re.compile(
    r"((?:of|for|to) (?:[\w'-]{1,20} ){1,5})?(?:is|was|=):?(?: |[ \t]{0,2}\r?\n(?:[ \t]{0,8}\r?\n)?[ \t]{0,8})", re.IGNORECASE
)
# `Password:` and its value alone in the next line.
_NEXT_LINE = re.compile(r"[ \t]{0,8}\r?\n(?:[ \t]{0,8}\r?\n)?[ \t]{0,8}(\S{6,100})[ \t]{0,8}(?=\r?\n|\Z)")
# A field of such a name holds nothing but a password. `pass` is also what a test does, and a way through a loop.
_FIELD = re.compile(
    r"(?:\A|_)(?:pass(?:word|wd|phrase|code|wort)|pwd|kennwort|mot_de_passe|contrase.a|senha|wachtwoord|пароль|密码|(pass))(?:_?\d{1,2})?\Z",
    re.IGNORECASE,
)
_LONG_PASS = 16
_PASS = re.compile(r"[_-]?\d?", re.ASCII)
_VALUE = re.compile(r"[\"'`\]\\]{0,3}\s{0,3}(?::=|=>|[:=])[ \t\"'`\\]{0,4}([^\s\"'`]{6,100})")
# Whose it is: what stands before `pass`, and the field beside it.
_ACCOUNT = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:db|database|my|mysql|pg|postgres\w{0,3}|sql|mongo\w{0,2}|redis|mq|rabbit\w{0,2}"
    r"|smtp|imap|pop3?|e?mail|s?ftp|ssh|ldap|user|usr|login|root|admin|auth|http|proxy|wifi|wlan|vpn|key|keystore|store|cert|git"
    r"|master|sudo|account|server|client|service|registry|wp)\d{0,2}[ ._-]?\Z",
    re.ASCII,
)
_BESIDE = re.compile(
    r"(?<![a-z])(?:user(?:[_-]?name)?|usr|login|account|e-?mail|[a-z]{0,9}[_-]?(?:user|host)|uid|root|admin|db|smtp|ftp)"
    r"[\"'`\]\\]{0,3}\s{0,3}[:=]",
    re.IGNORECASE,
)
_ENCLOSED = re.compile(r"[^\s()]{6,100}\)")
_QUOTED = re.compile(r"[rbfu]?\\?([\"'`])((?:(?!\1)[^\s\\]|\\[^\s\"'`]){6,300})\\?\1")
_BARE = re.compile(r"[^\s\"'`<]{6,300}")
_OTHER_FIELD = re.compile(r"[;&,][\w ]{1,30}=|[,;]?\\?[\"'`]|\\n")
_CLOSERS = {")": "(", "]": "[", "}": "{", ">": "<"}

# ---- values that are none
_STAND_IN = re.compile(
    r"\$[\{\(]\w|\A\$[a-z_]\w*\Z|%\(|\A%\w|\{\{ ?\w+ ?\}\}|\A\{.*\}\Z|\A<.*>|\A\[.*\]\Z|#\{\w+\}|<%|\.\.\.|\*\*\*|xxxx|\A@.*@\Z"
    r"|example|change[_-]?(?:me|it|this)"
    r"|place[_-]?holder|(?<![a-z])your(?![a-z])"
    r"|replace[_-]|insert[_-]|(?<![a-z])enter[_-]|redacted|(?<![a-z])dummy|(?<![a-z])sample"
    r"|(?<![a-z])fake"
    r"|[_-]here\b|process\.env|os\.environ|getenv",
    re.IGNORECASE,
)
# Letters that are nothing but these say no secret. Joined words can be split in many ways: `_is_of_no_words` tries each once.
_NO_WORDS = frozenset(
    re.findall(
        r"\w+",
        "my your the some user db new old test api auth access super secret secrets password passwords passwort passwd"
        " passphrase pwd pass token tokens key keys value none null nil undefined true false string str text bytes int required"
        " optional default empty hidden not real foo bar baz abc todo name file username varchar here it me is input prompt"
        " confirm repeat credential credentials client private sha md hmac base bit bits rfc utf aes pbkdf crypt bcrypt",
    )
)
_LOOKED_AT = 64
_NO_WORD_LENGTHS = tuple(sorted({len(word) for word in _NO_WORDS}))
# Calls, subscripts, references; attributes, which seldom end in a year or another number of four digits.
_ATTRIBUTE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?<!\d{4})[;,)]*\Z"
_CODE = re.compile(
    rf"[A-Za-z_][\w.]*(?:[(\[](?:[\w()\[\].*$:-]|&\w|\Z)|->|::|<)|[$&*@%!(\[{{<]|{_ATTRIBUTE}",
    re.ASCII,
)
_ATTRIBUTE = re.compile(_ATTRIBUTE, re.ASCII)
_ADDRESS, _PATH = re.compile(r"\w+://"), re.compile(r"[~.]{0,2}/\w")
_QUANTITY = re.compile(r"[\d.,]+[-_ ]?(?:[a-z]{0,12}|[A-Za-z]{0,3})|v?\d+(?:\.\d+)+\S{0,8}|0x[0-9A-Fa-f]+")
# Letters of a word that is none: words that someone joined.
_PHRASE = 16
_HARD_SYMBOL = re.compile(r"[!@#$%^&*+?~|;{}()\[\]]")

# ---- headers and commands
_AUTHORIZATION = re.compile(
    r"[\"']?\]?\s{0,2}[:=,]\s{0,2}[\"'`]?(?:(?:bearer|token|apikey|digest)\s{1,2}|(basic)\s{1,2})?([\w.~+/:-]{8,3000}=*)",
    re.IGNORECASE | re.ASCII,
)
_BEARER = re.compile(r"\bbearer ([0-9A-Za-z._~+/-]{16,3000}=*)", re.IGNORECASE | re.ASCII)
_COMMANDS = {
    "mysql": re.compile(r"mysql\w{0,8}[^\n|;&]{0,80}? -p([^\s\"']{4,100})"),
    "mariadb": re.compile(r"mariadb\w{0,8}[^\n|;&]{0,80}? -p([^\s\"']{4,100})"),
    "sshpass": re.compile(r"sshpass -p ?[\"']?([^\s\"']{4,100})"),
    "curl": re.compile(r"curl[^\n|;]{0,160}? (?:-u ?|--user[ =])[\"']?[^\s:\"']{1,64}:([^\s\"']{4,100})"),
    "wget": re.compile(r"wget[^\n|;]{0,160}? --(?:http-|ftp-)?password[ =][\"']?([^\s\"']{4,100})"),
}


class Secrets:
    """Finds credentials."""

    def __init__(self):
        self._known = {literal: re.compile(rf"(?<![0-9A-Za-z_-])(?:{p})(?![0-9A-Za-z])") for literal, p in _KNOWN.items()}

    def find(self, view):
        """Yields (start, end, "secret")."""
        text, lowered = view.text, view.lowered
        words = view.long_words  # a few percent of most texts
        for literal, pattern in self._known.items() if words else ():
            if literal in words:
                for match in pattern.finditer(text):
                    yield match.start(), match.end(), "secret"
        if _PRIVATE_KEY in text:
            yield from _private_keys(text)
        if "://" in text:
            for match in _URL_PASSWORD.finditer(text):
                if not _is_stand_in(match[1]) and not re.match(r"\d{1,5}[?#]", match[1]):
                    yield match.start(1), match.end(1), "secret"
        for name in _NAMES:
            yield from _assigned(text, lowered, lowered, name)
        if not text.isascii():
            for name in _ACCENTED_NAMES:
                yield from _assigned(text, lowered, lowered, name)
            for name in _OTHER_NAMES:
                yield from _assigned(text, lowered, text, name)
        yield from _sent(text, lowered)
        for command, pattern in _COMMANDS.items():
            if command in lowered:
                for match in pattern.finditer(text):
                    if not _is_stand_in(match[1]) and (_is_password(match[1]) or _is_phrase(match[1], 8)):
                        yield match.start(1), match.end(1), "secret"

    @staticmethod
    def normal(value):
        """Returns the value: a credential has one spelling."""
        return value


def _private_keys(text):
    place = 0
    while match := _BEGIN.search(text, place):
        place = match.end()
        end_mark = f"-----END {match[1]}-----"
        end = text.find(end_mark, place, place + _LONGEST_KEY)
        body = _KEY_BODY.finditer(text, place, min(end, place + _BEFORE_BODY) if end >= 0 else place + _BEFORE_BODY)
        if any(is_random(part[0]) for part in body) or (end >= 0 and _SHORT_BODY.fullmatch(text, place, end)):
            place = end + len(end_mark) if end >= 0 else _KEY_LINES.match(text, place).end()
            yield match.start(), place, "secret"


def _sent(text, lowered):
    """Yields what headers hold."""
    place = lowered.find("authorization")
    while place >= 0:
        match = _AUTHORIZATION.match(text, place + 13)
        if match and (_is_basic(match[2]) if match[1] else is_random(match[2]) and not _is_stand_in(match[2])):
            yield match.start(2), match.end(2), "secret"
        place = lowered.find("authorization", place + 13)
    if "bearer " in lowered:
        for match in _BEARER.finditer(text):
            if is_random(match[1]) and not _is_stand_in(match[1]):
                yield match.start(1), match.end(1), "secret"


def _is_basic(value):
    try:
        return b":" in base64.b64decode(value, validate=True)
    except binascii.Error:
        return False


def _assigned(text, lowered, names, name):
    """Yields the values behind one name, which stands in `names`: the text, or its small letters."""
    place = names.find(name)
    while place >= 0:
        found = _value_behind(text, lowered, name, place)
        end = place + len(name)
        if found:
            yield *found, "secret"
        place = names.find(name, end)


def _value_behind(text, lowered, name, place):
    """Returns (start, end) of the credential behind a name, or None."""
    if name == "key" and not _KEY_OF.search(lowered, max(0, place - 12), place):
        return None
    if name == "secret" and _OWN_LABEL.match(text, max(0, place - 1)):
        return None
    rest = _REST.match(text, place + len(name))
    if rest[1].lower() not in _GOES_ON or _IS_ABOUT.search(rest[2]):
        return None
    separator = _SEPARATOR.match(text, rest.end())
    if not separator:
        return None
    if name == "pass" and not _is_named_pass(text, place, rest, separator["sign"]):
        return None
    start, is_for_people, is_named = separator.end(), name not in ("token", "key"), True
    if separator["space"]:  # --password VALUE, the password is VALUE, password VALUE
        is_option = _OPTION.search(text, max(0, place - 30), place)
        is_statement = _PROSE_IS.match(text, start)
        is_enclosed = text[place - 1 : place] == "(" and _ENCLOSED.match(text, start)
        is_named = bool(is_option or is_statement or is_enclosed)
        if is_statement and is_statement[1] and name == "secret":
            is_named = False  # the secret of success
        if not (is_option or is_for_people):
            return None
        start, is_for_people = is_statement.end() if is_statement else start, True
    if separator["xml"]:
        end = text.find("</", start, start + 200)
        is_element = end > 0 and _TAG.search(text, max(0, place - 40), place)
        return (start, end) if is_element and _is_literal(text[start:end], is_for_people, "=") else None
    below = _NEXT_LINE.match(text, start) if separator["sign"] == ":" and name not in ("token", "key", "secret") else None
    if below:
        is_secret = _kinds(below[1]) >= 3 and not _is_stand_in(below[1]) and _is_password(below[1])
        return below.span(1) if is_secret and not _CODE.match(below[1]) else None
    quoted = _QUOTED.match(text, start)
    if quoted:
        return quoted.span(2) if _is_literal(quoted[2], is_for_people, separator["sign"]) else None
    bare = _BARE.match(text, start)
    return _bare_value(text, start, bare[0], is_for_people, is_named) if bare else None


def _is_named_pass(text, place, rest, sign):
    """Whether `pass` at a place is the name of a password: not a part of a word, nor what a test says of itself (PASS: a2)."""
    if rest[1] or not _PASS.fullmatch(rest[2]) or sign is None:
        return False
    before = text[place - 1 : place] if place else ""
    is_joined = before in ("_", "-") or (before.islower() and text[place] == "P")  # db_pass, dbPass
    if _ACCOUNT.search(text, max(0, place - 20), place):
        return True
    if (before.isalpha() and not is_joined) or (sign == ":" and text.startswith("PASS", place)):
        return False
    value = _VALUE.match(text, rest.end())
    value = value[1].rstrip(".,;:)") if value else ""
    is_drawn = len(value) >= _LONG_PASS and is_random(value)
    if is_joined:  # a pass of a compiler, of rendering
        return is_drawn
    if is_drawn or (_kinds(value) >= 3 and _HARD_SYMBOL.search(value)):
        return True
    return bool(_BESIDE.search(text, max(0, place - 60), place) or _BESIDE.search(text, rest.end(), rest.end() + 60))


def _kinds(value):
    """Returns of how many kinds the characters of a value are: small letters, capitals, digits, signs that no name has."""
    return sum((bool(re.search("[a-z]", value)), bool(re.search("[A-Z]", value)), bool(re.search("[0-9]", value)),
                bool(_HARD_SYMBOL.search(value))))  # fmt: skip


def is_all_password(name, value):
    """Whether the value of a field of metadata is a password in whole, blanks and all."""
    field = _FIELD.search(name)
    if not field or not value.strip() or _STAND_IN.search(value) or (field[1] and not _is_password(value)):
        return False
    letters = re.sub(r"[\W\d_]", "", value)
    return not letters or not _is_of_no_words(letters.lower())


def _bare_value(text, start, value, is_for_people, is_named):
    """Returns (start, end) of a value without quotes, or None."""
    line = _line_before(text, start)
    value = _trimmed(value, line)
    end = start + len(value)
    if len(value) < 6 or _is_stand_in(value):
        return None
    if text[end : end + 1] in ("", "\n", "\r") and _SETTING.fullmatch(line):
        is_secret = _is_literal(value, is_for_people, "=") and not _ATTRIBUTE.match(value)
    else:
        is_chosen = is_for_people and is_named and not _PATH.match(value)
        is_secret = not (_CODE.match(value) or _ADDRESS.match(value)) and (
            is_random(value) or (is_chosen and _is_password(value))
        )
    return (start, end) if is_secret else None


def _line_before(text, place):
    """Returns what stands before a place in its line, at most 200 characters."""
    first = max(0, place - 200)
    return text[max(first, text.rfind("\n", first, place) + 1) : place]


def _trimmed(value, before):
    """Returns a value without what follows it in its word: other fields, closing quotes and brackets, the end of a sentence."""
    other = _OTHER_FIELD.search(value)
    value = value[: other.start()] if other else value
    while value and (value[-1] in ",;:." or (value[-1] in _CLOSERS and _CLOSERS[value[-1]] in before)):
        value = value[:-1]
    return value


def _is_stand_in(value):
    """Whether a value says that another one belongs there."""
    if _STAND_IN.search(value):
        return True
    letters = re.sub(r"[\W\d_]", "", value)
    return not letters or _is_of_no_words(letters.lower())


def _is_of_no_words(letters):
    """Whether letters, at least the first of many, are words of `_NO_WORDS` joined: in one pass over the places where one may
    begin."""
    begins = {0}
    for place in range(min(len(letters), _LOOKED_AT)):
        if place in begins:
            begins.update(place + length for length in _NO_WORD_LENGTHS if letters[place : place + length] in _NO_WORDS)
    return len(letters) in begins or max(begins) >= _LOOKED_AT


def _is_literal(value, is_for_people, sign):
    """Whether what stands between quotes, or alone in a line of settings, is a credential."""
    if _is_stand_in(value) or _ADDRESS.match(value):
        return False
    if is_random(value):
        return True
    if not is_for_people or _PATH.match(value):
        return False
    # A single capitalised word behind a colon is a translation of "password"; small words joined by signs are a name.
    is_name = re.fullmatch(r"[^\W\d_]+(?:[._-][^\W\d_]+)*", value) is not None
    return _is_phrase(value, 8 if sign == "=" else _PHRASE) if is_name else _is_password(value)


def _is_phrase(value, least):
    """Whether a value is of small letters only, and longer than most words."""
    return len(value) >= least and value.isalpha() and value.islower()


def _is_password(value):
    """Whether a value is like the passwords that people choose: letters with digits or with signs that no name has."""
    if _QUANTITY.fullmatch(value) or not any(c.isalpha() for c in value):
        return False
    is_mixed = any(c.isdigit() for c in value) or bool(_HARD_SYMBOL.search(value))
    return is_mixed or is_random(value) or _is_phrase(value, _PHRASE)
