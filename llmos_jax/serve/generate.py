"""Text from a trained model: batched prompts in, sampled continuations out, token by token with a KV cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import ConfigError
from llmos_jax.models.stack import unstack
from llmos_jax.serve.cache import init_cache, round_up
from llmos_jax.serve.sample import choose

# A product with one row misses XLA:CPU's fast library (and low precision converts all weights); two rows don't.
_LEAST_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation: its text, its tokens, and why it ended ("end", "stop", "length" or "context")."""

    text: str
    tokens: tuple[int, ...]
    reason: str


class Generator:
    """A language model ready to generate; compiled programs are kept between calls.

    `handle`: `merge(params)` gives the module. `family`: the model's module (`cache_shapes`). `config`: its Config.
    """

    def __init__(self, handle, family, config, tokenizer, placement):
        self.handle, self.family, self.config = handle, family, config
        self.tokenizer, self.placement = tokenizer, placement
        self._unstack = jax.jit(functools.partial(unstack, count=config.layers))
        self._steps = {}

    def generate(self, params, prompts, sampling, on_text=lambda row, text: None):
        """Returns one Generation per prompt (text, or its tokens); `on_text(row, text)` is called with every piece of text.

        Every row draws from its own random stream, so a prompt's continuation does not depend on its neighbours. Raises
        ConfigError when a prompt does not fit the model's context.
        """
        rows = [self._prompt(text, index) for index, text in enumerate(prompts)]
        if not rows:
            raise ConfigError("there is no prompt to continue.")
        count, width = max(len(rows), _LEAST_ROWS), min(round_up(max(map(len, rows))), self.config.context)
        tokens = np.full((count, width), self.tokenizer.end_id, np.int32)
        first = np.full((count,), width - 1, np.int32)  # padding rows hold one token
        for index, ids in enumerate(rows):
            tokens[index, width - len(ids) :] = ids
            first[index] = width - len(ids)
        length = round_up(width + min(sampling.max_tokens, self.config.context))
        layers = self._unstack(params["stack"]["blocks"])
        # What goes in is NumPy's and what comes out is whole on every device: so it is with many processes, too.
        dtype = self.handle.merge(params).dtype
        shape, depth = self.family.cache_shapes(self.config, count, length)
        cache = init_cache(shape, depth, dtype, self.placement)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(jnp.arange(count))
        keys = np.asarray(jax.random.key_data(keys))
        states = [_Row(self.tokenizer, sampling, on_text, index) for index in range(len(rows))]
        step = self._step(sampling)
        inputs, start = tokens, 0
        for drawn in range(sampling.max_tokens):
            chosen, cache = step(params, layers, inputs, cache, np.int32(start), first, keys, np.int32(drawn))
            start += inputs.shape[1]
            for state, token, row in zip(states, np.asarray(chosen), rows, strict=False):
                state.push(int(token), is_full=len(row) + drawn >= self.config.context)
            if all(state.reason for state in states):
                break
            inputs = chosen[:, None]
        return [state.finish() for state in states]

    def _step(self, sampling):
        """Returns the compiled step; only what shapes the program selects it (length, seed and stop texts are data)."""
        shaping = dataclasses.replace(sampling, max_tokens=1, seed=0, stop=())
        if shaping not in self._steps:
            outputs = (self.placement.sharding(), None)
            self._steps[shaping] = jax.jit(functools.partial(self._decode, shaping), donate_argnums=(3,), out_shardings=outputs)
        return self._steps[shaping]

    def _decode(self, sampling, params, layers, tokens_BL, cache, start, first_B, keys_B, drawn):
        model = self.handle.merge(params)
        start_B = jnp.full(first_B.shape, start, jnp.int32)
        hidden_BLD, cache = model.decode(tokens_BL, model.stack.bind(layers), cache, start_B, first_B)
        logits_BV = model.logits(hidden_BLD[:, -1:])[:, 0]
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < self.tokenizer.vocab_size, logits_BV, -jnp.inf)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys_B), drawn)
        return choose(logits_BV, keys_B, sampling), cache

    def _prompt(self, text, index):
        ids = self.tokenizer.prompt(text).tolist() if isinstance(text, str) else [int(token) for token in text]
        if len(ids) >= self.config.context:
            raise ConfigError(
                f"prompt {index} has {len(ids)} tokens; the model's context is {self.config.context}: shorten the prompt."
            )
        return ids


class _Row:
    """Turns the tokens of one row into text, holding back what may become a stop text."""

    def __init__(self, tokenizer, sampling, on_text, index):
        self.decoder, self.end_ids = tokenizer.stream_decoder(), tokenizer.end_ids
        self.sampling, self.on_text, self.index = sampling, on_text, index
        self.tokens, self.text, self.shown, self.reason = [], "", 0, ""

    def push(self, token, is_full):
        if self.reason:
            return
        if token in self.end_ids:
            self.reason = "end"
            return
        self.tokens.append(token)
        self._add(self.decoder.push(token))
        if not self.reason and len(self.tokens) >= self.sampling.max_tokens:
            self.reason = "length"
        if not self.reason and is_full:
            self.reason = "context"

    def _add(self, piece):
        self.text += piece
        for stop in self.sampling.stop:
            # A stop text can begin in what was held back, never in what was shown.
            found = self.text.find(stop, self.shown)
            if found >= 0:
                self.text, self.reason = self.text[:found], "stop"
        held = 0 if self.reason else _held_back(self.text[self.shown :], self.sampling.stop)
        self._show(len(self.text) - held)

    def _show(self, end):
        if end > self.shown:
            self.on_text(self.index, self.text[self.shown : end])
            self.shown = end

    def finish(self):
        if self.reason != "stop":
            self.text += self.decoder.flush()
            self._show(len(self.text))
        return Generation(self.text, tuple(self.tokens), self.reason or "length")


def _held_back(text, stops):
    """Returns how many last characters of `text` may be the beginning of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
