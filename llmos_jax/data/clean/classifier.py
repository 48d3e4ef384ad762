"""A quality classifier: logistic regression on hashed words and pairs of words, good texts against the pool.

What GPT-3 and DCLM do to choose web pages like those of a set known to be good. Trained by `train`, on the machine at hand in
seconds; kept as one JSON file; its score is an attribute, so that the threshold is a choice made later.
"""

import base64
import dataclasses
import functools
import json
import pathlib

import numpy as np

from llmos_jax.config import fingerprint, setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.lists import content_of
from llmos_jax.data.clean.repeats import ngram_hashes, ngram_places
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import FoldedHashes
from llmos_jax.errors import ConfigError, DataError

_FORMAT = "llmos-quality-classifier-1"


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """How a quality classifier is trained."""

    bits: int = setting(18, help="2 ** bits weights, one for each bucket of hashed words", at_least=8, at_most=24)
    ngrams: tuple[int, ...] = setting((1, 2), help="words of the n-grams that are features", at_least=1)
    l2: float = setting(1e-4, help="weight of the squared norm of the weights", above=0.0)
    iterations: int = setting(200, help="most iterations of L-BFGS", at_least=1)


def features(texts, config):
    """Returns a sparse matrix [documents, 2 ** bits], float64: how often each bucket occurs, rows of length one."""
    from scipy.sparse import csr_array

    [words] = view_of(texts, FoldedHashes)
    buckets, owners = [], []
    for n in config.ngrams:
        places, documents = ngram_places(words.first, n)
        buckets.append((ngram_hashes(words.values, n)[places] >> np.uint64(64 - config.bits)).astype(np.int64))
        owners.append(documents)
    buckets, owners = np.concatenate(buckets), np.concatenate(owners)
    shape = (len(texts), 1 << config.bits)
    cells, counts = np.unique(owners << config.bits | buckets, return_counts=True)
    owners, buckets = cells >> config.bits, cells & (shape[1] - 1)
    # Long texts repeat words: their logarithm counts, and only the direction of a row.
    values = np.log1p(counts)
    norms = np.sqrt(np.bincount(owners, weights=values**2, minlength=len(texts)))
    return csr_array((values / norms[owners], (owners, buckets)), shape=shape)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Weights [2 ** bits] float32 and a bias; `config` says what they are weights of."""

    config: ClassifierConfig
    weights: np.ndarray
    bias: float

    def scores(self, texts):
        """Returns the probability of being a good text, float32 [documents], for good and pool being equally likely."""
        if not len(texts):
            return np.zeros(0, np.float32)
        logits = features(texts, self.config) @ self.weights.astype(np.float64) + self.bias
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    def save(self, path):
        """Writes the classifier as JSON."""
        tree = {
            "format": _FORMAT,
            "config": dataclasses.asdict(self.config),
            "bias": self.bias,
            "weights": base64.b64encode(self.weights.astype("<f4").tobytes()).decode(),
        }
        pathlib.Path(path).write_text(json.dumps(tree | {"hash": fingerprint(tree)}))

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote; DataError names a file that is anything else."""
        try:
            tree = json.loads(pathlib.Path(path).expanduser().read_text())
            expected = tree.pop("hash")
            if tree["format"] != _FORMAT or fingerprint(tree) != expected:
                raise ValueError("its hash does not fit its content")
            config = ClassifierConfig(**tree["config"] | {"ngrams": tuple(tree["config"]["ngrams"])})
            weights = np.frombuffer(base64.b64decode(tree["weights"]), "<f4")
            if len(weights) != 1 << config.bits:
                raise ValueError(f"it has {len(weights)} weights")
            return cls(config, weights, float(tree["bias"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no quality classifier that `classifier.train` saved: {error}.") from None


def train(positives, pool, config=ClassifierConfig()):  # noqa: B008
    """Returns a Classifier that tells the texts `positives` from those of `pool`, both classes weighted alike.

    Deterministic: the loss is convex and minimised by L-BFGS from zero. DataError when a class is empty.
    """
    from scipy.optimize import minimize

    if not positives or not pool:
        raise DataError(f"a classifier needs texts of both kinds; there are {len(positives)} good ones and {len(pool)} others.")
    inputs = features([*positives, *pool], config)
    signs = np.repeat([1.0, -1.0], [len(positives), len(pool)])
    weight = np.repeat([0.5 / len(positives), 0.5 / len(pool)], [len(positives), len(pool)])
    transposed = inputs.T.tocsr()

    def loss_and_gradient(parameters):
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (inputs @ weights + bias)
        loss = weight @ np.logaddexp(0, -margins) + 0.5 * config.l2 * (weights @ weights)
        slope = -signs * weight / (1 + np.exp(margins))
        return loss, np.append(transposed @ slope + config.l2 * weights, slope.sum())

    start = np.zeros((1 << config.bits) + 1)
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": config.iterations})
    return Classifier(config, found.x[:-1].astype(np.float32), float(found.x[-1]))


@functools.lru_cache(maxsize=2)
def _load(path, content):
    """Returns the Classifier of a file; `content` only tells one state of the file from another."""
    return Classifier.load(path)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityClassifier(Filter):
    """Scores documents with a trained classifier; with a threshold, removes those that score low."""

    step: str = setting("quality_classifier", help="step", choices=("quality_classifier",))
    path: str = setting(help="file that `Classifier.save` wrote")
    min_score: float = threshold(0.0, help="smallest score of documents that stay; 0: only score", at_least=0, at_most=1)

    def __post_init__(self):
        super().__post_init__()
        if not pathlib.Path(self.path).expanduser().is_file():
            raise ConfigError(f"quality_classifier.path={self.path!r} is no file: write one with `classifier.train(...).save`.")

    def inputs(self):
        """Returns the hash of the classifier."""
        return {self.path: content_of(self.path)}

    def annotate(self, documents, findings=None):
        """Returns {"score": float32 [n]}."""
        return {"score": _load(self.path, content_of(self.path)).scores(documents.texts)}

    def decide(self, attributes):
        """Returns why documents go."""
        return first_reason([("low quality", attributes["score"] < np.float32(self.min_score))], len(attributes["score"]))
