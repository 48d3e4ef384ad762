"""The plainest filter: documents by their length."""

import dataclasses

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.steps import Filter, register, threshold


@register
@dataclasses.dataclass(frozen=True)
class Length(Filter):
    """Removes documents that are shorter or longer than so many characters."""

    step: str = setting("length", help="step", choices=("length",))
    at_least: int = threshold(1, help="fewest characters", at_least=0)
    at_most: int = threshold(10_000_000, help="most characters", at_least=1)

    def annotate(self, documents, findings=None):
        """Returns the characters of each document."""
        return {"characters": np.array([len(text) for text in documents.texts], np.int32)}

    def decide(self, attributes):
        """Returns whether each is too short or too long."""
        characters = attributes["characters"]
        return np.where(characters < self.at_least, "too short", np.where(characters > self.at_most, "too long", ""))
