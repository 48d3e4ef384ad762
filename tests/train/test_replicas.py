"""Row N4: a bit that flips in one device's copy of a parameter is found, and the device is named."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax import api
from llmos_jax.errors import ReplicaMismatch
from llmos_jax.train import loop
from llmos_jax.train.fingerprint import ReplicaCheck, fingerprints
from tests.gang import TINY


def mesh(shape=(4, 2)):
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))


def tree(where):
    values = {
        "w": np.arange(64, dtype=np.float32).reshape(8, 8),
        "b": np.ones(8, np.float32),
        "s": np.ones((16, 4), np.float32),
    }
    specs = {"w": PartitionSpec(None, "model"), "b": PartitionSpec(), "s": PartitionSpec("data", "model")}
    return {name: jax.device_put(value, NamedSharding(where, specs[name])) for name, value in values.items()}


def flipped(array, device, bit=3):
    """The array with one bit changed in the copy that one device holds."""
    pieces = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def test_equal_copies_pass_and_are_compiled_once():
    check = ReplicaCheck(tree(mesh()), mesh())
    for _ in range(2):
        check(tree(mesh()))
    assert check._run._cache_size() == 1


@pytest.mark.parametrize(("name", "device", "copies"), [("w", 5, 3), ("b", 0, 7), ("b", 6, 7)])
@pytest.mark.parametrize("bit", [0, 31])
def test_the_device_whose_copy_differs_is_named(name, device, copies, bit):
    good = tree(mesh())
    bad = good | {name: flipped(good[name], device, bit)}
    with pytest.raises(
        ReplicaMismatch, match=rf"{name} on device {device} \(cpu, process 0\) differs from its {copies} other"
    ) as e:
        ReplicaCheck(good, mesh())(bad)
    assert e.value.exit_code == 75


def test_without_a_majority_both_are_named():
    where = mesh((2, 4))
    good = tree(where)
    with pytest.raises(ReplicaMismatch, match="w differs between device 2 .* and device 6 .* no majority"):
        ReplicaCheck(good, where)(good | {"w": flipped(good["w"], 6)})


def test_what_only_one_device_holds_has_nothing_to_be_compared_with():
    good = tree(mesh())
    ReplicaCheck(good, mesh())(good | {"s": flipped(good["s"], 3)})


def test_a_checkpoint_fingerprint_does_not_see_it():
    """Why the check is needed: the fingerprint of the whole array reads one copy of each part."""
    good = tree(mesh())
    seen = {fingerprints({"b": flipped(good["b"], device)})["b"] for device in range(8)}
    assert fingerprints({"b": good["b"]})["b"] in seen


def test_a_run_stops_before_it_saves_what_differs(tmp_path, monkeypatch):
    """On its rhythm and before saves: the checkpoint from before the flip is the newest."""
    options = TINY | {"train.steps": 12, "checkpoint.every_steps": 4, "train.compare_replicas_every_steps": 3}
    settings, _ = api.load_settings("experiments/gpt.py:smoke", [(name, str(value)) for name, value in options.items()])
    real, calls = loop.ReplicaCheck.__call__, []

    def check(self, state):
        calls.append(int(state["step"]))
        if calls[-1] == 6:
            state["params"]["norm"]["scale"] = flipped(state["params"]["norm"]["scale"], 2)
        real(self, state)

    monkeypatch.setattr(loop.ReplicaCheck, "__call__", check)
    with pytest.raises(ReplicaMismatch, match=r"params/norm/scale on device 2 \(cpu, process 0\) differs from its 7 other"):
        api.run_training(settings, tmp_path)
    assert calls == [3, 4, 6]
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["4"]
