"""Documents by the address that their source gave: block lists of domains and words."""

import dataclasses
import re
import urllib.parse

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.lists import content_of, read_list
from llmos_jax.data.clean.steps import Filter, register, threshold

_WORD = re.compile(r"[^\W_]+")


@register
@dataclasses.dataclass(frozen=True)
class Url(Filter):
    """Removes documents from listed domains (and those below them) and with listed words in their address."""

    step: str = setting("url", help="step", choices=("url",))
    key: str = setting("url", help="field of the metadata that holds the address")
    domains: str | None = setting(None, help="file of blocked domains, one a line")
    words: str | None = setting(None, help="file of words that may not be in an address, one a line")
    max_words: int = threshold(0, help="how many different listed words an address may have", at_least=0)
    needs_url: bool = threshold(False, help="remove documents without an address")

    def inputs(self):
        """Returns hashes of the lists."""
        return {path: content_of(path) for path in (self.domains, self.words) if path}

    def annotate(self, documents, findings=None):
        """Returns {"host": text, "is_blocked": bool, "words": int32}, each [n]."""
        domains = read_list(self.domains) if self.domains else frozenset()
        listed = read_list(self.words) if self.words else frozenset()
        urls = [str(metadata.get(self.key) or "").lower() for metadata in documents.metadata]
        hosts = [host_of(url) for url in urls]
        return {
            "host": np.array(hosts, np.str_) if hosts else np.zeros(0, "U1"),
            "is_blocked": np.array([any(parent in domains for parent in _parents(host)) for host in hosts], bool),
            "words": np.array([len(listed & set(_WORD.findall(url))) for url in urls], np.int32),
        }

    def decide(self, attributes):
        """Returns why a document goes."""
        rules = [
            ("no address", (attributes["host"] == "") & self.needs_url),
            ("blocked domain", attributes["is_blocked"]),
            ("blocked word in the address", attributes["words"] > self.max_words),
        ]
        return first_reason(rules, len(attributes["words"]))


def host_of(url):
    """Returns the host of an address in lower case without `www.` and port, "" where it has none."""
    try:
        host = urllib.parse.urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""
    return host.removeprefix("www.").rstrip(".")


def _parents(host):
    parts = host.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))] if host else []
