"""A shard of documents in memory, in columns: what every step of cleaning reads."""

import dataclasses

import numpy as np

from llmos_jax.errors import ConfigError

# What an attribute may be made of: float32, int32, int64, bool, or text.
_KINDS = ("f", "i", "u", "b", "U")


@dataclasses.dataclass
class Documents:
    """Documents in columns, all of one length n.

    keys: unique names that stay the same from run to run, `SOURCE/relative/path[:record]`.
    texts: the text of each.
    metadata: what the source said of each, a JSON-able dict (url, licence, language, ...).
    attributes: {name: array [n]}, what steps found out; numbers, booleans or text.
    """

    keys: list
    texts: list
    metadata: list
    attributes: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        count = len(self.keys)
        for name, column in (("texts", self.texts), ("metadata", self.metadata), *self.attributes.items()):
            if len(column) != count:
                raise ValueError(f"{name} has {len(column)} entries for {count} documents")

    def __len__(self):
        return len(self.keys)

    def select(self, chosen):
        """Returns the Documents where the boolean array `chosen` [n] holds, in the same order."""
        places = np.flatnonzero(chosen)
        return Documents(
            keys=[self.keys[place] for place in places],
            texts=[self.texts[place] for place in places],
            metadata=[self.metadata[place] for place in places],
            attributes={name: values[places] for name, values in self.attributes.items()},
        )

    @classmethod
    def of(cls, texts, *, source="memory", metadata=None):
        """Returns Documents of `texts` named SOURCE:0, SOURCE:1, ...: for tests and notebooks."""
        texts = list(texts)
        return cls([f"{source}:{number}" for number in range(len(texts))], texts, metadata or [{} for _ in texts])

    @property
    def utf8_bytes(self):
        """Size of each text in UTF-8, int64 [n]."""
        # Characters that are all ASCII are their own bytes: no copy is made of such a text.
        sizes = (len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in self.texts)
        return np.fromiter(sizes, np.int64, len(self.texts))


def check_attributes(attributes, count, step):
    """Returns {name: array [count]} of what `step` found, as arrays; ConfigError names one of another length or kind."""
    checked = {}
    for name, values in attributes.items():
        array = np.asarray(values)
        if array.shape != (count,) or array.dtype.kind not in _KINDS:
            raise ConfigError(
                f"step {step!r} gave attribute {name!r} of shape {array.shape} and type {array.dtype}: it must be one number, "
                f"boolean or text for each of {count} documents."
            )
        checked[name] = array
    return checked
