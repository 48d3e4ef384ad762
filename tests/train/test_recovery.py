"""Kill any process at any moment: the loss curve is bitwise the same. Rows R2, R3, R4, R5, R8, R9, R11 and R14."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from llmos_jax import api
from llmos_jax.compute import watchdog
from llmos_jax.train import loop
from tests.gang import TINY, launch, launch_command, losses

pytestmark = pytest.mark.timeout(900)  # a start of a gang takes 8 s on a quiet machine; tests share theirs
STEPS, SAVED_EVERY = 60, 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = launch(directory, processes=2, train__steps=STEPS, checkpoint__every_steps=SAVED_EVERY)
    assert done.code == 0 and done.restarts == 0, done.text
    return directory


def struck(directory, fault, **choices):
    return launch(
        directory, processes=2, fault=fault, **{"train__steps": STEPS, "checkpoint__every_steps": SAVED_EVERY} | choices
    )


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    """One run in which the worker is killed, then the coordinator while it saves, then one process is told to stop."""
    directory = tmp_path_factory.mktemp("chaos")
    return directory, struck(directory, "kill:p1:step13,kill:p0:save30,sigterm:p1:step44")


def test_chaos_leaves_no_trace_in_the_curve(chaos, uninterrupted):
    """Row R11: 60 of 60 losses are bitwise those of the run that nothing happened to."""
    directory, done = chaos
    assert done.code == 0 and done.restarts == 3, done.text
    assert losses(directory) == losses(uninterrupted) and list(losses(directory)) == list(range(1, STEPS + 1))
    restored = [int(step) for step in re.findall(r"restored step (\d+)", done.text)]
    # At most one save interval (and the save that was being written) is done again.
    assert 12 - 2 * SAVED_EVERY <= restored[0] <= 12
    # Row R4: what was being saved when its writer was killed is no checkpoint, the one before it is, and nothing is left of it.
    assert restored[1] == 30 - SAVED_EVERY
    assert not list((directory / "checkpoints").glob("*tmp*"))


def test_an_error_of_one_process_at_the_end_costs_no_step(tmp_path):
    """It fails before the last evaluation, which the other waits in: both leave at once, and what was trained is saved."""
    done = struck(tmp_path, "error:p1:end6", train__steps=6, checkpoint__every_steps="none")
    assert done.code == 0 and done.restarts == 1, done.text
    assert "OSError: a fault on purpose" in done.text and re.search(r"restored step 6\b", done.text)
    (first, first_code, _), (second, second_code, seconds) = done.ends[:2]
    assert (first, second, second_code) == (1, 0, 75) and first_code not in (0, 75) and seconds < 60
    assert list(losses(tmp_path)) == list(range(1, 7))


@pytest.mark.slow
def test_a_worker_killed_while_it_saves_leaves_no_trace_either(uninterrupted, tmp_path):
    """Row R4: process 0, which completes a save, may have had its part already."""
    done = struck(tmp_path, "kill:p1:save15")
    assert done.code == 0 and done.restarts == 1, done.text
    assert int(re.search(r"restored step (\d+)", done.text)[1]) in (10, 15)
    assert losses(tmp_path) == losses(uninterrupted) and not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(("attempt", "killed"), [(0, 1), (1, 0)], ids=["worker", "coordinator"])
def test_whoever_is_killed_the_other_leaves_at_once(attempt, killed, chaos):
    """Rows R2 and R3: exit code 75, with a line that says why."""
    _, done = chaos
    (first, first_code, _), (second, second_code, seconds) = done.ends[2 * attempt : 2 * attempt + 2]
    assert (first, first_code) == (killed, -signal.SIGKILL) and (second, second_code) == (1 - killed, 75)
    assert seconds < 5  # 0.1 s on a quiet machine; tests share theirs
    assert "PeerLost: another process of this run is gone" in done.text


def test_a_signal_to_one_process_stops_all_at_one_step(chaos):
    """Row R5: exit code 42 from both, and no step is done again."""
    _, done = chaos
    assert [code for _, code, _ in done.ends[4:6]] == [42, 42]
    saved = int(re.findall(r"saved step (\d+)", done.text)[-1])
    assert saved >= 43 and int(re.findall(r"restored step (\d+)", done.text)[-1]) == saved


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (1, r"PeerLost: process 1 \(host .*, pid \d+, in phase \w+.*\) has been silent for 1\d"),
        pytest.param(0, "PeerLost: process 0, the coordinator, has not answered for 1", marks=pytest.mark.slow),
    ],
    ids=["worker", "coordinator"],
)
def test_a_frozen_process_is_noticed_and_killed(frozen, words, uninterrupted, tmp_path):
    """Row R8: SIGSTOP. The other's watchdog names it, and the supervisor ends it."""
    done = struck(tmp_path, f"freeze:p{frozen}:step8")
    assert done.code == 0 and done.restarts == 1, done.text
    (first, first_code, _), (second, second_code, _) = done.ends[:2]
    assert (first, first_code) == (1 - frozen, 75) and (second, second_code) == (frozen, -signal.SIGKILL)
    assert re.search(words, done.text), done.text
    assert "stacks of all threads" in (tmp_path / ("log.txt" if frozen else "log-1.txt")).read_text()
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
def test_a_stuck_process_is_named(uninterrupted, tmp_path):
    """Row R9: alive, with a heartbeat, but not moving."""
    done = struck(tmp_path, "stuck:p1:step8", watchdog__floor_seconds=15, options=["--grace=30"])
    assert done.code == 0 and done.restarts == 1, done.text
    assert {code for _, code, _ in done.ends[:2]} == {75}
    named = (
        r"Stuck: no progress for 1[56]\.\d s in phase \w+ at step 7 \(limit 15.0 s\); behind is process 1 \(host .* at step 7\)"
    )
    assert re.search(named, done.text)
    assert "faults.py" in (tmp_path / "log-1.txt").read_text()  # the stack shows where it hangs
    assert losses(tmp_path) == losses(uninterrupted)


def test_what_fails_at_once_is_tried_four_times(tmp_path):
    """Row R14: pauses grow, then the last error is told; wrong settings are not tried again."""
    began = time.monotonic()
    done = launch(tmp_path, processes=1, watchdog__compile_seconds=0.001, options=["--pause=0.2"])
    assert done.code == 75 and len(done.ends) == 4, done.text
    assert [float(pause) for pause in re.findall(r"starting again in ([\d.]+) s", done.text)] == [0.2, 0.4, 0.8]
    assert time.monotonic() - began > 1.4
    assert re.search(r"given up after 3 restarts without a new step: process 0: Stuck: .* in phase compile", done.text)
    done = launch(tmp_path, processes=2, optim__learning_rate=-1)
    assert done.code == 78 and done.restarts == 0 and len(done.ends) == 2, done.text
    assert "given up, starting again does not help: process" in done.text and "optim.learning_rate=-1" in done.text


def test_the_supervisor_passes_a_signal_on(uninterrupted, tmp_path):
    """It is asked to stop: all save, and it leaves with 42; the same command goes on."""
    command = launch_command(tmp_path, processes=2, train__steps=STEPS, checkpoint__every_steps=SAVED_EVERY)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        text = ""
        for line in process.stderr:
            text += line
            if line.startswith("step 4/"):
                break
        process.send_signal(signal.SIGTERM)
        text += process.stderr.read()
    assert process.returncode == 42, text
    assert "saved step" in text and "starting again" not in text
    done = struck(tmp_path, "")
    assert done.code == 0 and "restored step" in done.text
    assert losses(tmp_path) == losses(uninterrupted)
    # A finished run is left alone, by all processes.
    again = struck(tmp_path, "")
    assert again.code == 0 and f"is finished: step {STEPS}" in again.text


def test_a_signal_before_training_leaves_nothing_behind(tmp_path):
    """Row R6: exit code 42, nothing done, nothing locked."""
    command = [*launch_command(tmp_path, processes=1)[5:], "--config.optim.name=muon"]
    with subprocess.Popen([sys.executable, "-m", "llmos_jax.main", *command], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "parameters; a step is" in line:  # it compiles now
                break
        process.send_signal(signal.SIGTERM)
        text = process.stderr.read()
    assert process.returncode == 42 and "Preempted: stopped by SIGTERM before training began" in text, text
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "lease.json").exists()


def test_a_slow_loader_is_waited_for(tmp_path, monkeypatch):
    """Row R10: longer than a step may take, below the limit of data: no abort, and charged to data wait."""
    options = TINY | {"train.steps": 6, "watchdog.floor_seconds": 0.5, "watchdog.data_seconds": 60.0, "watchdog.steps": 1.01}
    settings, _ = api.load_settings("experiments/gpt.py:smoke", [(name, str(value)) for name, value in options.items()])
    real, ends = loop.make_batch, []
    monkeypatch.setattr(loop, "make_batch", lambda *arguments: (time.sleep(1.2), real(*arguments))[1])
    monkeypatch.setattr(watchdog, "_end_process", ends.append)
    summary = api.run_training(settings, tmp_path, is_own_process=True)
    assert summary["step"] == 6 and summary["seconds"]["data_wait"] > 4 and not ends
