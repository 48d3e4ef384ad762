"""Beam search: the likeliest continuations of prompts, offline, every beam a request of one token to the engine.

The engine knows a beam's full pages from the step before, whichever beam it grew from, so a step computes at most a page of
tokens a beam. The search itself is plain Python over the log-probabilities of the likeliest tokens.
"""

import dataclasses

from llmos_jax.errors import ConfigError
from llmos_jax.serve.sample import MOST_LOGPROBS, SamplingConfig

# Added to the logits of tokens that end, when one token is drawn: what ends a request is told without its log-probabilities.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A continuation that beam search found: its text and tokens (without one that ends it), and why it ended.

    loglikelihood: of all tokens, the ending one included, in nats. score: the same / (number of tokens ** length_penalty).
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    loglikelihood: float
    score: float


class _Search:
    """The beams of one prompt. `running`: [(tokens, sum of log-probabilities)], best first; `found`: Hypotheses."""

    def __init__(self, prompt, beams, limit, penalty, last_reason):
        self.prompt, self.beams, self.limit, self.penalty, self.last_reason = prompt, beams, limit, penalty, last_reason
        self.running, self.found = [((), 0.0)], []

    def advance(self, alternatives, end_ids, decode):
        """Takes the {token: log-probability} of what may follow each running beam."""
        candidates = [
            (total + value, (*tokens, token))
            for (tokens, total), likely in zip(self.running, alternatives, strict=True)
            for token, value in likely.items()
            if value > float("-inf")
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: the better beam first
        self.running = []
        for rank, (total, tokens) in enumerate(candidates):
            is_end = tokens[-1] in end_ids
            if is_end or len(tokens) == self.limit:
                if rank < self.beams:
                    self._finish(tokens, total, is_end, decode)
            elif len(self.running) < self.beams:
                self.running.append((tokens, total))
        self.found = sorted(self.found, key=lambda hypothesis: -hypothesis.score)[: self.beams]
        if self.running and len(self.found) == self.beams and self._bound() <= self.found[-1].score:
            self.running = []

    def _finish(self, tokens, total, is_end, decode):
        shown = tokens[:-1] if is_end else tokens
        score = total / len(tokens) ** self.penalty
        self.found.append(Hypothesis(decode(shown), shown, "end" if is_end else self.last_reason, total, score))

    def _bound(self):
        """Returns what no running beam's score can exceed: sums only fall, and lengths are known to lie between two."""
        tokens, total = self.running[0]
        return total / max((len(tokens) + 1) ** self.penalty, self.limit**self.penalty)


def search(engine, prompts, decode, *, beams, max_tokens, length_penalty):
    """Returns, for each prompt (tokens), its `beams` best Hypotheses, best first.

    A step takes the `beams` likeliest of all continuations by a token that don't end; those that do are kept when they are
    among the `beams` likeliest. The search ends when nothing that runs can be better than what is kept (transformers calls it
    early_stopping="never"), so a larger length_penalty, which favours longer ones, takes longer. decode: tokens to text.

    Raises ConfigError when `beams` and the tokens that end are more than the engine tells log-probabilities of, and for rows
    whose length turns all positions (dynamic, longrope): a beam is given to the engine as a prompt, so its angles would change.
    """
    most = MOST_LOGPROBS - len(engine.end_ids)
    if not 1 <= beams <= most:
        raise ConfigError(f"beams={beams} must be at least 1 and at most {most}.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1.")
    searches = []
    for prompt in prompts:
        room = engine.config.context + 1 - len(prompt)
        limit, stretched = min(max_tokens, room), engine.config.stretched_from
        longest = len(prompt) + limit - 1  # the last token is never read
        if stretched is not None and longest > max(stretched, len(prompt)):
            raise ConfigError(
                f"beam search over rows of up to {longest} tokens: beyond {stretched} this model's rotary positions depend on "
                "a row's length, and beams would not be comparable; lower max_tokens, or use `generate`."
            )
        reason = "length" if max_tokens <= room else "context"
        searches.append(_Search(prompt, beams, limit, length_penalty, reason))
    sampling = SamplingConfig(
        max_tokens=1,
        temperature=0.0,
        logprobs=beams + len(engine.end_ids),
        logit_bias={str(token): _NEVER for token in sorted(engine.end_ids)},
    )
    while running := [search for search in searches if search.running]:
        asked = [[*search.prompt, *tokens] for search in running for tokens, _ in search.running]
        told = iter([logprobs[0][1] for _, _, logprobs in engine.generate(asked, sampling)])
        for one in running:
            one.advance([next(told) for _ in one.running], engine.end_ids, decode)
    return [tuple(search.found) for search in searches]
