"""1, 2 and 4 processes train alike; what one shape saved, others go on with. Row R13, and decisions by the clock."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from llmos_jax.train.checkpoint import verify_checkpoints
from tests.gang import launch, losses

pytestmark = pytest.mark.timeout(900)  # four starts of a gang, on a machine that others use, too
STEPS, KEPT, DAMAGED = 28, 8, 16
RUN = {"train__steps": STEPS, "model__layers": 2, "checkpoint__every_steps": 8, "checkpoint__keep": 10}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The run that the others are held against: four processes with a device each."""
    directory = tmp_path_factory.mktemp("four")
    compared = {"train__evaluate_every_steps": 10, "train__compare_replicas_every_steps": 6}
    done = launch(directory, processes=4, **compared, **RUN)
    assert done.code == 0 and [code for _, code, _ in done.ends] == [0] * 4, done.text
    return directory, done.text


def evaluations(directory):
    entries = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["validation/loss"] for entry in entries if "validation/loss" in entry}


def test_one_process_writes_and_the_others_keep_a_log(four):
    directory, text = four
    assert list(losses(directory)) == list(range(1, STEPS + 1)) and list(evaluations(directory)) == [10, 20, 28]
    names = {entry.name for entry in directory.iterdir()}
    assert {"log.txt", "log-1.txt", "log-2.txt", "log-3.txt", "DONE.json", "report.html", "settings.json"} <= names
    assert sum(name.startswith("events.out") for name in names) == 1 and "lease.json" not in names
    assert not [name for name in names if name.startswith((".", "fault"))]
    spoken = [line for line in text.splitlines() if line.startswith(("[1]", "[2]", "[3]")) and "Gloo" not in line]
    assert all("connecting to" in line for line in spoken), spoken
    assert "gpt on 4 x CPU" in (directory / "log-3.txt").read_text()
    summary = json.loads((directory / "DONE.json").read_text())
    assert summary["step"] == STEPS and set(summary["evaluation"]) >= {"loss", "bits_per_byte"}


@pytest.mark.parametrize(("processes", "devices", "tolerance"), [(2, 2, 0.0), (1, 4, 1e-5)], ids=["2x2", "1x4"])
def test_other_numbers_of_processes_have_the_same_losses(processes, devices, tolerance, four, tmp_path):
    done = launch(tmp_path, processes=processes, devices=devices, train__evaluate_every_steps=10, **RUN)
    assert done.code == 0, done.text
    for curve in (losses, evaluations):
        ours, theirs = curve(tmp_path), curve(four[0])
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=tolerance)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        pytest.param(2, 2, {"mesh__data": 2, "mesh__model": 2}, id="data 2 x model 2"),
        pytest.param(1, 1, {}, id="one device", marks=pytest.mark.slow),
        pytest.param(2, 1, {"mesh__model": 2, "mesh__parameters": "fsdp"}, id="model 2, fsdp", marks=pytest.mark.slow),
        pytest.param(2, 1, {"mesh__pipeline": 2}, id="pipeline 2", marks=pytest.mark.slow),
    ],
)
def test_saved_by_four_restored_by_others(processes, devices, mesh, four, tmp_path):
    """Row R13: fingerprints are compared at the restore, and 20 losses are within 1e-5 relative. The newest step is damaged
    where one process may meet it: all fall back to the same one, and process 0 alone moves it away."""
    copy = tmp_path / "run"
    shutil.copytree(four[0], copy)
    (copy / "DONE.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > DAMAGED:
            shutil.rmtree(folder)
    files = [file for file in (copy / "checkpoints" / str(DAMAGED) / "params").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 0x10
    largest.write_bytes(content)
    done = launch(copy, processes=processes, devices=devices, **RUN, **mesh)
    assert done.code == 0 and f"checkpoint step {DAMAGED} is damaged" in done.text, done.text
    assert (copy / "checkpoints" / f"quarantine-{DAMAGED}").is_dir()
    for number in range(processes):
        assert f"restored step {KEPT}" in (copy / (f"log-{number}.txt" if number else "log.txt")).read_text()
    ours, theirs = losses(copy), losses(four[0])
    assert list(ours) == list(theirs) and len(ours) - KEPT == 20
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    assert all(row.is_good for row in verify_checkpoints(copy / "checkpoints"))


def test_the_clock_decides_alike_for_all(tmp_path):
    """By time alone: how long, when to save, and the learning rate. A difference between processes would be a deadlock."""
    by_time = {"train__steps": "none", "train__max_seconds": 5.0, "train__log_every_steps": 1, "optim__schedule": "linear"}
    saves = {"checkpoint__every_steps": "none", "checkpoint__every_seconds": 0.5, "checkpoint__keep": 10}
    done = launch(tmp_path, processes=2, **by_time, **saves)
    assert done.code == 0, done.text
    summary = json.loads((tmp_path / "DONE.json").read_text())
    assert summary["elapsed_seconds"] >= 5.0
    saved = sorted(int(folder.name) for folder in pathlib.Path(tmp_path / "checkpoints").iterdir())
    assert len(saved) >= 2 and saved[-1] == summary["step"]
    entries = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [entry["train/learning_rate"] for entry in entries if "train/learning_rate" in entry]
    assert len(rates) == summary["step"] and rates[-1] < max(rates)
