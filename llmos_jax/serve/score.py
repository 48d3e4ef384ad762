"""Reading text with a model: log-likelihoods of continuations, and hidden states of texts as embeddings.

Rows are sorted by length into a fixed set of shapes and run through the whole-row forward pass of training: nothing is drawn,
so no cache is needed. What a row gets does not depend on its neighbours or on the padding behind it.
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compute import memory
from llmos_jax.errors import ConfigError
from llmos_jax.models import head

POOLINGS = ("mean", "last")
_LEAST_LENGTH = 32
# Of a dispatch: beyond it larger products gain nothing, and hidden states take memory.
_MOST_TOKENS = 2**13


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a continuation, in nats.

    loglikelihood: of all of it; token_logprobs: of each of its `tokens`. is_greedy: whether greedy decoding writes exactly it.
    """

    loglikelihood: float
    token_logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Window:
    """A piece of text number `text` that fits the context: tokens [start, stop) are read, targets from `scored` on count.

    Target i of a text is its token i + 1.
    """

    text: int
    start: int
    stop: int
    scored: int


class Scorer:
    """A language model ready to read; compiled programs are kept between calls.

    handle: `merge(params)` gives the module; config: its Config. `shapes` counts the programs: {(kind, rows, length)}.
    """

    def __init__(self, handle, config, tokenizer):
        self.handle, self.config, self.tokenizer, self.placement = handle, config, tokenizer, handle.placement
        self.shapes = set()
        plan, shards = self.placement.pipeline, self.placement.axis_size("length")
        self._least_rows = self.placement.axis_size("batch") * (plan.microbatches if plan else 1)
        multiple = 2 * shards if shards > 1 else 1
        lengths = {min(_LEAST_LENGTH << step, config.context) for step in range(config.context.bit_length())}
        self._lengths = sorted({-(-length // multiple) * multiple for length in lengths})
        whole = self.placement.sharding()
        self._programs = {
            "score": jax.jit(self._score, out_shardings=whole),
            **{kind: jax.jit(getattr(self, f"_{kind}"), out_shardings=whole) for kind in POOLINGS},
        }

    def score(self, params, prompts, continuations, stride=None):
        """Returns the Score of each continuation behind its prompt.

        Either is a text or its tokens. Two texts are encoded as one; the continuation is what differs from the prompt's own
        tokens, which may begin a token early where the two merge. An empty prompt is a document's start.

        A row longer than the context is read in windows, each token scored once: the first window scores all that fits, each
        further one `stride` tokens (none: half the context) behind at least `context - stride` others. stride=1 gives every
        token all the context that there is, and costs a pass a token.
        """
        stride = max(1, self.config.context // 2) if stride is None else stride
        if not 1 <= stride <= self.config.context:
            raise ConfigError(f"stride={stride} must be at least 1 and at most the model's context of {self.config.context}.")
        if len(prompts) != len(continuations):
            raise ConfigError(f"{len(prompts)} prompts and {len(continuations)} continuations: give as many of each.")
        pairs = [self._encode(*pair, index) for index, pair in enumerate(zip(prompts, continuations, strict=True))]
        windows = [
            _Window(text, *window)
            for text, (tokens, first) in enumerate(pairs)
            for window in _windows(len(tokens) - 1, first - 1, self.config.context, stride)
        ]
        rows = [(pairs[w.text][0][w.start : w.stop], pairs[w.text][0][w.start + 1 : w.stop + 1]) for w in windows]
        logprobs, best = [[] for _ in pairs], [[] for _ in pairs]
        for window, (row_logprobs, row_best) in zip(windows, self._run("score", params, rows), strict=True):
            there = slice(window.scored - window.start, window.stop - window.start)
            logprobs[window.text] += row_logprobs[there].tolist()
            best[window.text] += row_best[there].tolist()
        return [
            Score(math.fsum(values), tuple(values), tuple(tokens[first:]), likeliest == tokens[first:])
            for (tokens, first), values, likeliest in zip(pairs, logprobs, best, strict=True)
        ]

    def embed(self, params, texts, pooling="mean"):
        """Returns float32 [N, D]: the hidden states of each text (or its tokens) after the last norm, pooled.

        pooling: "mean" over all tokens that the model is given for a prompt (`tokenizer.prompt`), or the "last" one's. Raises
        ConfigError when a text does not fit the context.
        """
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}.")
        rows = [(self._tokens(text, f"text {index}"), None) for index, text in enumerate(texts)]
        for index, (tokens, _) in enumerate(rows):
            if len(tokens) > self.config.context:
                raise ConfigError(
                    f"text {index} has {len(tokens)} tokens; the model's context is {self.config.context}: cut it."
                )
        found = [pooled for (pooled,) in self._run(pooling, params, rows)]
        return np.stack(found) if found else np.zeros((0, self.config.width), np.float32)

    def _encode(self, prompt, continuation, index):
        """Returns (tokens of both, index of the continuation's first one)."""
        tokens = self._tokens(prompt, f"prompt {index}")
        if isinstance(continuation, str) and isinstance(prompt, str):
            whole = self.tokenizer.prompt(prompt + continuation).tolist()
            equal = (a == b for a, b in zip(tokens, whole, strict=False))
            first = max(1, next((place for place, is_equal in enumerate(equal) if not is_equal), min(len(tokens), len(whole))))
            return whole, first
        rest = self.tokenizer.encode(continuation).tolist() if isinstance(continuation, str) else list(map(int, continuation))
        return tokens + self._checked(rest, f"continuation {index}"), len(tokens)

    def _tokens(self, text, name):
        tokens = self.tokenizer.prompt(text).tolist() if isinstance(text, str) else list(map(int, text))
        if not tokens:
            raise ConfigError(f"{name} has no tokens: give it at least one, or a text.")
        return self._checked(tokens, name)

    def _checked(self, tokens, name):
        wrong = next((token for token in tokens if not 0 <= token < self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"{name} has the token {wrong}; the vocabulary has {self.tokenizer.vocab_size}.")
        return tokens

    def _run(self, kind, params, rows):
        """Returns what program `kind` tells of each row, (tokens, targets or None): a tuple of arrays."""
        by_length = collections.defaultdict(list)
        for index, (tokens, _) in enumerate(rows):
            by_length[next(length for length in self._lengths if length >= len(tokens))].append(index)
        found, pending = [None] * len(rows), []
        parts = functools.partial(_weights, params)
        with memory.explained("while it read", parts, "give shorter texts, or lay the weights over more devices (mesh.model)"):
            for length, indices in sorted(by_length.items()):
                for chunk, count in self._chunks(indices, length):
                    arrays = self._arrays([rows[index] for index in chunk], count, length)
                    self.shapes.add((kind, count, length))
                    pending.append((chunk, self._programs[kind](params, arrays)))
            for chunk, outputs in pending:
                outputs = [np.asarray(output) for output in outputs]
                for place, index in enumerate(chunk):
                    found[index] = tuple(output[place] for output in outputs)
        return found

    def _chunks(self, indices, length):
        """Yields (some of `indices`, rows of the program that takes them): 1, 4, 16 ... times the least that fill the mesh."""
        ladder = [self._least_rows]
        while 4 * ladder[-1] * length <= _MOST_TOKENS:
            ladder.append(4 * ladder[-1])
        while indices:
            chunk, indices = indices[: ladder[-1]], indices[ladder[-1] :]
            yield chunk, next(rows for rows in ladder if rows >= len(chunk))

    def _arrays(self, rows, count, length):
        tokens_BL, targets_BL = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
        length_B = np.zeros(count, np.int32)
        for row, (tokens, targets) in enumerate(rows):
            tokens_BL[row, : len(tokens)], length_B[row] = tokens, len(tokens)
            targets_BL[row, : len(tokens)] = tokens if targets is None else targets
        return {"tokens": tokens_BL, "targets": targets_BL, "length": length_B}

    def _hidden(self, params, rows):
        """Returns (the model, hidden states [B, L, D] and which of them are of tokens [B, L], both as the length lies)."""
        model, length = self.handle.merge(params), rows["tokens"].shape[1]
        last_B1 = jnp.maximum(rows["length"][:, None] - 1, 0)
        place_L = jnp.arange(length)
        # Padding repeats the last position: scalings by a row's length must not see it.
        positions_BL, is_there_BL = jnp.minimum(place_L, last_B1), place_L < rows["length"][:, None]
        tokens_BL, positions_BL, is_there_BL = (self._laid(x) for x in (rows["tokens"], positions_BL, is_there_BL))
        return model, model.hidden(tokens_BL, positions_BL, is_there_BL.astype(jnp.int32)), is_there_BL

    def _laid(self, x_BL):
        """Returns an array as the placement lays rows and their length."""
        order = self.placement.length_order(x_BL.shape[1])
        x_BL = x_BL if order is None else x_BL[:, order]
        return self.placement.constrain(x_BL, "batch", "length")

    def _in_order(self, x_BL):
        order = self.placement.length_order(x_BL.shape[1])
        return x_BL if order is None else x_BL[:, np.argsort(order)]

    def _score(self, params, rows):
        model, hidden_BLD, _ = self._hidden(params, rows)
        logprobs_BL, best_BL = head.target_logprobs(
            hidden_BLD,
            model.head_weight,
            self._laid(rows["targets"]),
            vocab_size=self.tokenizer.vocab_size,
            softcap=model.logits_softcap,
            placement=self.placement,
        )
        return self._in_order(logprobs_BL), self._in_order(best_BL)

    def _mean(self, params, rows):
        _, hidden_BLD, is_there_BL = self._hidden(params, rows)
        total_BD = jnp.where(is_there_BL[..., None], hidden_BLD.astype(jnp.float32), 0).sum(1)
        return (total_BD / jnp.maximum(rows["length"][:, None], 1),)

    def _last(self, params, rows):
        _, hidden_BLD, _ = self._hidden(params, rows)
        is_last_BL = self._laid(jnp.arange(hidden_BLD.shape[1]) == rows["length"][:, None] - 1)
        return (jnp.where(is_last_BL[..., None], hidden_BLD.astype(jnp.float32), 0).sum(1),)


def _windows(targets, first, context, stride):
    """Yields (start, stop, scored) of the windows that read targets [first, targets) (see `Scorer.score`)."""
    while first < targets:
        stop = min(targets, max(first + stride, context))
        yield max(0, stop - context), stop, first
        first = stop


def _weights(params):
    return {"weights": memory.bytes_per_device(params)}
