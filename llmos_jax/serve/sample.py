"""Choosing the next token from logits: every row by its own settings, in one compiled sampler; reproducible per row.

The random key of a token depends on its request's seed and its index in the continuation alone, so neighbours, preemption and
speculation never change what is drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError

# Most tokens of a request with a bias, and most alternatives whose log-probabilities can be asked for.
MOST_BIASES, MOST_LOGPROBS = 300, 20


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    max_tokens: int = setting(256, help="longest continuation, tokens", at_least=1)
    temperature: float = setting(0.8, help="0: always the likeliest token; 1: the model's own distribution", at_least=0.0)
    top_k: int | None = setting(None, help="draw from this many likeliest tokens; none: all", at_least=1)
    top_p: float | None = setting(None, help="draw from the smallest set with this much probability", above=0.0, at_most=1.0)
    min_p: float | None = setting(None, help="draw from tokens this likely, the likeliest being 1", at_least=0.0, at_most=1.0)
    repetition_penalty: float = setting(
        1.0, help="logits of tokens of prompt or continuation: divided by this where positive, else multiplied", above=0.0
    )
    presence_penalty: float = setting(0.0, help="taken from the logits of tokens of the continuation")
    frequency_penalty: float = setting(0.0, help="the same, as often as they occur")
    logit_bias: dict[str, float] = setting({}, help="token number -> added to its logit")
    logprobs: int | None = setting(
        None, help="log-probabilities of tokens, and of so many alternatives; none: no", at_least=0, at_most=MOST_LOGPROBS
    )
    seed: int = setting(0, help="of the draws", at_least=0, at_most=2**32 - 1)
    n: int = setting(1, help="continuations of each prompt, from random numbers of their own", at_least=1)
    stop: tuple[str, ...] = setting((), help="texts that end a continuation (not part of it)")

    def __post_init__(self):
        if "" in self.stop:
            raise ConfigError("stop: an empty text would end every continuation before it begins.")
        if len(self.logit_bias) > MOST_BIASES:
            raise ConfigError(f"logit_bias has {len(self.logit_bias)} tokens; at most {MOST_BIASES} are taken.")
        for token in self.logit_bias:
            if not str(token).isdecimal():
                raise ConfigError(f"logit_bias: {token!r} is not the number of a token.")

        if self.n > 1 and self.temperature == 0:
            raise ConfigError(f"n={self.n} with temperature=0: all continuations would be the same.")

    def check(self, vocab_size):
        """Raises ConfigError when a token named here is not in the vocabulary."""
        for token in self.logit_bias:
            if int(token) >= vocab_size:
                raise ConfigError(f"logit_bias: there is no token {token}; the vocabulary has {vocab_size}.")


def sampling_arrays(rows, size):
    """Returns {name: numpy array} for `size` rows: what `Sampler` reads; `rows`: (SamplingConfig, stream) of each, or None.

    stream: which of several continuations with the same seed (the number of a prompt, of a choice). Nobody's rows are greedy.
    """
    arrays = {name: np.full(size, value, np.float32) for name, value in _NEUTRAL.items()}
    arrays |= {"seed": np.zeros(size, np.uint32), "stream": np.zeros(size, np.int32), "top_k": np.zeros(size, np.int32)}
    arrays["logprobs"] = np.full(size, -1, np.int32)
    arrays["bias_token"] = np.zeros((size, MOST_BIASES), np.int32)
    arrays["bias"] = np.zeros((size, MOST_BIASES), np.float32)
    for row, (sampling, stream) in ((row, one) for row, one in enumerate(rows) if one is not None):
        for name in _NEUTRAL:
            value = getattr(sampling, name)
            arrays[name][row] = _NEUTRAL[name] if value is None else value
        arrays["seed"][row], arrays["stream"][row] = sampling.seed, stream
        arrays["top_k"][row] = sampling.top_k or 0
        arrays["logprobs"][row] = -1 if sampling.logprobs is None else sampling.logprobs
        for index, (token, bias) in enumerate(sampling.logit_bias.items()):
            arrays["bias_token"][row, index], arrays["bias"][row, index] = int(token), bias
    return arrays


_NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Sampler:
    """Draws one token a row at a time, inside jit. Work that no row asks for is skipped at run time (`lax.cond`).

    arrays: of `sampling_arrays`. history: (tokens, the row of each, its index there), of one shape or broadcast to it; a row's
    prompt comes first. prompt_B, length_B: how many of a row's tokens are prompt, and there at all. vocab_size: tokens from
    here on (padding of the embedding) are never drawn.
    """

    def __init__(self, arrays, history, prompt_B, length_B, padded_vocab, vocab_size):
        self.arrays, self.vocab_size = arrays, vocab_size
        keys_B = jax.vmap(jax.random.key)(arrays["seed"])
        self.keys_B = jax.vmap(jax.random.fold_in)(keys_B, arrays["stream"])
        self.is_penalised = jnp.any(
            (arrays["repetition_penalty"] != 1) | (arrays["presence_penalty"] != 0) | (arrays["frequency_penalty"] != 0)
        )
        self.counts = lax.cond(self.is_penalised, _counts, _no_counts, history, prompt_B, length_B, jnp.zeros(padded_vocab))

    def draw(self, logits_BV, index_B, counts):
        """Returns (tokens [B], log-probabilities {"chosen" [B], "top" [B, 20], "top_tokens" [B, 20]}, counts).

        logits_BV: float32; index_B: of the token in its continuation; counts: `self.counts`, or what the call before returned.
        Log-probabilities are the model's own, before penalties, bias and temperature.
        """
        arrays = self.arrays
        if self.vocab_size < logits_BV.shape[-1]:
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < self.vocab_size, logits_BV, -jnp.inf)
        is_plain = ~(self.is_penalised | jnp.any(arrays["bias"] != 0) | jnp.any(arrays["temperature"] > 0))
        # Tokens, not logits, come out of the condition: XLA:CPU copies what passes through one.
        given = logits_BV, index_B, counts
        token_B = lax.cond(is_plain, lambda logits_BV, *_: _first_largest(logits_BV), self._shape_and_draw, *given)
        wanted = jnp.any(arrays["logprobs"] >= 0)
        logprobs = lax.cond(wanted, _logprobs, _no_logprobs, logits_BV, token_B)
        return token_B, logprobs, self.count(counts, token_B)

    def _shape_and_draw(self, logits_BV, index_B, counts):
        """Returns tokens [B] by everything that rows can ask for."""
        arrays = self.arrays
        shaped_BV = lax.cond(self.is_penalised, _penalise, lambda logits, *_: logits, logits_BV, counts, arrays)
        has_bias = jnp.any(arrays["bias"] != 0)
        shaped_BV = lax.cond(has_bias, _add_bias, lambda logits, *_: logits, shaped_BV, arrays)
        greedy_B = _first_largest(shaped_BV)
        is_random_B = arrays["temperature"] > 0
        keys_B = jax.vmap(jax.random.fold_in)(self.keys_B, index_B)
        drawn_B = lax.cond(jnp.any(is_random_B), _draw, lambda *_: greedy_B, shaped_BV, keys_B, arrays)
        return jnp.where(is_random_B, drawn_B, greedy_B)

    def count(self, counts, token_B):
        """Returns the counts with one token more of each row."""
        drawn_BV, seen_BV = counts
        row_B = jnp.arange(token_B.shape[0])
        return drawn_BV.at[row_B, token_B].add(1.0), seen_BV.at[row_B, token_B].set(True)


def threshold(logits_BV, top_k_B, top_p_B):
    """Returns the smallest logit [B, 1] that top-k and top-p (Holtzman et al. 2020) keep; the likeliest always stays.

    top_k_B: 0 keeps all; top_p_B: 1 keeps all. A token stays when fewer than k, with less probability than p among the k, are
    likelier. No sorting: the threshold is searched bit by bit among the floats, ordered as integers (exact, 32 passes).
    """
    ordered_BV = _ordered(logits_BV)

    def kth(_):
        return _search(lambda guess_B1: (ordered_BV >= guess_B1).sum(-1, keepdims=True) >= top_k_B[:, None], ordered_BV)

    lowest_B1 = jnp.full_like(ordered_BV[:, :1], _LOWEST)
    kth_B1 = jnp.where(top_k_B[:, None] > 0, lax.cond(jnp.any(top_k_B > 0), kth, lambda _: lowest_B1, None), lowest_B1)

    def nucleus(_):
        probabilities_BV = jax.nn.softmax(jnp.where(ordered_BV >= kth_B1, logits_BV, -jnp.inf), axis=-1)

        def is_too_much(guess_B1):  # of what is at least as likely as the guess, p is reached without the guess itself
            return jnp.where(ordered_BV >= guess_B1, probabilities_BV, 0).sum(-1, keepdims=True) >= top_p_B[:, None]

        return _search(is_too_much, ordered_BV)

    needs_p_B1 = top_p_B[:, None] < 1
    nucleus_B1 = lax.cond(jnp.any(needs_p_B1), nucleus, lambda _: lowest_B1, None)
    kept_B1 = jnp.maximum(kth_B1, jnp.where(needs_p_B1, nucleus_B1, lowest_B1))
    kept_B1 = jnp.minimum(kept_B1, ordered_BV.max(-1, keepdims=True))
    return jnp.where(ordered_BV >= kept_B1, logits_BV, jnp.inf).min(-1, keepdims=True)


def _first_largest(logits_BV):
    """Returns argmax, as two reductions that XLA:CPU makes of vectors; 0 where logits are not numbers."""
    tokens = logits_BV.shape[-1]
    is_largest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    first_B = jnp.where(is_largest_BV, jnp.arange(tokens, dtype=jnp.int32), tokens).min(-1)
    return jnp.where(first_B < tokens, first_B, 0)


_LOWEST = np.iinfo(np.int32).min


def _ordered(x):
    """Returns int32 that compare as the float32 do."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0.0 becomes 0.0
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _search(holds, ordered_BV):
    """Returns the largest int32 [B, 1] for which `holds` (true up to it, false above); the lowest where there is none."""
    sign_B1 = holds(jnp.zeros_like(ordered_BV[:, :1]))
    found_B1 = jnp.where(sign_B1, 0, _LOWEST)

    def refine(step, found_B1):
        guess_B1 = found_B1 + (jnp.int32(1) << (30 - step))
        return jnp.where(holds(guess_B1), guess_B1, found_B1)

    return lax.fori_loop(0, 31, refine, found_B1)


def _draw(logits_BV, keys_B, arrays):
    temperature_B = jnp.where(arrays["temperature"] > 0, arrays["temperature"], 1.0)
    logits_BV = logits_BV / temperature_B[:, None]
    needs_cut = jnp.any((arrays["top_k"] > 0) | (arrays["top_p"] < 1))
    lowest_B1 = lax.cond(
        needs_cut,
        lambda logits_BV: threshold(logits_BV, arrays["top_k"], arrays["top_p"]),
        lambda logits_BV: jnp.full_like(logits_BV[:, :1], -jnp.inf),
        logits_BV,
    )
    likely_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(arrays["min_p"])[:, None]
    logits_BV = jnp.where(logits_BV >= jnp.maximum(lowest_B1, likely_B1), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _counts(history, prompt_B, length_B, vocab_V):
    """Returns (how often each token was generated, whether it was seen at all), [B, V] each."""
    token, row, index = history
    is_there = index < length_B[row]
    is_drawn = is_there & (index >= prompt_B[row])
    zeros_BV = jnp.zeros((len(prompt_B), len(vocab_V)), jnp.float32)
    drawn_BV = zeros_BV.at[row, token].add(is_drawn.astype(jnp.float32))
    return drawn_BV, zeros_BV.at[row, token].add(is_there.astype(jnp.float32)) > 0


def _no_counts(history, prompt_B, length_B, vocab_V):
    shape = len(prompt_B), len(vocab_V)
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)


def _penalise(logits_BV, counts, arrays):
    """Penalties for repetition (Keskar et al. 2019, section 4.1), presence and frequency."""
    drawn_BV, seen_BV = counts
    penalty_B1 = arrays["repetition_penalty"][:, None]
    logits_BV = jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)
    presence_B1, frequency_B1 = arrays["presence_penalty"][:, None], arrays["frequency_penalty"][:, None]
    return logits_BV - jnp.where(drawn_BV > 0, presence_B1, 0) - frequency_B1 * drawn_BV


def _add_bias(logits_BV, arrays):
    return logits_BV.at[jnp.arange(logits_BV.shape[0])[:, None], arrays["bias_token"]].add(arrays["bias"])


def _logprobs(logits_BV, token_B):
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    top, top_tokens = lax.top_k(logprobs_BV, min(MOST_LOGPROBS, logprobs_BV.shape[-1]))
    chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], 1)[:, 0]
    return {"chosen": chosen_B, "top": top, "top_tokens": top_tokens}


def _no_logprobs(logits_BV, token_B):
    shape = (token_B.shape[0], min(MOST_LOGPROBS, logits_BV.shape[-1]))
    return {
        "chosen": jnp.zeros(token_B.shape, jnp.float32),
        "top": jnp.zeros(shape, jnp.float32),
        "top_tokens": jnp.zeros(shape, jnp.int32),
    }
