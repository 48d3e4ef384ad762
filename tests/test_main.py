"""The command line as a user meets it: one clear line for every mistake, exit codes, verbs, experiments, notebook."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import jax
import pytest

from llmos_jax import api
from llmos_jax.compute.sharding import make_placement
from llmos_jax.main import _VERBS, _parse, main
from llmos_jax.models import gpt
from llmos_jax.train.lease import RunDirectoryLease
from llmos_jax.train.settings import check_batch
from llmos_jax.train.state import describe_model

EXPERIMENTS = sorted(pathlib.Path("experiments").glob("*.py"))


# As a user has it: one device.
FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def llmos(*arguments):
    command = [sys.executable, "-m", "llmos_jax.main", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """The smoke run of every experiment, by the command line, as a user starts it."""
    directory = tmp_path_factory.mktemp("runs")
    for path in EXPERIMENTS:
        start = time.monotonic()
        verb = ["prepare"] if path.stem == "prepare" else []
        done = llmos(*verb, f"--config={path}:smoke", f"--workdir={directory / path.stem}")
        assert done.returncode == 0, done.stderr
        print(f"{path}:smoke took {time.monotonic() - start:.1f} s")
    return directory / "gpt"


def test_output_of_a_run_is_worth_reading(run_directory):
    done = llmos("--config=experiments/gpt.py:smoke", f"--workdir={run_directory}")
    assert done.returncode == 0 and "is finished: step 12" in done.stderr
    log = (run_directory / "log.txt").read_text()
    for word in ("gpt on", "parameters; a step is", "step 4/12", "validation/bits_per_byte", "sample", "report:"):
        assert word in log, word
    assert "orbax" not in log.lower()


def test_generate(run_directory, tmp_path, capsys):
    flags = [f"--workdir={run_directory}", "--max_tokens=8", "--seed=3"]
    first = llmos("generate", *flags, "--prompt=def f")
    assert first.returncode == 0 and first.stdout.startswith("def f") and len(first.stdout) > 7

    (tmp_path / "prompts.txt").write_text("def f\nimport\n")
    assert main(["llmos", "generate", *flags, f"--prompt_file={tmp_path / 'prompts.txt'}"]) == 0
    several = capsys.readouterr().out
    assert several.startswith(first.stdout.rstrip("\n")) and several.count("---\n") == 2
    assert main(["llmos", "generate", *flags, "--prompt=def f", "--n=3"]) == 0
    assert capsys.readouterr().out.count("---\n") == 3
    assert main(["llmos", "generate", f"--workdir={run_directory}", "--prompt=a", "--step=99"]) == 65


def test_chat_needs_a_template(run_directory):
    done = llmos("chat", f"--workdir={run_directory}")
    assert done.returncode == 78 and "no chat template" in done.stderr and not done.stdout


def test_evaluate(run_directory, tmp_path):
    (tmp_path / "code.py").write_text("import os\n\n\ndef main():\n    return os.getcwd()\n" * 40)
    question = {"question": "import", "choices": ["os", "\u00fc\u00fc"], "answer": "os"}
    (tmp_path / "choices.jsonl").write_text(json.dumps(question) + "\n\n" + json.dumps(question | {"answer": 1}))
    files = [f"--text={tmp_path / 'code.py'}", f"--choices={tmp_path / 'choices.jsonl'}"]
    done = llmos("evaluate", f"--workdir={run_directory}", *files, f"--json={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    text, choices = json.loads((tmp_path / "figures.json").read_text()).values()
    assert text["bytes"] == 1880 and 0.5 < text["bits_per_byte"] < 16
    assert choices["questions"] == 2 and choices["acc"] == choices["acc_norm"] == 0.5 and choices["acc_stderr"] == 0.5
    assert f"{text['perplexity']:.4f}" in done.stdout and "+- 0.5000" in done.stdout


def test_checkpoint_verbs(run_directory, capsys):
    def checkpoint(verb, *more, code=0):
        assert main(["llmos", "checkpoint", verb, f"--workdir={run_directory}", *more]) == code
        return capsys.readouterr().out

    assert "12" in checkpoint("ls") and "every array as it was saved" in checkpoint("verify")
    with RunDirectoryLease(run_directory):
        checkpoint("gc", code=78)
    assert "removed 8" in checkpoint("gc", "--keep=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["trian"],
            "there is no verb 'trian'; known: train, plan, prepare, dataset, generate, chat, evaluate, convert, checkpoint",
        ),
        ([], "--config is missing"),
        (["--config=experiments/gtp.py"], "there is no file experiments/gtp.py"),
        (["--config=experiments/gpt.py:sise=nano"], "option 'sise' is unknown; did you mean 'size'"),
        (["--config=experiments/gpt.py", "--config.optim.learning_rat=1"], "did you mean 'learning_rate'"),
        (
            ["--config=experiments/gpt.py", "--config.optim.learning_rate=nan"],
            "optim.learning_rate=nan must be a finite number",
        ),
        (["--config=experiments/gpt.py", "--config.optim.learning_rate=-1"], "must be above 0.0"),
        (["--config=experiments/gpt.py", "--config.seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
        (["--config=experiments/gpt.py", "--config.train.steps=ten"], "train.steps must be a whole number, not 'ten'"),
        (["--config=experiments/gpt.py", "--config.model.heads=3"], "model.width=.* is not divisible by model.heads=3"),
        (
            ["--config=experiments/gpt.py", "--config.model.name=gtp"],
            "model.name='gtp' is not a known choice; did you mean 'gpt'",
        ),
        (["--config=experiments/gpt.py:data=/no/such/file"], "'/no/such/file' does not exist"),
        (["--config=experiments/gpt.py", "--wrkdir=x"], "wrkdir"),
        (["generate", "--prompt=a"], "--workdir is missing"),
        (["generate", "--workdir=/tmp"], "nothing to continue"),
        (["generate", "--workdir=/tmp", "--prompt=a"], "holds no run"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--temperature=-1"], "temperature=-1.0 must be at least 0.0"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--top_p=2"], "top_p=2.0 must be at most 1.0"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--stop="], "stop: an empty text"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--seed=99999999999999999999"], "seed=.* must be at most"),
        (["generate", "--workdir=/tmp", "--prompt_file=/no/file"], "--prompt_file=/no/file can't be read"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--n=2", "--temperature=0"], "n=2 with temperature=0"),
        (["chat"], "--workdir is missing"),
        (["evaluate", "--workdir=/tmp"], "nothing to evaluate on"),
        (["evaluate", "--workdir=/tmp", "--text=/no/file"], "/no/file can't be read"),
        (["evaluate", "--workdir=/tmp", "--text=README.md"], "holds no run"),
        (["checkpoint", "lst", "--workdir=/no/run"], "has no checkpoints"),
        (["generate", "--workdir=README.md", "--prompt=a"], "README.md/settings.json can't be read .Not a directory"),
        (["evaluate", "--workdir=README.md", "--text=README.md"], "README.md/settings.json can't be read .Not a directory"),
        (["generate", "--workdir=/tmp", "--prompt=\udcff"], r"--prompt='\\udcff' is not UTF-8"),
        (["chat", "--workdir=/tmp", "--system=\udcff"], r"--system='\\udcff' is not UTF-8"),
        (
            ["--config=experiments/gpt.py:smoke", "--seed=3"],
            r"--seed is no flag of train .but of generate, chat.; set --config.seed\.",
        ),
        (
            ["--config=experiments/gpt.py:smoke", "--temperature=banana"],
            "--temperature is no flag of train .*--config.task.temperature",
        ),
        (["--config=experiments/gpt.py:smoke", "--max_tokens=9"], "set --config.task.sample_tokens"),
        (["train", "--config=experiments/gpt.py:smoke", "--keep=3"], "set --config.checkpoint.keep"),
        (["--config=experiments/gpt.py:smoke", "--nodrop_cache"], r"--drop_cache is no flag of train .but of dataset.\.$"),
        (
            ["generate", "--workdir=/tmp", "--prompt=a", "--config.a.b=7"],
            "--config.a.b is no flag of generate .but of train, plan",
        ),
        (["generate", "--workdir=/tmp", "--prompt=a", "--config.a.b", "7"], "--config.a.b is no flag of generate"),
        (["generate", "--workdir=/tmp", "--prompt=a", "--config=x.py"], "--config is no flag of generate"),
        (
            ["checkpoint", "ls", "--workdir=/tmp", "--step=3"],
            "--step is no flag of checkpoint .but of generate, chat, evaluate",
        ),
    ],
)
def test_mistakes_get_one_clear_line(arguments, words, tmp_path, monkeypatch, capsys):
    code = main(
        [
            "llmos",
            *arguments,
            *(
                []
                if {"generate", "chat", "evaluate", "checkpoint"} & set(arguments)
                else ["--workdir=" + str(tmp_path / "run")]
            ),
        ]
    )
    error = capsys.readouterr().err
    assert code in (78, 65), error
    assert re.search(words, error), error


def examples():
    """Returns the commands of the README: continued lines joined, comments cut off."""
    lines = pathlib.Path("README.md").read_text().replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith("llmos ")]


@pytest.mark.parametrize("line", examples())
def test_examples_of_the_readme_name_flags_that_their_verb_takes(line):
    words, _, _ = _parse(shlex.split(line))
    assert len(words) <= (2 if words[:1] in (["dataset"], ["checkpoint"]) else 1)


def test_every_flag_is_taken_by_some_verb():
    _, values, _ = _parse(["llmos"])
    assert {flag for verb in _VERBS.values() for flag in verb.flags} == set(values) - {"help", "h"}


@pytest.mark.parametrize("line", [line for line in examples() if "--config=" in line])
def test_examples_of_the_readme_are_settings_that_work(line):
    """On eight devices where the example names a mesh, else on one; data and checkpoints that they name are not there."""
    words, values, overrides = _parse(line.replace("=...", "=experiments/prepare.py").split())
    if words == ["prepare"]:
        assert api.load_prepare_settings(values.config, overrides)[0].sources
        return
    overrides = [(name, value) for name, value in overrides if not value.startswith("hf:")]
    assert words in ([], ["train"], ["plan"])
    settings, _ = api.load_settings(values.config, overrides)
    placement = make_placement(settings.mesh, jax.devices()[: 8 if "mesh" in line else 1])
    check_batch(settings, placement)
    model = dataclasses.replace(settings.model, vocab_size=50304)
    describe_model(functools.partial(gpt.build, model, placement), placement)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("settings.json", "{}", "settings.json lacks model.name: restore it, or name another --workdir"),
        ("settings.json", "[]", r"settings.json holds \[\], not an object"),
        ("settings.json", '{"model": {"name": "gpt"}, "optim": 3}', "settings.json lacks optim.ema"),
        ("settings.json", None, "settings.json can't be read .Is a directory"),
        ("DONE.json", "{}", "DONE.json has step=None, not a number: remove it, and start again"),
        ("DONE.json", "null", "DONE.json holds null, not an object"),
    ],
)
def test_files_of_another_shape_are_named(name, content, words, run_directory, tmp_path, capsys):
    target = tmp_path / "run"
    shutil.copytree(run_directory, target)
    (target / name).unlink()
    (target / name).mkdir() if content is None else (target / name).write_text(content)
    commands = [["--config=experiments/gpt.py:smoke"]]
    if name == "settings.json":
        commands.append(["generate", "--prompt=a"])
    for command in commands:
        assert main(["llmos", *command, f"--workdir={target}"]) == 78
        assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "taken", "environment"),
    [
        (["generate", "--prompt=abc", "--max_tokens=30"], b"abc", {}),
        (["generate", "--prompt=abc", "--max_tokens=30"], b"abc", {"PYTHONUNBUFFERED": "1"}),
        (["checkpoint", "verify"], b"", {}),
        (["--help"], b"", {}),
    ],
    ids=str,
)
def test_a_reader_that_is_gone_ends_it_quietly(arguments, taken, environment, run_directory, tmp_path):
    """As `... | head -c 3` does."""
    target = tmp_path / "run"
    shutil.copytree(run_directory, target)
    shutil.rmtree(target / "checkpoints" / "8", ignore_errors=True)
    if "verify" in arguments:  # what is said on standard error, after the table, has its reader
        (target / "checkpoints" / "12" / "record" / "metadata").write_text("{}")
    command = [sys.executable, "-m", "llmos_jax.main", *arguments, f"--workdir={target}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": FLAGS} | environment
    )
    assert process.stdout.read(len(taken)) == taken
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=120) == 141 and "Error" not in error.replace("CheckpointError: damaged", ""), error


def test_a_second_writer_is_refused(tmp_path):
    with RunDirectoryLease(tmp_path):
        done = llmos("--config=experiments/gpt.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 78 and "RunDirectoryLocked" in done.stderr and "in use by process" in done.stderr


def test_importing_the_package_does_nothing():
    script = "import sys, llmos_jax; assert 'jax' not in sys.modules; print(len(llmos_jax.__all__), llmos_jax.load.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "load" and int(done.stdout.split()[0]) <= 20


def test_every_public_name_is_there():
    import llmos_jax

    for name in llmos_jax.__all__:
        assert getattr(llmos_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llmos_jax.nonsense  # noqa: B018


def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read("scripts/train_gpt.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 20 and len(code) <= 10
    assert all(not cell.outputs for cell in code)
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    monkeypatch.setenv("LLMOS_NOTEBOOK_SMOKE", "1")  # the same cells on the smoke size
    monkeypatch.setenv("LLMOS_NOTEBOOK_RUNS", str(tmp_path))
    root = str(pathlib.Path().absolute())
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": root}}).execute()
    text = "".join(str(output.get("text", output.get("data", ""))) for cell in code for output in cell.outputs)
    for word in ("257 tokens;", "bits_per_byte", "report.html", "x CPU"):
        assert word in text, (word, text)
