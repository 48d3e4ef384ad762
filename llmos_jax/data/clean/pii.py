"""The step that takes personal data and credentials out of texts and puts labels or pseudonyms in their place."""

import dataclasses
import functools
import hashlib
import hmac
import pathlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean import pii_patterns as patterns
from llmos_jax.data.clean.national_ids import NationalIds
from llmos_jax.data.clean.phones import Phone
from llmos_jax.data.clean.pii_view import views
from llmos_jax.data.clean.secrets import Secrets, is_all_password
from llmos_jax.data.clean.steps import Transform, register
from llmos_jax.errors import ConfigError

# In order of precedence: where two overlap, the text of both goes under the name of the first.
CLASSES = ("secret", "iban", "credit_card", "national_id", "email", "ip", "phone", "address", "person")
DEFAULT_CLASSES = tuple(name for name in CLASSES if name != "person")
_RANK = {name: rank for rank, name in enumerate(CLASSES)}
_SHORTEST_SECRET_BYTES = 16


class Finding(NamedTuple):
    """A piece of personal data: text[start:end], its class, and its kind (of a national id the country's name for it)."""

    start: int
    end: int
    name: str
    kind: str


@register
@dataclasses.dataclass(frozen=True)
class Pii(Transform):
    """Replaces personal data. Everything cut out is reported masked: no output holds it."""

    step: str = setting("pii", help="step", choices=("pii",))
    classes: tuple[str, ...] = setting(DEFAULT_CLASSES, help="what is looked for", choices=CLASSES)
    replacement: str = setting(
        "label", help="[EMAIL], or one that is the same wherever the datum is", choices=("label", "pseudonym")
    )
    secret_file: str | None = setting(None, help="file with the key of pseudonyms, at least 16 bytes; who has it can link them")
    allow: tuple[str, ...] = setting((), help="regular expressions of data that may stay, matched in whole")
    allow_file: str | None = setting(None, help="file of data that may stay, one a line")
    with_private_ips: bool = setting(False, help="take addresses of private networks, too")
    phone_regions: tuple[str, ...] = setting(
        ("US", "GB", "DE", "FR", "ES", "IT", "NL", "BR", "IN", "AU", "JP", "MX", "PL", "SE", "CH")
        + ("CN", "RU", "KR", "AT", "BE", "IE", "PT", "TR", "ZA"),
        help="countries whose own way of writing phone numbers is tried",
    )

    libraries = ("phonenumbers", "python-stdnum")
    version = 5

    def __post_init__(self):
        super().__post_init__()
        if self.replacement == "pseudonym" and self.secret_file is None:
            raise ConfigError(
                "pii.replacement=pseudonym needs pii.secret_file: a file of random bytes that you keep to yourself."
            )
        for expression in self.allow:
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"pii.allow: {expression!r} is no regular expression ({error}).") from None

    def inputs(self):
        """Returns hashes of the files that decide what is replaced, and by what."""
        files = {"allow_file": self.allow_file, "secret_file": self.secret_file}
        return {name: hashlib.sha256(_read(name, file)).hexdigest() for name, file in files.items() if file is not None}

    def transform(self, documents, findings=None):
        """Returns (texts without personal data, {"pii_CLASS": how many}, masked samples of what was cut out)."""
        scan = scanner(self)
        texts, counts, removed = [], {name: np.zeros(len(documents), np.int32) for name in self.classes}, []
        for number, (text, found) in enumerate(zip(documents.texts, scan.find_all(documents.texts), strict=True)):
            for finding in found:
                counts[finding.name][number] += 1
            texts.append(scan.replace(text, found))
            removed.append("\n".join(f"{f.kind}: {masked(text[f.start : f.end], f.name)}" for f in found) or None)
        return texts, {f"pii_{name}": values for name, values in counts.items()}, removed

    def protect(self, texts, names=None):
        """Returns texts without personal data: of documents removed before their turn came, of metadata, of messages.

        names: of each text the name of its field, or "": a number behind "phone" is one where it is none by itself.
        """
        scan = scanner(self)
        names = names or [""] * len(texts)
        before = [f"{name}: " if name else "" for name in names]
        found = scan.find_all([name + text for name, text in zip(before, texts, strict=True)])
        found = [_behind(*each) for each in zip(before, texts, found, strict=True)]
        return [scan.replace(text, scan.of_field(name, text, each)) for name, (text, each) in zip(names, found, strict=True)]


def _behind(name, text, findings):
    """Returns (text, what was found in it) for findings in `name` + `text`."""
    start = len(name)
    return text, [f._replace(start=max(0, f.start - start), end=f.end - start) for f in findings if f.end > start]


@functools.lru_cache(maxsize=8)
def scanner(step):
    """Returns the Scanner of the settings of a `Pii` step; made once per process."""
    return Scanner(step)


class Scanner:
    """Finds and replaces what the settings of a `Pii` step name.

    Raises ConfigError when a library is missing or a file can't be read.
    """

    def __init__(self, step):
        makers = {
            "secret": Secrets,
            "iban": patterns.Iban,
            "credit_card": patterns.CreditCard,
            "national_id": NationalIds,
            "email": patterns.Email,
            "ip": functools.partial(patterns.IpAddress, step.with_private_ips),
            "phone": functools.partial(Phone, step.phone_regions),
            "address": patterns.StreetAddress,
            "person": _Names,
        }
        self._detectors = {name: makers[name]() for name in CLASSES if name in step.classes}
        self._secret = None
        if step.replacement == "pseudonym":
            self._secret = _read("secret_file", step.secret_file).strip()
            if len(self._secret) < _SHORTEST_SECRET_BYTES:
                raise ConfigError(f"pii.secret_file={step.secret_file} has {len(self._secret)} bytes; the least is 16.")
        self._allowed = [re.compile(expression) for expression in step.allow]
        lines = _read("allow_file", step.allow_file).decode("utf-8").splitlines() if step.allow_file else ()
        values = list(filter(None, map(str.strip, lines)))
        self._allowed_values = {name: {self._normal(name, value) for value in values} for name in self._detectors}

    def find(self, text):
        """Returns the Findings in `text` in order, none overlapping another."""
        return next(self.find_all([text]))

    def find_all(self, texts):
        """Yields the Findings in each text: many at once take less time, short ones much less."""
        for text, view in zip(texts, views(texts), strict=True):
            yield self._find(text, view)

    def of_field(self, name, text, findings):
        """Returns the Findings of a field of metadata: what is named a password is one with all its blanks."""
        if name and "secret" in self._detectors and is_all_password(name, text) and not self._is_allowed("secret", text):
            return [Finding(0, len(text), "secret", "secret")]
        return findings

    def _find(self, text, view):
        found = [
            Finding(start, end, name, kind)
            for name, detector in self._detectors.items()
            for start, end, kind in detector.find(view)
        ]
        found.sort()
        joined = []
        for finding in found:
            if self._is_allowed(finding.name, text[finding.start : finding.end]):
                continue
            if joined and finding.start < joined[-1].end:
                first = min(joined[-1], finding, key=lambda f: (_RANK[f.name], f.start - f.end))
                joined[-1] = first._replace(start=joined[-1].start, end=max(joined[-1].end, finding.end))
            else:
                joined.append(finding)
        return joined

    def replace(self, text, findings):
        """Returns `text` with every finding replaced by its label or its pseudonym; without any the same object."""
        if not findings:
            return text
        parts, place = [], 0
        for finding in findings:
            parts += [text[place : finding.start], self._stand_in(finding.name, text[finding.start : finding.end])]
            place = finding.end
        return "".join([*parts, text[place:]])

    def _stand_in(self, name, value):
        if self._secret is None:
            return f"[{name.upper()}]"
        digest = hmac.new(self._secret, f"{name}\0{self._normal(name, value)}".encode("utf-8", "surrogatepass"), hashlib.sha256)
        # 48 bits: among a million data two share a pseudonym with a chance of 1 in 500. Letters, so that it holds no number.
        return f"[{name.upper()}-{digest.hexdigest()[:12].translate(_LETTERS)}]"

    def _normal(self, name, value):
        """Returns one spelling for all spellings of a datum of a class; what is none of it, is as it was written."""
        try:
            return self._detectors[name].normal(value)
        except ValueError:
            return value

    def _is_allowed(self, name, value):
        listed = self._allowed_values[name]
        return bool(listed) and self._normal(name, value) in listed or any(p.fullmatch(value) for p in self._allowed)


_LETTERS = str.maketrans("0123456789abcdef", "bcdfghjklmnpqrst")


def masked(value, name=""):
    """Returns what of a datum may be shown, at most 40 characters: the first and the separators; of a secret its length."""
    value = value[:40]
    if name == "secret":
        return "*" * len(value)
    return value[:1] + re.sub(r"[^ .,@:/()+-]", "*", value[1:].replace("\n", " "))


def _read(name, file):
    try:
        return pathlib.Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"pii.{name}={file} can't be read ({error.strerror}).") from None


class _Names:
    """Finds names of persons by presidio and its spaCy model (0.6 MB/s)."""

    def __init__(self):
        try:
            from presidio_analyzer import AnalyzerEngine
        except ImportError:
            raise ConfigError("pii.classes: person needs presidio-analyzer: pip install 'llmos-jax[names]'") from None
        self._engine = AnalyzerEngine()

    def find(self, view):
        """Yields (start, end, "person")."""
        for found in self._engine.analyze(view.text, language="en", entities=["PERSON"]):
            yield found.start, found.end, "person"

    @staticmethod
    def normal(value):
        """Returns a name in small letters with single spaces."""
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
