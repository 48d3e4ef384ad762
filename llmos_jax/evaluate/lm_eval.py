"""EleutherAI's lm-eval on a loaded model (extra `eval`). Importing this registers the model "llmos" there.

import lm_eval
from llmos_jax.evaluate.lm_eval import HarnessModel

lm_eval.simple_evaluate(model=HarnessModel(llmos_jax.load("runs/gpt")), tasks=["hellaswag"])
lm_eval.simple_evaluate(model="llmos", model_args="path=runs/gpt", tasks=["hellaswag"])
"""

import collections

import llmos_jax
from llmos_jax.config import parse, to_json
from llmos_jax.errors import ConfigError
from llmos_jax.serve.sample import SamplingConfig

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ConfigError("lm-eval's tasks need it: pip install 'llmos-jax[eval]'.") from None

_MOST_TOKENS = 256  # where a task does not say
# What tasks may say of how to generate, and what SamplingConfig calls it.
_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")}
_SAMPLING |= {"max_gen_toks": "max_tokens", "max_new_tokens": "max_tokens"}


@register_model("llmos")
class HarnessModel(LM):
    """A LanguageModel as lm-eval asks for one; given itself, or the `path` that `llmos_jax.load` takes.

    batch_size, max_batch_size and device are what lm-eval says to every model: rows are batched by length here, and JAX
    knows its devices, so they change nothing.
    """

    def __init__(self, model=None, path=None, batch_size=None, max_batch_size=None, device=None):
        super().__init__()
        if (model is None) == (path is None):
            raise ConfigError("give a LanguageModel, or the path of one: --model_args path=runs/gpt or path=hf:FOLDER.")
        self.model = llmos_jax.load(path) if model is None else model

    def loglikelihood(self, requests):
        """Returns (log-likelihood, whether greedy decoding writes it) of each (context, continuation).

        Blanks at a context's end go to the continuation, as in lm-eval's own models: tokens begin with them.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            end = len(context.rstrip())
            pairs.append((context[:end], context[end:] + continuation))
        scores = self.model.score(*zip(*pairs, strict=True)) if pairs else []
        return self._remembered("loglikelihood", requests, [(score.loglikelihood, score.is_greedy) for score in scores])

    def loglikelihood_rolling(self, requests):
        """Returns the log-likelihood of each whole text, in lm-eval's windows: each begins where the one before ended."""
        texts = [request.args[0] for request in requests]
        scores = self.model.score([""] * len(texts), texts, stride=self.model.generator.config.context)
        return self._remembered("loglikelihood_rolling", requests, [score.loglikelihood for score in scores])

    def generate_until(self, requests):
        """Returns the continuation of each (context, settings) up to one of its texts "until".

        A context that leaves no room for max_gen_toks tokens loses its beginning. Raises ConfigError on a setting that is
        not known here.
        """
        grouped, found = collections.defaultdict(list), [None] * len(requests)
        for index, request in enumerate(requests):
            grouped[to_json(request.args[1])].append(index)
        for indices in grouped.values():
            sampling = _sampling(requests[indices[0]].args[1])
            prompts = [self._cut(requests[index].args[0], sampling.max_tokens) for index in indices]
            for index, done in zip(indices, self.model.generate(prompts, sampling), strict=True):
                found[index] = done.text
        return self._remembered("generate_until", requests, found)

    def _cut(self, text, most):
        tokens, room = self.model.generator.tokenizer.prompt(text).tolist(), self.model.generator.config.context - most
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={most} leaves no room for a prompt in the model's context of {most + room}: lower it "
                "(--gen_kwargs max_gen_toks=N)."
            )
        return tokens[-room:]

    def _remembered(self, kind, requests, results):
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def _sampling(settings):
    """Returns the SamplingConfig of a task's generation_kwargs; greedy unless it says do_sample."""
    settings = dict(settings)
    stop = settings.pop("until", None) or ()
    is_sampled = settings.pop("do_sample", False)
    unknown = sorted(settings.keys() - _SAMPLING.keys())
    if unknown:
        raise ConfigError(f"generation_kwargs has {unknown[0]!r}; known: until, do_sample, {', '.join(sorted(_SAMPLING))}.")
    chosen = {"max_tokens": _MOST_TOKENS, "temperature": 1.0} | {_SAMPLING[name]: value for name, value in settings.items()}
    chosen |= {} if is_sampled else {"temperature": 0.0}
    return parse(SamplingConfig, chosen | {"stop": [stop] if isinstance(stop, str) else list(filter(None, stop))})
