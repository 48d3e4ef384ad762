"""Text from a trained model: prompts in, continuations out, piece by piece as the engine draws their tokens."""

import dataclasses

from llmos_jax.errors import ConfigError
from llmos_jax.serve import beam
from llmos_jax.serve.engine import Engine


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation: its text, its tokens, and why it ended ("end", "stop", "length" or "context").

    logprobs: for each token (its own, {token: of the likeliest}), where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    logprobs: tuple = ()


class Generator:
    """A language model ready to generate; compiled programs are kept between calls, and the weights of the last one.

    `handle`: `merge(params)` gives the module. `family`: the model's module (`cache_shapes`). `config`: its Config.
    `settings`: an EngineConfig.
    """

    def __init__(self, handle, family, config, tokenizer, placement, settings=None):
        self.handle, self.family, self.config = handle, family, config
        self.tokenizer, self.placement, self.settings = tokenizer, placement, settings
        self._engine, self._params = None, None

    def engine(self, params):
        """Returns the Engine, with these weights."""
        if self._engine is None:
            vocabulary = dict(vocab_size=self.tokenizer.vocab_size, end_ids=self.tokenizer.end_ids)
            self._engine = Engine(self.handle, self.family, self.config, params, **vocabulary, settings=self.settings)
        elif self._params is not params:
            self._engine.load(params)
        self._params = params
        return self._engine

    def release(self):
        """Gives the memory of weights and cache back, until the next call."""
        self._params = None
        if self._engine is not None:
            self._engine.release()

    def generate(self, params, prompts, sampling, on_text=lambda row, text: None):
        """Returns one Generation per prompt (text, or its tokens); `on_text(row, text)` is called with every piece of text.

        With `sampling.n` above 1 it is a tuple of n Generations per prompt, whose rows are `n * prompt + choice`; they share
        the pages of their prompt. Every row draws from its own random stream, so a prompt's continuation does not depend on
        its neighbours. Raises ConfigError when a prompt does not fit the model's context.
        """
        rows, states = self._start(prompts, sampling, on_text)
        for _ in self._run(self.engine(params), rows, states, sampling):
            pass
        done = [state.finish() for state in states]
        return done if sampling.n == 1 else [tuple(done[row : row + sampling.n]) for row in range(0, len(done), sampling.n)]

    def stream(self, params, prompts, sampling):
        """Yields (row, piece of text) as they appear (see `generate`); a caller who stops asking ends all rows."""
        pieces = []
        rows, states = self._start(prompts, sampling, lambda row, text: pieces.append((row, text)))
        for _ in self._run(self.engine(params), rows, states, sampling):
            yield from pieces
            pieces.clear()
        for state in states:
            state.finish()
        yield from pieces

    def beam_search(self, params, prompts, *, beams, max_tokens, length_penalty):
        """Returns a tuple of Hypotheses per prompt (text, or its tokens), best first (see `beam.search`)."""
        rows = [self._prompt(text, index) for index, text in enumerate(prompts)]
        given = dict(beams=beams, max_tokens=max_tokens, length_penalty=length_penalty)
        return beam.search(self.engine(params), rows, self.tokenizer.decode, **given)

    def _start(self, prompts, sampling, on_text):
        rows = [tokens for index, text in enumerate(prompts) for tokens in [self._prompt(text, index)] * sampling.n]
        if not rows:
            raise ConfigError("there is no prompt to continue.")
        return rows, [_Row(self.tokenizer, sampling, on_text, index) for index in range(len(rows))]

    def _run(self, engine, rows, states, sampling):
        """Yields whenever a row has news, until all have ended."""
        for index, event in engine.stream(rows, sampling):
            states[index].push(event)
            if states[index].reason == "stop":
                engine.cancel(event.id, "stop")
            yield

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
        self.decoder = tokenizer.stream_decoder()
        self.sampling, self.on_text, self.index = sampling, on_text, index
        self.tokens, self.logprobs, self.text, self.shown, self.reason = [], [], "", 0, ""

    def push(self, event):
        """Takes the tokens of an Event, up to one that completes a stop text."""
        for number, token in enumerate(event.tokens):
            if self.reason:
                return
            self.tokens.append(token)
            self.logprobs += event.logprobs[number : number + 1]
            self._add(self.decoder.push(token))
        self.reason = self.reason or event.reason

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
        return Generation(self.text, tuple(self.tokens), self.reason, tuple(self.logprobs))


def _held_back(text, stops):
    """Returns how many last characters of `text` may be the beginning of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
