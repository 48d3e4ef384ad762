"""Language modelling: predict the next token of packed documents; evaluated in bits per byte of raw text."""

import dataclasses
import functools
import json
import math

import numpy as np

from llmos_jax.config import setting, unit
from llmos_jax.data.loader import Loader
from llmos_jax.data.prepare import prepare
from llmos_jax.data.tokenizer import expected_vocab_size
from llmos_jax.errors import ConfigError
from llmos_jax.tasks.base import Evaluation, Field, Outline, Task

# Vocabularies are rounded up to this, so that they divide over any sensible model axis and fill matrix units.
_VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How a language model is evaluated and sampled while it trains."""

    name: str = setting("language", help="task", choices=("language",))
    evaluation_batches: int | None = setting(None, help="validation batches per evaluation; none: all", at_least=1)
    prompts: tuple[str, ...] = setting(("",), help="prompts of the samples shown while training; empty: a document's start")
    sample_tokens: int = setting(96, help="length of a sample, tokens", at_least=1)
    temperature: float = setting(0.8, help="sampling temperature; 0: greedy", at_least=0.0)

    def __post_init__(self):
        if not self.prompts:
            raise ConfigError("task.prompts is empty: name at least one (an empty text is a document's start).")


def build(config, *, model, data, batch_size, seed, log=print):
    """Returns the Task of training `model` (a model Config) on `data` (a DataConfig), preparing the data if needed.

    Raises ConfigError when the model's vocabulary or context is too small for the data or for the prompts.
    """
    prepared = prepare(data, log=log)
    known = _outline(model, data, prepared.tokenizer.vocab_size)
    model = known.model_config
    for prompt in config.prompts:
        # As a prompt is fed: behind the end-of-text token, with room for one more. Found at the end, it would cost the run.
        tokens = 1 + len(prepared.tokenizer.encode(prompt))
        if tokens >= model.context:
            raise ConfigError(
                f"task.prompts: {prompt[:40]!r} has {tokens} tokens, and model.context={model.context}; shorten it."
            )
    train = Loader(prepared, "train", batch_size=batch_size, seed=seed)
    validation = _validation(config, prepared, batch_size, seed)
    # gzip saw all validation text: it is a yardstick only when the evaluation does, too.
    is_whole = config.evaluation_batches is None
    baselines = {"gzip -9 bits per byte": 8 * prepared.validation_gzip_bytes / prepared.validation_bytes} if is_whole else {}
    return Task(
        **vars(known),
        batch_size=batch_size,
        rows=train.rows,
        evaluations=(validation,),
        identity=train.identity,
        check_identity=train.check_identity,
        loader=train,
        artifacts={"tokenizer.json": json.dumps(prepared.tokenizer.to_json())},
        tokenizer=prepared.tokenizer,
        prompts=config.prompts,
        sample_tokens=config.sample_tokens,
        temperature=config.temperature,
        baselines=baselines,
    )


def outline(config, *, model, data):
    """Returns the Outline of what `build` would return: the vocabulary's size is taken from the tokenizer's setting."""
    return _outline(model, data, expected_vocab_size(data.tokenizer) if model.vocab_size == 0 else 0)


def _outline(model, data, vocab_size):
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=-(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size}; set it to 0 (fitted) or more."
        )
    if model.context < data.length:
        raise ConfigError(
            f"model.context={model.context} is shorter than the records' data.length={data.length}; "
            "raise one or lower the other."
        )
    family = unit("llmos_jax.models", model.name)
    tokens = Field(np.int32, (data.length,), ("batch", "length"))
    return Outline(
        model=functools.partial(family.build, model),
        model_config=model,
        fields={
            "tokens": tokens,
            "targets": tokens,
            "segments": tokens,
            "positions": tokens,
            "weights": dataclasses.replace(tokens, dtype=np.float32),
            "target_bytes": Field(np.int32, (), ("batch",)),
        },
        loss=loss,
        tokens_per_row=data.length,
        flops_per_token=family.flops_per_token(model, data.length),
        parameter_count=family.parameter_count(model),
    )


def loss(model, batch, key):
    """Returns (sum, weight, sums) of next-token cross-entropy over the weighted targets of a batch."""
    total, sums = model.loss(batch, key)
    return total, batch["weights"].sum(), sums


def measure(model, batch):
    """Returns the sums that `summarise` needs: negative log-likelihood (nats), tokens, bytes of text, correct tokens."""
    _, sums = model.loss(batch, None)
    return {
        "nll": sums["nll"],
        "tokens": batch["weights"].sum(),
        "bytes": batch["target_bytes"].sum().astype(np.float32),
        "correct": sums["accuracy"],
    }


def summarise(sums):
    """Returns loss (nats per token), perplexity, bits per byte of raw text, and accuracy, from `measure`'s sums.

    Bits per byte count every token's cost, end-of-text tokens included, over the bytes of the text alone.
    """
    loss = sums["nll"] / sums["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sums["nll"] / math.log(2) / sums["bytes"],
        "accuracy": sums["correct"] / sums["tokens"],
    }


def _validation(config, prepared, batch_size, seed):
    loader = Loader(prepared, "validation", batch_size=batch_size, seed=seed)
    batches = loader.evaluation_batches(batch_size)
    return Evaluation(
        name="validation",
        batch_size=batch_size,
        batches=min(batches, config.evaluation_batches or batches),
        rows=loader.evaluation_rows,
        measure=measure,
        summarise=summarise,
    )
