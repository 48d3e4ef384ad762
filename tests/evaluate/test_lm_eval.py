"""EleutherAI's lm-eval on a model of ours: tasks of local files, offline, against our own figures."""

import functools
import json
import math

import jax
import pytest

pytest.importorskip("lm_eval", reason="lm-eval (extra `eval`) brings some 50 packages and is not part of `test`")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.evaluate.likelihood import Question, measure_choices, measure_text
from llmos_jax.evaluate.lm_eval import HarnessModel, _sampling
from llmos_jax.models import gpt
from llmos_jax.serve.generate import Generator
from llmos_jax.serve.model import LanguageModel
from llmos_jax.train.state import describe_model

CONFIG = gpt.Config(vocab_size=384, context=96, width=32, layers=2, heads=4)
QUESTIONS = [
    {"question": f"What is {a} and {b}?", "choices": [str(a + b), "many", "no idea", str(a)], "label": a % 4}
    for a in range(3, 9)
    for b in range(2)
]
TEXTS = ["import os\nimport sys\n" * 9, "short", "one two three"]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING_TASK = """
task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def model():
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, CONFIG, placement), placement)
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, handle.init(key)))(jax.random.key(0))
    return LanguageModel(None, params, Generator(handle, gpt, CONFIG, ByteTokenizer(), placement))


@pytest.fixture
def evaluate(model, tmp_path):
    def run(task, name, records):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data, cache=tmp_path / "cache"))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = simple_evaluate(
            model=HarnessModel(model), tasks=[name], task_manager=manager, bootstrap_iters=2, log_samples=False
        )
        return found["results"][name]

    return run


def test_multiple_choice(model, evaluate):
    found = evaluate(CHOICE_TASK, "local_choice", QUESTIONS)
    ours = measure_choices(model, [Question(q["question"], tuple(q["choices"]), q["label"]) for q in QUESTIONS])
    assert found["acc,none"] == ours.acc and 0 < ours.acc < 1
    assert found["acc_stderr,none"] == pytest.approx(ours.acc_stderr)


def test_perplexity(model, evaluate):
    found = evaluate(TEXT_TASK, "local_text", [{"text": text} for text in TEXTS])
    ours = measure_text(model, TEXTS, stride=CONFIG.context)
    assert found["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-6)
    whole = [measure_text(model, TEXTS, stride=stride).nats for stride in (1, CONFIG.context)]
    assert not math.isclose(*whole, rel_tol=1e-6)  # the first text has more than one window


def test_generation(model, evaluate):
    written = model.generate([q["question"] for q in QUESTIONS], max_tokens=6, temperature=0.0, stop=("\n",))
    records = [q | {"answer": done.text if i % 3 else "?"} for i, (q, done) in enumerate(zip(QUESTIONS, written, strict=True))]
    assert evaluate(WRITING_TASK, "local_writing", records)["exact_match,none"] == pytest.approx(2 / 3)


def test_requests_of_all_kinds(model):
    harness = HarnessModel(model, batch_size=8, device="cpu")

    def ask(kind, *arguments):
        return getattr(harness, kind)([Instance(kind, {}, args, index) for index, args in enumerate(arguments)])

    (likely,) = model.score(["def"], [" f"])
    assert ask("loglikelihood", ("def ", "f"), ("", "a"))[0] == (pytest.approx(likely.loglikelihood), likely.is_greedy)
    long, short = "x" * 200, "abc"
    settings = {"until": ["e", "\n"], "max_gen_toks": 40}
    found = ask("generate_until", (long, settings), (short, settings | {"max_gen_toks": 3}), (short, settings))
    given = dict(temperature=0.0, stop=("e", "\n"), max_tokens=40)
    assert found[0] == model.generate([list(long.encode())[-56:]], **given)[0].text
    assert found[1:] == [model.generate([short], **given | {"max_tokens": n})[0].text for n in (3, 40)]
    assert ask("loglikelihood") == [] and ask("loglikelihood_rolling") == []
    with pytest.raises(ConfigError, match="max_gen_toks=96 leaves no room"):
        ask("generate_until", ("a", {"max_gen_toks": 96}))
    with pytest.raises(ConfigError, match="has 'num_beams'; known: until"):
        ask("generate_until", ("a", {"num_beams": 4}))
    with pytest.raises(ConfigError, match="give a LanguageModel, or the path"):
        HarnessModel()


def test_it_is_registered():
    assert get_model("llmos") is HarnessModel


def test_settings_of_tasks():
    assert _sampling({"until": "a", "temperature": 0.7}).temperature == 0
    sampled = _sampling({"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.5, "max_gen_toks": 9})
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens, sampled.stop) == (0.7, 0.5, 9, ("a",))
