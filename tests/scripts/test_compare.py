"""scripts/compare.py: what it calls equal, which step it names, its exit codes, and runs that it makes itself."""

import json
import math
import runpy
import shlex
import subprocess
import sys

import jax
import pytest

from llmos_jax import api, main
from llmos_jax.compute.sharding import make_placement
from llmos_jax.train.settings import check_batch
from tests.gang import TINY

STEPS = 6


def compare(*arguments, timeout=280):
    command = [sys.executable, "scripts/compare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def make_run(tmp_path):
    def make(name, changes=(), steps=STEPS):
        losses = {step: 5.0 / step for step in range(1, steps + 1)} | dict(changes)
        directory = tmp_path / name
        directory.mkdir()
        entries = [{"step": step, "train/loss": loss} for step, loss in losses.items()]
        entries.append({"step": steps, "validation/loss": 1.0})  # another entry of the last step, without the metric
        (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return directory

    return make


def test_equal_runs(make_run):
    done = compare(make_run("a", {3: math.nan}), make_run("b", {3: math.nan}))
    assert done.returncode == 0 and f"{STEPS} steps in common" in done.stdout and "equal to the last bit" in done.stdout


@pytest.mark.parametrize(
    ("changed", "tolerance", "code", "words"),
    [
        ({4: math.nextafter(1.25, 2)}, 0, 1, "step 4 is the first to differ"),
        ({4: math.nextafter(1.25, 2)}, 1e-12, 0, "largest relative difference 1.78e-16, at step 4"),
        ({2: 2.501, 5: 1.2}, 1e-3, 1, "step 5 is the first to differ: 1.0 and 1.2"),
        ({2: 2.501, 5: 1.2}, 1e-4, 1, "step 2 is the first to differ: 2.5 and 2.501"),
        ({6: math.nan}, 0.5, 1, "step 6 is the first to differ"),
        ({6: math.inf}, 0.5, 1, "step 6 is the first to differ"),
    ],
)
def test_the_first_step_that_differs_is_named(make_run, changed, tolerance, code, words):
    done = compare(make_run("a"), make_run("b", changed), f"--tolerance={tolerance}")
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout and ("NOT equal" in done.stdout) == bool(code)


def test_a_shorter_run_is_not_equal(make_run):
    done = compare(make_run("a"), make_run("b", steps=4))
    assert done.returncode == 1 and "2 steps are in one alone: 5, 6" in done.stdout


def test_what_can_not_be_compared_says_why(make_run, tmp_path):
    run = make_run("a")
    for arguments, words in [
        ((run, tmp_path / "none"), "neither a run directory nor flags"),
        ((run, run, "--metric=train/los"), "has no 'train/los'; it has train/loss, validation/loss"),
        ((f"--left={run}", "--right=--config=experiments/none.py"), "ended with exit code 78: ConfigError"),
        ((f"--left={run}", "--right=@no-such-commit --config=x.py"), "no-such-commit"),
        ((run,), "two runs are compared, not 1"),
    ]:
        done = compare(*arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


COMPARE = runpy.run_path("scripts/compare.py")


def documented():
    """Returns the words of each command in the script's docstring."""
    text = COMPARE["__doc__"].replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in text.splitlines() if line.strip().startswith("python scripts/compare.py")]


@pytest.mark.parametrize("words", documented(), ids=lambda words: words[-1])
def test_documented_commands_are_runs_that_can_be_made(words):
    args = COMPARE["make_parser"]().parse_args(words)
    if args.runs:
        assert len(args.runs) == 2 and not args.left and not args.right
        return
    for side in (args.left, args.right):
        flags = [word for word in shlex.split(side) if not word.startswith("@")] + shlex.split(args.common)
        rest, values, overrides = main._parse(["llmos", *flags])
        settings, _ = api.load_settings(values.config, overrides)
        check_batch(settings, make_placement(settings.mesh, jax.devices()[: args.devices or 1]))
        assert not rest


@pytest.mark.timeout(900)
def test_it_runs_two_meshes_itself():
    """The documented command, for three steps of a smaller model."""
    (words,) = [words for words in documented() if any(word.startswith("--devices") for word in words)]
    quick = "".join(f" --config.{name}={value}" for name, value in (TINY | {"train.steps": 3}).items())
    done = compare(*[word + quick if word.startswith("--common") else word for word in words], timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train/loss: 3 steps in common" in done.stdout
