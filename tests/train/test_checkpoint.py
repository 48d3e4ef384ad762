"""Checkpoints: exact, verified, and never lost silently. Rows C1-C4 and C7 of the fault matrix."""

import os
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.compute import host
from llmos_jax.errors import CheckpointError
from llmos_jax.train import checkpoint as lib
from llmos_jax.train.fingerprint import fingerprints

SPECS = {"w": PartitionSpec("x", "y"), "b": PartitionSpec("y"), "h": PartitionSpec("x"), "n": PartitionSpec()}


def make_tree(mesh_shape=(1, 1), seed=0):
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(mesh_shape))]).reshape(mesh_shape), ("x", "y"))
    rng = np.random.default_rng(seed)
    values = {
        "w": rng.standard_normal((64, 96)).astype(np.float32),
        "b": rng.standard_normal(96).astype(np.float32),
        "h": jnp.asarray(rng.standard_normal((16, 8)), jnp.bfloat16),
        "n": np.array([rng.integers(0, 2**31)], np.int32),
    }
    placed = {name: jax.device_put(value, NamedSharding(mesh, SPECS[name])) for name, value in values.items()}
    return {"params": {"layer": {"w": placed["w"], "b": placed["b"]}}, "optimizer": {"h": placed["h"]}, "step": placed["n"]}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def saved(directory, *, steps=(1, 2), config=None):
    """A checkpointer with complete steps, and the tree of each."""
    checkpointer = lib.Checkpointer(directory, config or lib.CheckpointConfig(keep=5))
    trees = {step: make_tree(seed=step) for step in steps}
    for step, tree in trees.items():
        assert checkpointer.save(step, tree, {"position": step})
    checkpointer.wait()
    return checkpointer, trees


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two saved steps to be copied and damaged."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    checkpointer, trees = saved(folder)
    checkpointer.close()
    return folder, trees


def copy(template, tmp_path):
    target = tmp_path / "checkpoints"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(template[0], target)
    return target


def test_round_trip_is_exact(tmp_path):
    checkpointer, trees = saved(tmp_path)
    step, tree, metadata = checkpointer.restore_latest_good(abstract(trees[2]))
    assert (step, metadata) == (2, {"position": 2})
    assert_same(tree, trees[2])
    assert tree["optimizer"]["h"].dtype == jnp.bfloat16
    assert_same(checkpointer.restore_part(abstract(trees[1])["params"], key="params", step=1), trees[1]["params"])
    checkpointer.close()


@pytest.mark.parametrize("to", [(2, 2), (1, 4), (8, 1), (1, 1)], ids=str)
def test_saved_on_one_mesh_restored_on_another(to, tmp_path):
    tree = make_tree((4, 1))
    checkpointer = lib.Checkpointer(tmp_path, lib.CheckpointConfig())
    checkpointer.save(3, tree, {})
    checkpointer.wait()
    wanted = abstract(make_tree(to, seed=9))
    _, restored, _ = checkpointer.restore_latest_good(wanted)
    assert_same(restored, tree)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
    assert fingerprints(restored) == fingerprints(tree)
    checkpointer.close()


def test_fingerprints_see_every_bit_and_no_sharding():
    tree = make_tree((1, 1))
    assert fingerprints(tree) == fingerprints(make_tree((4, 2))) != fingerprints(make_tree(seed=1))
    values = np.arange(64, dtype=np.float32)
    base = fingerprints({"x": jnp.asarray(values)})["x"]
    seen = {base}
    for bit in range(0, 64 * 32, 37):
        flipped = values.view(np.uint32).copy()
        flipped[bit // 32] ^= np.uint32(1 << (bit % 32))
        seen.add(fingerprints({"x": jnp.asarray(flipped.view(np.float32))})["x"])
    assert len(seen) == 1 + len(range(0, 64 * 32, 37))
    assert fingerprints({"x": jnp.asarray(values[::-1])})["x"] != base  # position counts
    assert fingerprints({"x": jnp.zeros(3)})["x"] != fingerprints({"x": jnp.zeros(4)})["x"]
    for dtype in (jnp.bool_, jnp.int8, jnp.float16, jnp.bfloat16, jnp.uint32):
        assert fingerprints({"x": jnp.ones(5, dtype)})["x"] != fingerprints({"x": jnp.zeros(5, dtype)})["x"]


def test_forty_bit_flips(template, tmp_path, caplog):
    """Row C1: every flip is named and the step before is used, or it changed nothing that is restored."""
    folder, trees = template
    generator, named = random.Random(0), 0
    for trial in range(40):
        target = copy(template, tmp_path)
        files = sorted(f for f in (target / "2").rglob("*") if f.is_file() and f.stat().st_size)
        file = generator.choices(files, weights=[f.stat().st_size for f in files])[0]
        content = bytearray(file.read_bytes())
        place = generator.randrange(len(content) * 8)
        content[place // 8] ^= 1 << (place % 8)
        file.write_bytes(content)
        checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())
        step, tree, metadata = checkpointer.restore_latest_good(abstract(trees[2]))
        checkpointer.close()
        assert_same(tree, trees[step])
        assert metadata == {"position": step}
        assert (target / "quarantine-2").exists() == (step == 1), f"trial {trial}: {file}"
        told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        caplog.clear()
        assert len(told) == (step == 1)
        for line in told:
            item = file.relative_to(target / "2").parts[0]
            words = "its (record|arrays)" if file.name in ("metadata", "_METADATA") else rf"leaf {item}\S* (has|can't be read)"
            assert re.search(rf"step 2 is damaged \({words} ", line), line
        named += step == 1
    assert named >= 20


def test_a_flipped_array_names_its_leaf(tmp_path, monkeypatch):
    checkpointer, trees = saved(tmp_path, steps=(1,))
    real = lib.fingerprints
    monkeypatch.setattr(lib, "fingerprints", lambda tree: real(tree) | {"params/layer/w": 7})
    with pytest.raises(CheckpointError, match="damaged: leaf params/layer/w has fingerprint 00000007"):
        checkpointer.restore(1, abstract(trees[1]))
    checkpointer.close()


@pytest.mark.parametrize("damage", ["cut", "missing", "zeroed", "garbage", "no record", "empty step"])
def test_damaged_files_fall_back(damage, template, tmp_path):
    """Row C2."""
    target, trees = copy(template, tmp_path), template[1]
    files = sorted((f for f in (target / "2" / "params").rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)
    content = files[0].read_bytes()
    if damage == "cut":
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "missing":
        shutil.rmtree(target / "2" / "params")
    elif damage == "zeroed":
        files[0].write_bytes(bytes(len(content)))
    elif damage == "garbage":
        files[0].write_bytes(random.Random(1).randbytes(len(content)))
    elif damage == "no record":
        (target / "2" / "record" / "metadata").unlink()
    else:
        shutil.rmtree(target / "2")
        (target / "2").mkdir()
    checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())
    step, tree, _ = checkpointer.restore_latest_good(abstract(trees[2]))
    checkpointer.close()
    assert step == 1
    assert_same(tree, trees[1])


def wrapped(error):
    """An error as Orbax raises it where an array is read: tensorstore's words are its cause's."""
    outer = Exception("Encountered error while reading array index: (slice(0, 64, 1),)")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("what", "failure", "words"),
    [
        ("record", OSError(24, "Too many open files"), "can't be read now.*Too many open files"),
        ("arrays", ValueError("PERMISSION_DENIED: Error opening: Permission denied"), "can't be read now.*Permission denied"),
        ("arrays", wrapped(ValueError("Error opening: Too many open files")), "can't be read now.*Too many open files"),
        ("arrays", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_failure_of_the_machine_is_not_taken_for_damage(what, failure, words, template, tmp_path, monkeypatch):
    """A good step that can't be read now (open files, permissions, memory) stays where it is."""
    target, trees = copy(template, tmp_path), template[1]
    checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())

    def fail(*_, **__):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(*(lib.json, "loads") if what == "record" else (checkpointer._open_reader(), "restore"), fail)
        with pytest.raises((CheckpointError, jax.errors.JaxRuntimeError), match=words):
            checkpointer.restore_latest_good(abstract(trees[2]))
    assert checkpointer.steps() == [1, 2] and not list(target.glob("quarantine-*"))
    assert checkpointer.restore_latest_good(abstract(trees[2]))[0] == 2
    checkpointer.close()


def test_none_intact_is_an_error_not_a_fresh_start(template, tmp_path):
    """Row C3: exit code 65, now and at the next try."""
    target, trees = copy(template, tmp_path), template[1]
    for step in (1, 2):
        (target / str(step) / "record" / "metadata").write_text("{}")
    for _ in range(2):
        checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())
        with pytest.raises(CheckpointError, match="no checkpoint in .* is intact") as error:
            checkpointer.restore_latest_good(abstract(trees[2]))
        assert error.value.exit_code == 65
        checkpointer.close()
    assert lib.Checkpointer(tmp_path / "new", lib.CheckpointConfig()).restore_latest_good({}) is None


def test_mismatch_shows_a_diff_and_touches_nothing(template, tmp_path):
    """Row C7."""
    target, trees = copy(template, tmp_path), template[1]
    checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())
    good = abstract(trees[2])
    w = good["params"]["layer"]["w"]
    for layer, words in [
        ({"w": w}, "params/layer/b is not expected"),
        (good["params"]["layer"] | {"c": w}, "params/layer/c is missing"),
        ({"weight": w, "b": good["params"]["layer"]["b"]}, "params/layer/weight is missing; params/layer/w is not expected"),
        (
            good["params"]["layer"] | {"w": jax.ShapeDtypeStruct((16, 25), w.dtype, sharding=w.sharding)},
            r"params/layer/w is float32\[64, 96\], expected float32\[16, 25\]",
        ),
        (
            good["params"]["layer"] | {"w": jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=w.sharding)},
            r"expected bfloat16",
        ),
    ]:
        with pytest.raises(CheckpointError, match=words):
            checkpointer.restore_latest_good(good | {"params": {"layer": layer}})
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_disk_full_is_refused_before_writing_and_recovers(tmp_path, monkeypatch):
    """Row C4: training goes on, and the next save works when there is room again."""
    checkpointer, trees = saved(tmp_path, steps=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(host, "free_disk_bytes", lambda path: 1000)
        assert not checkpointer.save(2, make_tree(seed=2), {})
    assert checkpointer.failures == 1 and checkpointer.steps() == [1]
    assert checkpointer.save(3, make_tree(seed=3), {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 3]
    checkpointer.close()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    """Row C4 for real: a 2 MiB file system, with the check before writing deceived."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        monkeypatch.setattr(host, "free_disk_bytes", lambda path: 2**40)
        checkpointer, trees = saved(disk / "c", steps=(1,))
        big = {"params": {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}
        checkpointer.save(2, big, {})
        checkpointer.wait()
        assert checkpointer.failures == 1 and checkpointer.steps() == [1]
        _, tree, _ = checkpointer.restore_latest_good(abstract(trees[1]))
        assert_same(tree, trees[1])
        assert checkpointer.save(3, trees[1], {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
        checkpointer.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_disappears_or_is_a_file(tmp_path):
    checkpointer, _ = saved(tmp_path / "c", steps=(1,))
    shutil.rmtree(tmp_path / "c")
    assert checkpointer.save(2, make_tree(), {})
    checkpointer.wait()
    assert checkpointer.steps() == [2]
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("a file")
    assert not checkpointer.save(3, make_tree(), {})
    assert checkpointer.failures == 1
    (tmp_path / "c").unlink()
    assert checkpointer.save(4, make_tree(), {})
    checkpointer.wait()
    assert checkpointer.steps() == [4]
    checkpointer.close()


def test_policy_by_step_and_by_time_and_what_is_kept(tmp_path):
    now = [0.0]
    config = lib.CheckpointConfig(every_steps=10, every_seconds=60.0, keep=2, keep_every_steps=20, is_async=False)
    checkpointer = lib.Checkpointer(tmp_path, config, clock=lambda: now[0])
    assert [step for step in range(25) if checkpointer.should_save(step)] == [10, 20]
    now[0] = 61.0
    assert checkpointer.should_save(3)
    for step in (10, 20, 30, 40, 50):
        assert checkpointer.save(step, make_tree(), {})
    assert checkpointer.steps() == [20, 40, 50]
    assert not checkpointer.should_save(50)
    checkpointer.close()


def test_asking_whether_a_save_is_due_reads_no_folder(tmp_path, monkeypatch):
    checkpointer = lib.Checkpointer(tmp_path, lib.CheckpointConfig(every_steps=10))
    monkeypatch.setattr(lib, "_steps", lambda directory: pytest.fail("the folder was listed"))
    assert not any(checkpointer.should_save(step) for step in range(10))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_killed_while_saving(delay, tmp_path):
    """Row R4: the step before stays the newest, and what is left over is removed."""
    script = f"""
import jax.numpy as jnp, os, signal, time
from llmos_jax.train.checkpoint import Checkpointer, CheckpointConfig
c = Checkpointer({str(tmp_path)!r}, CheckpointConfig(keep=5))
c.save(1, {{"params": {{"w": jnp.ones(8)}}}}, {{}}); c.wait()
c.save(2, {{"params": {{"w": jnp.ones((512, 8192))}}}}, {{}})
time.sleep({delay}); os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    checkpointer = lib.Checkpointer(tmp_path, lib.CheckpointConfig())
    steps = checkpointer.steps()
    assert steps in ([1], [1, 2])
    shape = (8,) if steps[-1] == 1 else (512, 8192)
    wanted = {
        "params": {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    }
    step, tree, _ = checkpointer.restore_latest_good(wanted)
    assert step == steps[-1] and float(tree["params"]["w"].min()) == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(s) for s in steps]
    checkpointer.close()


def test_verbs(template, tmp_path):
    target = copy(template, tmp_path)
    (target / "9.orbax-checkpoint-tmp").mkdir()
    file = max((f for f in (target / "1").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))
    assert [row.step for row in lib.list_checkpoints(target)] == [1, 2]
    rows = lib.verify_checkpoints(target)
    assert [(row.step, row.is_good) for row in rows] == [(1, False), (2, True)]
    assert "DAMAGED" in lib.format_rows(rows)
    assert lib.collect_garbage(target, keep=1) == ["9.orbax-checkpoint-tmp", "1"]
    assert sorted(p.name for p in target.iterdir()) == ["2"]


def test_garbage_collection_keeps_the_last_step_that_verifies(template, tmp_path):
    """Keeping the newest one alone would leave nothing to restore where that one is damaged."""
    target = copy(template, tmp_path)
    zero(target / "2" / "params")
    assert lib.collect_garbage(target, keep=1) == []
    checkpointer = lib.Checkpointer(target, lib.CheckpointConfig())
    assert checkpointer.restore_latest_good(abstract(template[1][1]))[0] == 1
    with pytest.raises(CheckpointError, match="has no step 2; it has 1"):
        checkpointer.restore_part(abstract(template[1][1])["params"], key="params", step=2)
    assert lib.collect_garbage(target, keep=1) == ["quarantine-2"]
    zero(target / "1" / "params")
    with pytest.raises(CheckpointError, match="checkpoints/1 is damaged"):
        checkpointer.restore_part(abstract(template[1][1])["params"], key="params", step=1)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
            lib.collect_garbage(target, keep=1)
        with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):  # moves it to quarantine
            checkpointer.restore_latest_good(abstract(template[1][1]))
    checkpointer.close()


def test_steps_that_go_while_they_are_listed_are_left_out(template, tmp_path, monkeypatch):
    target, real = copy(template, tmp_path), lib._read_record

    def read(folder):
        if folder.name == "1":
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(lib, "_read_record", read)
    assert [row.step for row in lib.list_checkpoints(target)] == [2]


def test_what_is_read_alone_tells_no_checkpoint_yet_from_none_intact(tmp_path):
    """Where all steps were moved to quarantine, training it first is no advice."""
    checkpointer = lib.Checkpointer(tmp_path, lib.CheckpointConfig())
    with pytest.raises(CheckpointError, match="has no checkpoint yet: train it first"):
        checkpointer.restore_part({}, key="params")
    (tmp_path / "quarantine-3").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact .damaged ones are kept as quarantine-STEP"):
        checkpointer.restore_part({}, key="params")


def zero(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))


def test_a_save_does_not_wait_for_the_disk(tmp_path):
    """The asynchronous path is used: the step's folder is not there when save returns."""
    checkpointer = lib.Checkpointer(tmp_path, lib.CheckpointConfig())
    tree = {"params": {"w": jnp.ones((2048, 2048))}}
    checkpointer.save(1, tree, {})
    was_there = (tmp_path / "1").exists()
    checkpointer.wait()
    assert not was_there and (tmp_path / "1").exists()
    checkpointer.close()
