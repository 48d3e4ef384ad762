"""Chip table, host, mesh, sharding rules, memory: figures that are consistent and refusals that say why."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute import devices, host, memory
from llmos_jax.compute.mesh import AXES, MeshConfig, build_mesh, mesh_sizes
from llmos_jax.compute.sharding import global_array, make_placement
from llmos_jax.errors import ConfigError, DeviceMemoryError


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"), ("TPU v6e", "TPU v6e"), ("TPU7x", "TPU v7"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100 80GB PCIe", "A100-80GB"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"),
    ],
)  # fmt: skip
def test_devices_find_their_chip(kind, name):
    assert devices.chip_named(kind).name == name


def test_the_table_is_consistent():
    for chip in devices.CHIPS.values():
        assert 1e14 < chip.peak_flops["bfloat16"] < 5e15
        assert chip.peak_flops.get("int8", chip.peak_flops["bfloat16"]) >= chip.peak_flops["bfloat16"]
        assert 15e9 < chip.hbm_bytes < 300e9 and 5e11 < chip.hbm_bandwidth < 1e13
        assert 1e11 < chip.link_bandwidth < chip.hbm_bandwidth
        assert chip.source.startswith("https://")
    assert devices.chip_named("Quantum 9000") is None
    unknown = [types.SimpleNamespace(platform="gpu", device_kind="Quantum 9000")]
    assert devices.peak_flops(unknown, "bfloat16") is None
    eight = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")] * 8
    assert devices.peak_flops(eight, "bfloat16") == 8 * devices.CHIPS["H200"].peak_flops["bfloat16"]
    assert devices.describe_devices(eight) == "8 x NVIDIA H200 (141 GB each)"


def test_the_cpu_is_measured_and_remembered():
    measured = devices.peak_flops(jax.devices(), "float32")
    assert 1e9 < measured < 1e14
    (remembered,) = json.loads((host.cache_directory("measured") / "cpu_flops.json").read_text()).values()
    assert remembered == measured
    (host.cache_directory("measured") / "cpu_flops.json").write_text("{")
    assert 1e9 < devices.peak_flops(jax.devices(), "float32") < 1e14
    assert "CPU" in devices.describe_devices(jax.devices())


def test_a_cache_that_can_not_be_made_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMOS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"can't be made \(Not a directory\): name another in \$LLMOS_CACHE"):
        host.cache_directory("data")


def test_host(tmp_path):
    assert 1 <= host.cores() <= (os.cpu_count() or 1)
    assert 2**28 < host.memory_bytes() < 2**45
    assert host.peak_memory_bytes() > 2**25
    assert host.free_disk_bytes(tmp_path / "not" / "there") > 0
    assert 0 < host.process_age_seconds() < 3600
    assert (host.cache_directory("x").stat().st_mode & 0o777) == 0o700


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_kept_heap_takes_no_page_faults():
    script = """
import resource, sys
import numpy as np
from llmos_jax.compute import host
if sys.argv[1] == "keep": assert host.keep_heap()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): np.ones(2**23)
before = faults()
for _ in range(10): np.ones(2**23)
print(faults() - before)
"""
    counts = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, timeout=60, check=True)
        counts[mode] = int(done.stdout)
    assert counts["keep"] < counts["default"] / 10


def test_mesh_sizes():
    ones = dict.fromkeys(AXES, 1)
    assert mesh_sizes(MeshConfig(), 8) == ones | {"data": 8}
    assert mesh_sizes(MeshConfig(model=4), 8) == ones | {"data": 2, "model": 4}
    assert mesh_sizes(MeshConfig(data=2, model=-1), 8) == ones | {"data": 2, "model": 4}
    assert build_mesh(MeshConfig(replica=2, model=2)).shape == ones | {"replica": 2, "data": 2, "model": 2}


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"model": 3}, "mesh.model=3 does not divide the 8 .*nearest that fits: mesh.model=2 mesh.data=4"),
        ({"data": 4, "model": 4}, "mesh.model=4 does not divide the 2 .*nearest that fits: mesh.model=4 mesh.data=2"),
        ({"data": 2, "model": 2}, "does not fit 8 device.*multiply to 4; .*mesh.model=2 mesh.data=4"),
        ({"data": 0}, "sizes are positive"),
        ({"data": -1, "model": -1}, "one of them may be -1"),
        ({"rules": {"mlpp": ("model",)}}, "mesh.rules.mlpp: no such logical axis"),
        ({"rules": {"mlp": ("modl",)}}, "names the mesh axis 'modl'; known: pipeline, replica, data"),
    ],
)
def test_impossible_meshes_are_refused(choices, words):
    with pytest.raises(ConfigError, match=words):
        make_placement(MeshConfig(**choices))


def test_rules_are_data():
    placement = make_placement(MeshConfig(data=4, model=2, parameters="fsdp", rules={"vocab": ()}))
    assert placement.spec("embed", "mlp") == jax.sharding.PartitionSpec(("data", "context", "expert"), "model")
    assert placement.spec("vocab", None) == jax.sharding.PartitionSpec(None, None)
    assert placement.axis_size("batch") == 4
    with pytest.raises(ConfigError, match="logical axis 'embd' is not in the rules; known: batch"):
        placement.spec("embd")
    with pytest.raises(ConfigError, match="over two dimensions"):
        placement.spec("mlp", "heads")


def test_a_process_reads_only_the_rows_it_holds():
    placement = make_placement(MeshConfig(data=4, model=2))
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return np.arange(start * 3, stop * 3).reshape(-1, 3)

    array = global_array(rows, (8, 3), np.int32, placement.sharding("batch", None))
    np.testing.assert_array_equal(array, np.arange(24).reshape(8, 3))
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]  # once each, although two devices hold every row


def test_what_does_not_fit_is_refused_with_its_reasons():
    compiled = jax.jit(lambda x: (x @ x).sum()).lower(jnp.ones((256, 256))).compile()
    need = memory.compiled_bytes(compiled)
    assert need["arguments"] == 256 * 256 * 4
    memory.check_fit(need, {}, None)
    memory.check_fit(need, {}, need["total"])
    with pytest.raises(DeviceMemoryError, match=r"parameters 3.00 GiB.*optimizer 2.00 GiB.*train.microbatches") as error:
        memory.check_fit(need, {"parameters": 3 * 2**30, "optimizer": 2**31}, need["total"] - 1)
    assert error.value.exit_code == 78


def test_bytes_per_device_count_shards():
    placement = make_placement(MeshConfig(data=8))
    struct = jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=placement.sharding("batch", None))
    assert memory.bytes_per_device({"x": struct}) == 16 * 4 * 2 / 8
