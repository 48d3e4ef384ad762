"""A model with its tokenizer, ready for use: what `llmos_jax.load` returns."""

import dataclasses
import functools

from llmos_jax.config import parse
from llmos_jax.errors import ConfigError
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.serve.score import Scorer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained model with its tokenizer, on the devices."""

    settings: object
    params: object
    generator: object

    def generate(self, prompts, sampling=None, on_text=None, **choices):
        """Returns one Generation (text, tokens, reason) per prompt; `choices` are fields of SamplingConfig.

        With n above 1 it is a tuple of n Generations per prompt. `on_text(row, text)` is called with each piece of text as it
        appears; a prompt's rows are `n * prompt + choice`.
        """
        sampling = sampling or parse(SamplingConfig, choices)
        return self.generator.generate(self.params, list(prompts), sampling, on_text or (lambda row, text: None))

    def stream(self, prompts, sampling=None, **choices):
        """Yields (row, piece of text) as they appear (see `generate`); a caller who stops asking ends all rows."""
        sampling = sampling or parse(SamplingConfig, choices)
        return self.generator.stream(self.params, list(prompts), sampling)

    def chat(self, messages, sampling=None, on_text=None, **choices):
        """Returns the Generation that answers `messages` ({"role", "content"}), by the chat template that the model came with.

        Raises ConfigError when it has none, when the template refuses the messages, or n is not 1. The rest is as in
        `generate`.
        """
        sampling = sampling or parse(SamplingConfig, choices)
        check_conversation(sampling)
        return self.generate([self._chat_prompt(messages)], sampling, on_text)[0]

    def stream_chat(self, messages, sampling=None, **choices):
        """Yields the pieces of text that answer `messages` (see `chat`); a caller who stops asking ends it."""
        sampling = sampling or parse(SamplingConfig, choices)
        check_conversation(sampling)
        for _, piece in self.stream([self._chat_prompt(messages)], sampling):
            yield piece

    def check_chat(self):
        """Raises ConfigError when the model came without a chat template."""
        if getattr(self.generator.tokenizer, "chat_template", None) is None:
            raise ConfigError("this model's tokenizer has no chat template: give text to `generate`.")

    def _chat_prompt(self, messages):
        self.check_chat()
        return self.generator.tokenizer.chat_prompt(messages)

    def beam_search(self, prompts, beams=4, max_tokens=64, length_penalty=1.0):
        """Returns, per prompt, a tuple of its `beams` best Hypotheses (text, tokens, reason, loglikelihood, score).

        score: log-likelihood / tokens ** length_penalty; above 0 favours longer continuations, 0 is the log-likelihood itself.
        """
        given = dict(beams=beams, max_tokens=max_tokens, length_penalty=length_penalty)
        return self.generator.beam_search(self.params, list(prompts), **given)

    def score(self, prompts, continuations, stride=None):
        """Returns a Score (loglikelihood, token_logprobs, tokens, is_greedy) per pair (see `Scorer.score`)."""
        return self._scorer.score(self.params, list(prompts), list(continuations), stride)

    def embed(self, texts, pooling="mean"):
        """Returns float32 [N, D]: the last hidden states of each text, their "mean" or the "last" (see `Scorer.embed`)."""
        return self._scorer.embed(self.params, list(texts), pooling)

    @functools.cached_property
    def _scorer(self):
        return Scorer(self.generator.handle, self.generator.config, self.generator.tokenizer)


def check_conversation(sampling):
    """Raises ConfigError when a SamplingConfig asks for more than one answer."""
    if sampling.n != 1:
        raise ConfigError(f"n={sampling.n}: a conversation goes on with one answer.")
