"""Differential privacy as a setting: the budget, its accounting, and the batches that accounting assumes.

DP-SGD (Abadi et al. 2016): the gradient of every document is clipped to `clip_norm`, Gaussian noise of standard deviation
`noise_multiplier` x `clip_norm` is added to their sum, and batches are Poisson samples. The trained weights, everything
computed from them, and the optimizer's state are then (epsilon, delta)-private for adding or removing one document. Not
covered are the loss and other metrics of training batches, a tokenizer trained on the documents, and how many there are.
"""

import dataclasses
import hashlib
import math
import pathlib

import numpy as np
from absl import logging

from llmos_jax.config import setting
from llmos_jax.data.sampling import PoissonSampler, probabilities
from llmos_jax.data.tokenizer import TRAINED
from llmos_jax.errors import ConfigError, DataIdentityMismatch
from llmos_jax.tasks.base import Field

# The chance of a batch with more documents than it has rows. A run of a million steps adds less than 1e-12 to delta.
_OVERFLOW = 1e-20
_SHORTEST_KEY_BYTES = 16


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differentially private training."""

    clip_norm: float = setting(1.0, help="largest norm of one document's gradient", above=0.0)
    noise_multiplier: float | None = setting(
        None, help="noise's standard deviation / clip_norm; none: the least with which train.steps keep to epsilon", above=0.0
    )
    epsilon: float | None = setting(
        None, help="budget: training stops before it is exceeded; none: noise_multiplier decides", above=0.0
    )
    delta: float = setting(1e-5, help="chance that epsilon does not hold; below 1 / documents", above=0.0, below=1.0)
    rows_at_once: int | None = setting(
        None, help="documents whose gradients are held at once, over all devices; none: one on each data shard", at_least=1
    )
    key_file: str | None = setting(
        None, help="file with at least 16 secret bytes that draw batches and noise; none: seed does, fit for trials only"
    )

    def __post_init__(self):
        if self.noise_multiplier is None and self.epsilon is None:
            raise ConfigError("train.privacy needs a budget (train.privacy.epsilon) or train.privacy.noise_multiplier.")


def check_private(settings, placement):
    """Raises ConfigError when a setting can't be combined with differential privacy, saying which."""
    train, shape = settings.train, placement.mesh.shape
    shards = placement.axis_size("batch")
    at_once = train.privacy.rows_at_once or shards
    refused = (
        (placement.pipeline is not None, "mesh.pipeline above 1", "the pipeline sums gradients before they are clipped"),
        (shape["context"] > 1, "mesh.context above 1", "ring attention can't be taken row by row"),
        (getattr(settings.model, "experts", 0) > 0, "model.experts", "experts are given the rows of a batch together"),
        (train.microbatches != 1, f"train.microbatches={train.microbatches}", "train.privacy.rows_at_once is what sets memory"),
        (
            settings.optim.gradient_dtype != "float32",
            f"optim.gradient_dtype={settings.optim.gradient_dtype}",
            "rounding undoes clipping",
        ),
        (
            settings.data.packing != "document",
            f"data.packing={settings.data.packing}",
            "a row must hold one document: set it to document",
        ),
        (at_once % shards != 0, f"train.privacy.rows_at_once={at_once}", f"it must be a multiple of the {shards} data shards"),
    )
    for is_set, what, why in refused:
        if is_set:
            raise ConfigError(f"train.privacy can't be combined with {what}: {why}.")


def batch_rows(settings, placement):
    """Returns (rows, microbatches) of the batches that the step gets: with privacy, room for any draw."""
    train = settings.train
    if train.privacy is None:
        return train.batch_size, train.microbatches
    at_once = train.privacy.rows_at_once or placement.axis_size("batch")
    parts = -(-_capacity(train.batch_size) // at_once)
    return parts * at_once, parts


def private_fields(fields):
    """Returns the Fields of a batch with those that the sampler adds."""
    drawn = {"is_drawn": Field(np.float32, (), ("batch",)), "noise_key": Field(np.uint32, (2,), ("batch", None))}
    return dict(fields) | drawn


def make_private(settings, task, placement):
    """Returns (settings, task) of a private run: noise and number of steps resolved, batches drawn by Poisson sampling.

    Raises ConfigError when settings contradict each other, or when the budget does not allow a single step.
    """
    check_private(settings, placement)
    config, train = settings.train.privacy, settings.train
    if task.loader is None:
        raise ConfigError(f"train.privacy: the task {settings.task.name!r} has no documents that batches could be drawn from.")
    if task.loader.stages or any(task.loader.max_epochs):
        raise ConfigError(
            "train.privacy can't be combined with data.stages or max_epochs: every document has one chance at all steps."
        )
    rows, parts = batch_rows(settings, placement)
    key = _key(config, settings.seed)
    sampler = PoissonSampler(task.loader, expected=train.batch_size, capacity=rows, parts=parts, key=key)
    probability, documents = sampling_probability(settings, task), sum(task.loader.counts)
    if config.delta >= 1 / documents:
        logging.warning(
            "train.privacy.delta=%g is not below 1 / documents (%d): it allows one to be published.", config.delta, documents
        )
    if settings.data.tokenizer.startswith(TRAINED):
        logging.warning("data.tokenizer=%s is trained on the documents without privacy.", settings.data.tokenizer)
    settings = _resolve(settings, probability)
    identity = dict(task.identity) | {"privacy": {"key": hashlib.sha256(b"identity" + key).hexdigest()[:16]}}

    def check_identity(saved):
        task.check_identity({name: value for name, value in saved.items() if name != "privacy"})
        if saved.get("privacy") != identity["privacy"]:
            raise DataIdentityMismatch(
                f"the checkpoint's batches were drawn with another key ({saved.get('privacy')}, now {identity['privacy']}): "
                "restore train.privacy.key_file, or start another run directory."
            )

    private = dataclasses.replace(
        task,
        rows=sampler.rows,
        batch_size=rows,
        fields=private_fields(task.fields),
        identity=identity,
        check_identity=check_identity,
    )
    return settings, private


def sampling_probability(settings, task):
    """Returns the largest probability with which a document is in a batch; ConfigError when it is above 1."""
    found = probabilities(task.loader, settings.train.batch_size)
    if max(found) > 1:
        raise ConfigError(
            f"train.batch_size={settings.train.batch_size} is more than the documents of a source allow {task.loader.counts}: "
            "lower it, or its data.sources weight."
        )
    return max(found)


def spent(settings, probability, steps):
    """Returns {"epsilon", "delta", "noise_multiplier", "sampling_probability", "steps"} after `steps` batches."""
    config = settings.train.privacy
    return {
        "epsilon": epsilon(config.noise_multiplier, probability, steps, config.delta),
        "delta": config.delta,
        "noise_multiplier": config.noise_multiplier,
        "sampling_probability": probability,
        "steps": steps,
    }


def epsilon(noise_multiplier, probability, steps, delta):
    """Returns epsilon of `steps` Poisson-sampled Gaussian mechanisms at `delta`, by privacy loss distributions (PLD)."""
    return _epsilon(_library().pld.PLDAccountant(), noise_multiplier, probability, steps, delta)


def calibrate(budget, probability, steps, delta):
    """Returns the least noise multiplier (to a thousandth of it) with which `steps` stay within epsilon `budget` at `delta`."""

    def fits(noise):
        return epsilon(noise, probability, steps, delta) <= budget

    # Renyi's bound is quick and never too low. PLD takes minutes where the noise is far too small: it starts close by.
    high = _bisect(lambda noise: _quick(noise, probability, steps, delta) <= budget, 1.0, relative=0.01)
    while fits(0.9 * high):
        high *= 0.9
    return _bisect(fits, high, low=0.9 * high, relative=1e-3)


def most_steps(budget, noise_multiplier, probability, delta, limit):
    """Returns the largest number of steps, at most `limit` (none: any), that stays within epsilon `budget`."""

    def fits(steps):
        return (limit is None or steps <= limit) and epsilon(noise_multiplier, probability, steps, delta) <= budget

    if limit is not None and fits(limit):
        return limit
    low, high = 0, 1
    while _quick(noise_multiplier, probability, high, delta) <= budget:  # never more steps than PLD allows
        low, high = high, 2 * high
    high = max(high, 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bisect(fits, high, low=None, relative=1e-3):
    """Returns the least value that fits, to a relative error; more fits better. `low` does not fit, where it is known."""
    while not fits(high):
        low, high = high, 2 * high
    while low is None:
        low, high = (None, high / 2) if fits(high / 2) else (high / 2, high)
    while high - low > relative * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _quick(*arguments):
    # Whole orders have a closed form; others may not converge.
    return _epsilon(_library().rdp.RdpAccountant([*range(2, 64), 128, 256, 512]), *arguments)


def _epsilon(accountant, noise_multiplier, probability, steps, delta):
    if not steps:
        return 0.0
    accounting = _library()
    step = accounting.PoissonSampledDpEvent(probability, accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.compose(step, steps).get_epsilon(delta))


def _resolve(settings, probability):
    """Returns settings whose noise is a number and whose steps end within the budget, and says both."""
    train, config = settings.train, settings.train.privacy
    if config.noise_multiplier is None:
        if train.steps is None:
            raise ConfigError("train.privacy.epsilon without noise_multiplier needs train.steps: the noise follows from both.")
        config = dataclasses.replace(config, noise_multiplier=calibrate(config.epsilon, probability, train.steps, config.delta))
    steps = train.steps
    if config.epsilon is not None:
        steps = most_steps(config.epsilon, config.noise_multiplier, probability, config.delta, train.steps)
        if steps == 0:
            raise ConfigError(
                f"train.privacy.epsilon={config.epsilon} is spent by one step with noise_multiplier="
                f"{config.noise_multiplier:g}: raise one of them, or lower train.batch_size."
            )
        if steps != train.steps:
            logging.info("the budget of epsilon %g ends after %d steps: training stops there.", config.epsilon, steps)
    settings = dataclasses.replace(settings, train=dataclasses.replace(train, steps=steps, privacy=config))
    if steps is not None:
        logging.info("%s", describe(spent(settings, probability, steps)))
    return settings


def describe(account):
    """Returns one line on what `spent` returned."""
    return (
        f"differential privacy: (epsilon {account['epsilon']:.3f}, delta {account['delta']:g}) after {account['steps']} steps, "
        f"noise multiplier {account['noise_multiplier']:.4g}, sampling probability {account['sampling_probability']:.4g}"
    )


def _library():
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise ConfigError("train.privacy needs dp-accounting: pip install 'llmos-jax[privacy]'") from None
    return dp_accounting


def _capacity(expected):
    """Returns the least number of rows that a draw of `expected` on average exceeds with a chance below `_OVERFLOW`.

    Poisson's upper tail bounds that of any sum of independent draws (Hoeffding 1956; Anderson and Samuels 1967).
    """
    from scipy import stats

    rows = expected + 1
    while stats.poisson.logsf(rows, expected) > math.log(_OVERFLOW):
        rows += max(1, int(math.sqrt(expected)) // 4)
    return rows


def _key(config, seed):
    if config.key_file is None:
        logging.warning(
            "train.privacy.key_file is none: whoever knows the seed can compute the noise. Set it before you publish weights."
        )
        return f"seed/{seed}".encode()
    try:
        key = pathlib.Path(config.key_file).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"train.privacy.key_file={config.key_file} can't be read ({error.strerror}).") from None
    if len(key) < _SHORTEST_KEY_BYTES:
        raise ConfigError(f"train.privacy.key_file={config.key_file} has {len(key)} bytes; the least is {_SHORTEST_KEY_BYTES}.")
    return key
