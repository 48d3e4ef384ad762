"""Credentials in text: keys of known services, private key blocks, and values that a name and their entropy give away."""

import math
import re

# literal -> pattern that starts with it. A text without the literal is not searched.
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
    "hooks.slack.com/services/": r"hooks\.slack\.com/services/[0-9A-Za-z/]{30,80}",
    "sk_live_": r"sk_live_[0-9A-Za-z]{16,128}",
    "rk_live_": r"rk_live_[0-9A-Za-z]{16,128}",
    "sk_test_": r"sk_test_[0-9A-Za-z]{16,128}",
    "whsec_": r"whsec_[0-9A-Za-z]{24,64}",
    "sk-ant-": r"sk-ant-[0-9A-Za-z_-]{32,128}",
    "sk-proj-": r"sk-proj-[0-9A-Za-z_-]{32,180}",
    "sk-": r"sk-(?!ant-|proj-)[0-9A-Za-z]{32,64}",
    "hf_": r"hf_[0-9A-Za-z]{34}",
    "AIza": r"AIza[0-9A-Za-z_-]{35}",
    "ya29.": r"ya29\.[0-9A-Za-z_-]{20,200}",
    "GOCSPX-": r"GOCSPX-[0-9A-Za-z_-]{28}",
    "SG.": r"SG\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}",
    "npm_": r"npm_[0-9A-Za-z]{36}",
    "pypi-": r"pypi-AgE[0-9A-Za-z_-]{50,250}",
    "dop_v1_": r"dop_v1_[0-9a-f]{64}",
    "shpat_": r"shpat_[0-9a-fA-F]{32}",
    "EAAC": r"EAAC[0-9A-Za-z]{30,250}",
    "key-": r"key-[0-9a-f]{32}",
    "dapi": r"dapi[0-9a-f]{32}",
    "AGE-SECRET-KEY-1": r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
    # A signed token: three parts of base64, the first of which is a JSON object.
    "eyJ": r"eyJ[0-9A-Za-z_-]{8,2000}\.eyJ[0-9A-Za-z_-]{8,4000}\.[0-9A-Za-z_-]{20,1000}",
}
_PRIVATE_KEY = "-----BEGIN "
_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?)-----")
# A block without an end is cut here: no key is longer.
_LONGEST_KEY = 20_000
_URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{1,64}:([^\s/@\"'<>]{3,128})@")

# NAME = "VALUE": names that say what the value is. A key needs a word before it that says whose.
_NAMES = ("secret", "token", "passw", "passphrase", "pwd", "credential", "key")
_KEY_OF = re.compile(r"(?:api|access|private|auth|secret|encryption|master|account|client|signing|deploy|service|aes)[ _-]?\Z")
_VALUE = re.compile(
    r"[\w-]{0,20}[\"']?\]?\s{0,3}(?:=>|:=|=|:)\s{0,3}(?:([\"'`])([^\s\"'`]{8,200})\1|([^\s\"'`,;<>(){}\[\]]{8,200})(?![(\[\w]))",
    re.ASCII,
)
_BEARER = re.compile(r"\bbearer ([0-9A-Za-z._~+/-]{20,500}=*)", re.IGNORECASE | re.ASCII)
# Bits per character over the value's own characters. English words and identifiers of these lengths stay below.
_LEAST_ENTROPY = 3.0
_UNLIKELY = re.compile(r"\$\{|\$\(|%\(|\.\.\.|\*\*\*|xxx|example|changeme|placeholder|your[_-]|process\.env|os\.environ", re.I)


class Secrets:
    """Finds credentials."""

    def __init__(self):
        self._known = {literal: re.compile(rf"(?<![0-9A-Za-z_-])(?:{p})(?![0-9A-Za-z])") for literal, p in _KNOWN.items()}

    def find(self, view):
        """Yields (start, end, "secret")."""
        text = view.text
        # Literals are looked for in long words alone, an eighth of most texts.
        words = "\n".join([word for word in text.split() if len(word) > 19])
        for literal, pattern in self._known.items() if words else ():
            if literal in words:
                for match in pattern.finditer(text):
                    yield match.start(), match.end(), "secret"
        if _PRIVATE_KEY in text:
            yield from _private_keys(text)
        if "://" in words:
            for match in _URL_PASSWORD.finditer(text):
                yield match.start(1), match.end(1), "secret"
        for name in _NAMES:
            yield from _assigned(text, view.lowered, name)
        if "bearer " in view.lowered:
            for match in _BEARER.finditer(text):
                if _is_random(match[1]):
                    yield match.start(1), match.end(1), "secret"


def _private_keys(text):
    place = 0
    while match := _BEGIN.search(text, place):
        end_mark = f"-----END {match[1]}-----"
        limit = match.end() + _LONGEST_KEY
        end = text.find(end_mark, match.end(), limit)
        place = end + len(end_mark) if end >= 0 else min(limit, len(text))
        yield match.start(), place, "secret"


def _assigned(text, lowered, name):
    place = lowered.find(name)
    while place >= 0:
        end = place + len(name)
        match = _VALUE.match(text, end) if name != "key" or _KEY_OF.search(lowered, max(0, place - 12), place) else None
        if match:
            group = 2 if match[2] else 3
            # Without quotes it may be code: a name with a number in it is no secret.
            if _is_random(match[group], least_changes=1 if match[2] else 3):
                yield match.start(group), match.end(group), "secret"
        place = lowered.find(name, end)


def _is_random(value, least_changes=1):
    """Whether a value looks drawn by lot: letters and digits take turns, none of them often, no word for a stand-in."""
    classes = [c.isdigit() for c in value if c.isalnum()]
    changes = sum(a != b for a, b in zip(classes, classes[1:], strict=False))
    if changes < least_changes or _UNLIKELY.search(value):
        return False
    counts = [value.count(c) for c in set(value)]
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts)
    return entropy >= min(_LEAST_ENTROPY, math.log2(len(value)) - 0.6)
