"""Checkpoints of transformers become runs, models and starts of training, and runs become such checkpoints."""

import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest

import llmos_jax
from llmos_jax import config, main
from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError, DataIdentityMismatch, RunDirectoryError
from llmos_jax.interop import huggingface
from llmos_jax.models import llama
from llmos_jax.train.state import describe_model
from tests.interop.reference import tensors

CONFIG = llama.Config(
    vocab_size=320, context=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp=48, window=16,
    has_qkv_bias=True, is_tied=True,
)  # fmt: skip
GREEDY = dict(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder as transformers writes it: a small Qwen2 in bfloat16, whose tokens are bytes."""
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(llama.build, CONFIG, placement), placement)
    params = jax.tree.map(lambda x: 5 * x, jax.jit(handle.init)(jax.random.key(0)))
    folder = tmp_path_factory.mktemp("source") / "qwen"
    config_file = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "something_of_theirs": 5}
    _, tree = huggingface.check_target(folder, CONFIG)
    huggingface.save_checkpoint(
        params, CONFIG, folder, dtype="bfloat16", original=tree | config_file | {"torch_dtype": "bfloat16"},
        files=ByteTokenizer().to_files(),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "imported"
    assert main.main(["llmos", "convert", f"--from=hf:{source}", f"--workdir={directory}"]) == 0
    return directory


def test_a_run_of_it_generates_what_it_generates(source, run):
    prompts = ["def f(", "x"]
    expected = llmos_jax.load(f"hf:{source}").generate(prompts, **GREEDY)
    assert [done.tokens for done in llmos_jax.load(run).generate(prompts, **GREEDY)] == [done.tokens for done in expected]
    assert len({done.tokens for done in expected}) == 2 and all(len(done.tokens) == 12 for done in expected)


def test_chats_go_by_the_template_that_came_with_it(source, run):
    model = llmos_jax.load(run)
    with pytest.raises(ConfigError, match="has no chat template"):
        model.chat([{"role": "user", "content": "hi"}])
    tokenizer = model.generator.tokenizer
    tokenizer.files["chat_template.jinja"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    answer = model.chat([{"role": "user", "content": "hi"}], **GREEDY)
    assert answer.tokens == model.generate([list(b"user: hi\nbot:")], **GREEDY)[0].tokens


def test_the_chat_verb_talks_through_a_pipe(source, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "talking"
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:")
    model = llmos_jax.load(f"hf:{folder}")
    talk = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    first = model.chat(talk, max_tokens=4, temperature=0.0).text
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "and"}]
    expected = f"{first}\n{model.chat(talk, max_tokens=4, temperature=0.0).text}\n"
    arguments = ["llmos", "chat", f"--workdir=hf:{folder}", "--system=be", "--max_tokens=4", "--temperature=0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand\n/exit\nnever"))
    assert main.main(arguments) == 0 and capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\nhi\n"))
    assert main.main(arguments) == 78
    captured = capsys.readouterr()
    assert captured.out == "" and "there is no /nonsense" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main.main([arguments[0], "chat", f"--workdir=hf:{source}"]) == 78
    assert "no chat template" in capsys.readouterr().err


def test_there_and_back_is_bit_identical(source, run, tmp_path):
    target = tmp_path / "target"
    assert main.main(["llmos", "convert", f"--to=hf:{target}", f"--workdir={run}"]) == 0
    before, after = tensors(source), tensors(target)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() and after[name].dtype.name == "bfloat16" for name in before)
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (source / name).read_text() == (target / name).read_text()
    with pytest.raises(ConfigError, match="is there already"):
        llmos_jax.export_checkpoint(run, target)


def test_training_begins_with_it(source, tmp_path):
    """An update that is almost none leaves its weights; architecture and tokenizer are its own."""
    overrides = {
        "train.init_from": f"hf:{source}",
        "train.steps": "1",
        "optim.learning_rate": "1e-9",
        "optim.weight_decay": "0.0",
        "model.remat": "full",
        "task.sample_tokens": "4",
    }
    settings, _ = llmos_jax.load_settings("experiments/gpt.py:smoke", overrides.items())
    assert settings.model == config.parse(llama.Config, config.to_plain(CONFIG) | {"remat": "full"})
    assert settings.data.tokenizer == str(source / "tokenizer.json")
    llmos_jax.run_training(settings, tmp_path / "run")
    found = jax.tree.leaves(llmos_jax.load(tmp_path / "run").params)
    for ours, theirs in zip(found, jax.tree.leaves(llmos_jax.load(f"hf:{source}").params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # What was trained goes out in float32, with a config of its own.
    llmos_jax.export_checkpoint(tmp_path / "run", tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tree["architectures"] == ["Qwen2ForCausalLM"] and tree["eos_token_id"] == 256
    assert llmos_jax.load(f"hf:{tmp_path / 'out'}").settings.model.window == 16


def test_what_does_not_belong_together_is_refused(source, run):
    from llmos_jax import convert

    with pytest.raises(RunDirectoryError, match="holds a run already"):
        llmos_jax.import_checkpoint(f"hf:{source}", run)
    settings, _ = llmos_jax.load_settings("experiments/gpt.py:smoke", [("train.init_from", f"hf:{source}")])
    with pytest.raises(DataIdentityMismatch, match="has another tokenizer"):
        convert.warm_start(settings, {"tokenizer.json": json.dumps(ByteTokenizer().to_json())}, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "needs either --from"),
        (["--from=hf:a", "--to=hf:b"], "needs either --from"),
        (["--from=a"], "hf:a, not a"),
        (["--from=hf:/no/such", "--workdir=none"], "there is no folder /no/such"),
    ],
)
def test_flags(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["llmos", "convert", *flags]) == 78
    assert words in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_dtypes_are_checked(run, tmp_path, capsys):
    assert main.main(["llmos", "convert", f"--to=hf:{tmp_path / 'x'}", f"--workdir={run}", "--dtype=int8"]) == 78
    assert "--dtype=int8 is not one of" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
