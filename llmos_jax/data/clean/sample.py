"""A share of the documents, the same ones whatever else is prepared: chosen by a hash of their keys."""

import dataclasses
import hashlib

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.steps import Filter, register, threshold


@register
@dataclasses.dataclass(frozen=True)
class Sample(Filter):
    """Keeps a share of the documents: for trials, or to take less of a source that is too large."""

    step: str = setting("sample", help="step", choices=("sample",))
    seed: int = setting(0, help="seed of the choice", at_least=0)
    sources: tuple[str, ...] = setting((), help="sources that it is taken of (last parts of their paths); none: all")
    share: float = threshold(
        1.0, help="share of the documents that stay; a larger one holds all of a smaller one", at_least=0, at_most=1
    )

    def annotate(self, documents, findings=None):
        """Returns {"draw": float64 [n], uniform in [0, 1) by key and seed, -1 for documents of other sources}."""
        draws = np.full(len(documents), -1.0)
        for place, key in enumerate(documents.keys):
            if not self.sources or key.partition("/")[0] in self.sources:
                digest = hashlib.blake2b(f"{self.seed}/{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
                draws[place] = int.from_bytes(digest, "little") / 2**64
        return {"draw": draws}

    def decide(self, attributes):
        """Returns which documents are not drawn."""
        return first_reason([("not drawn", attributes["draw"] >= self.share)], len(attributes["draw"]))
