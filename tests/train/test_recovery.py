"""Kill any process at any moment: the loss curve is bitwise the same. Rows R2, R3, R4, R5, R8, R9, R11 and R14."""

import re
import signal
import subprocess
import sys
import time

import pytest

from llmos_jax import api
from llmos_jax.compute import watchdog
from llmos_jax.train import loop
from tests.gang import TINY, Launched, launch, launch_command, losses

pytestmark = pytest.mark.timeout(900)  # a start of a gang takes 8 s on a quiet machine; tests share theirs
STEPS, SAVED_EVERY = 60, 5
RUN = {"train__steps": STEPS, "checkpoint__every_steps": SAVED_EVERY}
# By a fault that strikes first in one attempt, then the next: what the chaos does to a run.
FAULTS = "kill:p1:step13,kill:p0:save30,sigterm:p1:step44,freeze:p1:step52,error:p1:end60"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = launch(directory, processes=2, **RUN | {"checkpoint__every_steps": "none"})
    assert done.code == 0 and done.restarts == 0, done.text
    return directory


def struck(directory, fault, **choices):
    return launch(directory, processes=2, fault=fault, **RUN | choices)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    """One run that is stopped through its supervisor, then goes on: the worker is killed, then the coordinator while it
    saves; one process is told to stop, one is frozen, and one fails at the end. Returns (directory, first words, the rest)."""
    directory = tmp_path_factory.mktemp("chaos")
    with subprocess.Popen(launch_command(directory, processes=2, **RUN), stderr=subprocess.PIPE, text=True) as process:
        text = ""
        for line in process.stderr:
            text += line
            if line.startswith("step 4/"):
                break
        process.send_signal(signal.SIGTERM)
        text += process.stderr.read()
    return directory, Launched(process.returncode, text), struck(directory, FAULTS)


def restored(chaos):
    """Returns the steps that were restored, by attempt."""
    return [int(step) for step in re.findall(r"restored step (\d+)", chaos[2].text)]


def test_chaos_leaves_no_trace_in_the_curve(chaos, uninterrupted):
    """Row R11: 60 of 60 losses are bitwise those of the run that nothing happened to."""
    directory, _, done = chaos
    assert done.code == 0 and done.restarts == FAULTS.count(":p"), done.text
    assert losses(directory) == losses(uninterrupted) and list(losses(directory)) == list(range(1, STEPS + 1))
    _, after_kill, after_save, *_ = restored(chaos)
    # At most one save interval (and the save that was being written) is done again.
    assert 12 - 2 * SAVED_EVERY <= after_kill <= 12
    # Row R4: what was being saved when its writer was killed is no checkpoint, the one before it is, and nothing is left of it.
    assert after_save == 30 - SAVED_EVERY
    assert not list((directory / "checkpoints").glob("*tmp*"))


def test_the_supervisor_passes_a_signal_on(chaos):
    """It is asked to stop: all save, and it leaves with 42; the same command goes on."""
    directory, first, _ = chaos
    assert first.code == 42, first.text
    saved = int(re.search(r"saved step (\d+)", first.text)[1])
    assert saved >= 4 and "starting again" not in first.text and restored(chaos)[0] == saved
    # A finished run is left alone, by all processes.
    again = struck(directory, "")
    assert again.code == 0 and f"is finished: step {STEPS}" in again.text


@pytest.mark.parametrize(("attempt", "killed"), [(0, 1), (1, 0)], ids=["worker", "coordinator"])
def test_whoever_is_killed_the_other_leaves_at_once(attempt, killed, chaos):
    """Rows R2 and R3: exit code 75, with a line that says why."""
    done = chaos[2]
    ends = done.ends[2 * attempt : 2 * attempt + 2]
    assert {process: code for process, code, _ in ends} == {killed: -signal.SIGKILL, 1 - killed: 75}
    assert max(seconds for _, _, seconds in ends) < 5  # 0.1 s on a quiet machine; tests share theirs
    assert "PeerLost: another process of this run is gone" in done.text


def test_a_signal_to_one_process_stops_all_at_one_step(chaos):
    """Row R5: exit code 42 from both, and no step is done again."""
    done = chaos[2]
    assert [code for _, code, _ in done.ends[4:6]] == [42, 42]
    saved = int(re.findall(r"saved step (\d+)", done.text)[-1])
    assert saved >= 43 and restored(chaos)[3] == saved


def was_noticed(frozen, ends, text, directory):
    """Asserts row R8 of the attempt that ended so: the other's watchdog named the frozen process, the supervisor ended it."""
    assert {process: code for process, code, _ in ends} == {1 - frozen: 75, frozen: -signal.SIGKILL}
    words = (
        r"PeerLost: process 1 \(host .*, pid \d+, in phase \w+.*\) has been silent for 1\d"
        if frozen
        else "PeerLost: process 0, the coordinator, has not answered for 1"
    )
    assert re.search(words, text), text
    assert "stacks of all threads" in (directory / ("log.txt" if frozen else "log-1.txt")).read_text()


def test_a_frozen_worker_is_noticed_and_killed(chaos):
    """Row R8: SIGSTOP."""
    directory, _, done = chaos
    was_noticed(1, done.ends[6:8], done.text, directory)


@pytest.mark.slow
def test_a_frozen_coordinator_is_noticed_and_killed(uninterrupted, tmp_path):
    done = struck(tmp_path, "freeze:p0:step8")
    assert done.code == 0 and done.restarts == 1, done.text
    was_noticed(0, done.ends[:2], done.text, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_an_error_of_one_process_at_the_end_costs_no_step(chaos):
    """It fails before the last evaluation, which the other waits in: both leave at once, and what was trained is saved."""
    done = chaos[2]
    assert "OSError: a fault on purpose" in done.text and restored(chaos)[5] == STEPS
    codes = {process: code for process, code, _ in done.ends[8:10]}
    assert codes[0] == 75 and codes[1] not in (0, 75) and max(seconds for _, _, seconds in done.ends[8:10]) < 60


@pytest.mark.slow
def test_a_worker_killed_while_it_saves_leaves_no_trace_either(uninterrupted, tmp_path):
    """Row R4: process 0, which completes a save, may have had its part already."""
    done = struck(tmp_path, "kill:p1:save15")
    assert done.code == 0 and done.restarts == 1, done.text
    assert int(re.search(r"restored step (\d+)", done.text)[1]) in (10, 15)
    assert losses(tmp_path) == losses(uninterrupted) and not list((tmp_path / "checkpoints").glob("*tmp*"))


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


def test_what_fails_at_once_is_tried_again(tmp_path):
    """Row R14: the last error is told (tests/test_launchers.py counts to four); wrong settings are not tried again."""
    often = {"watchdog__compile_seconds": 0.001, "distributed__heartbeat_seconds": 1}  # looked at ten times a second
    done = launch(tmp_path, processes=1, options=["--pause=0.2", "--restarts=1"], **often)
    assert done.code == 75 and len(done.ends) == 2 and "starting again in 0.2 s" in done.text, done.text
    assert re.search(r"given up after 1 restarts without a new step: process 0: Stuck: .* in phase compile", done.text)
    done = launch(tmp_path, processes=2, optim__learning_rate=-1)
    assert done.code == 78 and done.restarts == 0 and len(done.ends) == 2, done.text
    assert "given up, starting again does not help: process" in done.text and "optim.learning_rate=-1" in done.text


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
    options = TINY | {"train.steps": 4, "watchdog.floor_seconds": 2.0, "watchdog.data_seconds": 60.0, "watchdog.steps": 1.01}
    settings, _ = api.load_settings("experiments/gpt.py:smoke", [(name, str(value)) for name, value in options.items()])
    real, pauses, ends = loop.make_batch, iter([0.0, 3.0]), []
    monkeypatch.setattr(loop, "make_batch", lambda *arguments: (time.sleep(next(pauses, 0.0)), real(*arguments))[1])
    monkeypatch.setattr(watchdog, "_end_process", ends.append)
    summary = api.run_training(settings, tmp_path, is_own_process=True)
    assert summary["step"] == 4 and summary["seconds"]["data_wait"] > 2 and not ends
