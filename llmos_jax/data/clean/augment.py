"""More text from little: noisy copies, and copies that went through another language and back.

For sets of languages or subjects of which there is little. Copies are new documents behind the originals; which ones depends
on the seed and each document's key only. Steps that remove near-duplicates take some of them away again: augment what is
clean, with no step behind (`prepare.py:data=DATASET,chain=none`).
"""

import dataclasses
import hashlib

import numpy as np

from llmos_jax.config import load_function, setting
from llmos_jax.data.clean.documents import Documents
from llmos_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What is done to copies of documents. Rates are shares of the words of a text."""

    copies: int = setting(1, help="noisy copies of each document", at_least=0)
    drop: float = setting(0.02, help="words left out", at_least=0, at_most=1)
    swap: float = setting(0.02, help="words that change places with the next one", at_least=0, at_most=1)
    typo: float = setting(0.02, help="words that lose, double or exchange a letter", at_least=0, at_most=1)
    seed: int = setting(0, help="seed of the noise", at_least=0)
    translate: str | None = setting(
        None, help="MODULE:FUNCTION that takes a list of texts to their translations back from another language"
    )
    sources: tuple[str, ...] = setting((), help="sources that are augmented (last parts of their paths); none: all")

    @property
    def is_active(self):
        """Whether there are any copies."""
        return self.copies > 0 or self.translate is not None


def noisy(text, config, random):
    """Returns a copy of a text with noise from the numpy Generator `random`; lines and blanks between words are kept."""
    lines = []
    for line in text.split("\n"):
        body = line.lstrip()
        words = body.split(" ")
        chance = random.random((3, len(words)))
        for place in np.flatnonzero(chance[0] < config.typo):
            words[place] = _typo(words[place], random)
        for place in np.flatnonzero(chance[1, :-1] < config.swap):
            words[place], words[place + 1] = words[place + 1], words[place]
        kept = [word for word, value in zip(words, chance[2], strict=True) if value >= config.drop]
        lines.append(line[: len(line) - len(body)] + " ".join(kept))
    return "\n".join(lines)


def _typo(word, random):
    if len(word) < 2:
        return word
    place, kind = int(random.integers(len(word) - 1)), int(random.integers(3))
    middle = ("", word[place] * 2, word[place + 1] + word[place])[kind]
    return word[:place] + middle + word[place + (2 if kind == 2 else 1) :]


def augment(documents, config=AugmentConfig(), *, translate=None):  # noqa: B008
    """Returns Documents: copies of `documents`, without these, named KEY#noise0, ... and KEY#translated.

    translate: a function from a list of texts to the list of the same texts translated and translated back, by whatever
    model is at hand; none: that of the settings. metadata of copies: {"augmented": how, "original": key} beside that of the
    original. Copies that equal their original are left out. DataError when `translate` returns another number of texts.
    """
    keys, texts, metadata = [], [], []

    def add(number, how, text):
        if text.strip() and text != documents.texts[number]:
            keys.append(f"{documents.keys[number]}#{how}")
            texts.append(text)
            metadata.append(documents.metadata[number] | {"augmented": how, "original": documents.keys[number]})

    for number, (key, text) in enumerate(zip(documents.keys, documents.texts, strict=True)):
        for copy in range(config.copies):
            digest = hashlib.sha256(f"{config.seed}/{copy}/{key}".encode("utf-8", "surrogatepass")).digest()
            add(number, f"noise{copy}", noisy(text, config, np.random.default_rng(list(digest))))
    if translate is None and config.translate is not None:
        translate = load_function(config.translate, "augment.translate")
    if translate is not None:
        back = list(translate(list(documents.texts)))
        if len(back) != len(documents):
            raise DataError(f"translate returned {len(back)} texts for {len(documents)}: it must return one for each.")
        for number, text in enumerate(back):
            add(number, "translated", text)
    return Documents(keys, texts, metadata)


def with_copies(documents, config):
    """Returns Documents: each of `documents` with its copies behind it."""
    copies = augment(documents, config)
    place = {key: number for number, key in enumerate(documents.keys)}
    origins = [*range(len(documents)), *(place[metadata["original"]] for metadata in copies.metadata)]
    order = np.argsort(origins, kind="stable").tolist()
    columns = [
        [one[number] if number < len(one) else two[number - len(one)] for number in order]
        for one, two in (
            (documents.keys, copies.keys),
            (documents.texts, copies.texts),
            (documents.metadata, copies.metadata),
        )
    ]
    return Documents(*columns)
