"""Whose a run directory is: what may change when a run goes on, and what is refused before anything is written."""

import dataclasses
import errno
import os

import pytest

from llmos_jax import api
from llmos_jax.errors import RunDirectoryError
from llmos_jax.train import directory as lib


def settings_for(**overrides):
    return api.load_settings("experiments/gpt.py:smoke", [(n.replace("__", "."), str(v)) for n, v in overrides.items()])[0]


def begin(directory, settings):
    """Leaves what a run has left once it took a step."""
    lib.record(directory, settings, {"tokenizer.json": "{}"})
    (directory / lib.METRICS_FILE).write_text("{}\n")


@pytest.mark.parametrize(
    "change",
    [
        dict(model__remat="full"),
        dict(model__execution="scan"),
        dict(model__attention="xla"),
        dict(train__microbatches=2),
        dict(train__steps=99),
        dict(mesh__parameters="fsdp"),
        dict(task__sample_tokens=3),
    ],
    ids=str,
)
def test_a_run_goes_on_computed_in_another_way(change, tmp_path):
    """What the advice of a device that ran out of memory names can be followed."""
    begin(tmp_path, settings_for())
    lib.check(tmp_path, settings_for(**change))
    lib.record(tmp_path, settings_for(**change), {})
    assert lib.read_settings(tmp_path) == lib.to_plain(settings_for(**change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(train__batch_size=16), "train.batch_size: 8 -> 16"),
        (dict(model__width=64), "model.width: 32 -> 64"),
        (dict(optim__learning_rate=1.0), "optim.learning_rate"),
    ],
    ids=str,
)
def test_another_experiment_is_refused_once_there_is_one(change, words, tmp_path):
    lib.record(tmp_path, settings_for(), {})
    lib.check(tmp_path, settings_for(**change))  # no step was taken: whoever was told to change it can
    begin(tmp_path, settings_for())
    with pytest.raises(RunDirectoryError, match=f"holds another experiment .*{words}"):
        lib.check(tmp_path, settings_for(**change))
    (tmp_path / lib.METRICS_FILE).unlink()
    (tmp_path / lib.CHECKPOINTS / "10").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=f"holds another experiment .*{words}"):
        lib.check(tmp_path, settings_for(**change))


def test_no_room_for_the_settings_is_said(tmp_path, monkeypatch):
    def write(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lib, "write_whole", write)
    with pytest.raises(RunDirectoryError, match="settings.json could not be written .No space left on device.: make room"):
        lib.record(tmp_path, settings_for(), {})


def test_finished_is_the_same_experiment_at_its_end(tmp_path):
    lib.record(tmp_path, settings_for(), {})
    lib.mark_done(tmp_path, {"step": 12, "elapsed_seconds": 3.0})
    assert lib.finished(tmp_path, settings_for())["step"] == 12
    assert lib.finished(tmp_path, settings_for(train__steps=13)) is None
    assert lib.finished(tmp_path, settings_for(train__batch_size=16)) is None
    longer = dataclasses.replace(settings_for().train, steps=None, max_seconds=3.0)
    assert lib.finished(tmp_path, dataclasses.replace(settings_for(), train=longer))["step"] == 12
