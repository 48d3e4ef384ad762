"""Every test sees eight virtual CPU devices (or those of $LLMOS_TEST_PLATFORM) and a cache folder of its own session."""

import importlib.metadata
import importlib.util
import os
import tempfile

_PLATFORM = os.environ.get("LLMOS_TEST_PLATFORM", "cpu")  # for tests/test_accelerator.py, on a machine that has one
os.environ["JAX_PLATFORMS"] = _PLATFORM if _PLATFORM == "cpu" else f"{_PLATFORM},cpu"
# Most of the suite's time is compilation for eight devices: without LLVM's optimisation and MLIR for each fusion a third of it
# is left, and products are a library's in any case. Later jaxlibs, and libtpu, end where they see the last flag.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None:
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
if _PLATFORM == "cpu":
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share the folder of the process that started them
    _FOLDER = tempfile.TemporaryDirectory(prefix="llmos-tests-")
    os.environ["LLMOS_CACHE"] = _FOLDER.name
_CACHE = os.environ["LLMOS_CACHE"]

import jax  # noqa: E402  the environment above decides what it sees
import pytest  # noqa: E402

# Programs that several tests compile are compiled once.
jax.config.update("jax_compilation_cache_dir", os.path.join(_CACHE, "compile"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# The files that take longest, the longest first.
_LONGEST = [
    "test_recovery",
    "test_run",
    "test_processes",
    "test_main",
    "test_pipeline",
    "test_step",
    "test_engine",
    "test_distributed",
    "test_privacy",
    "test_families",
    "test_expert_parallel",
    "test_launchers",
    "test_replicas",
]


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden from today's settings")


def pytest_collection_modifyitems(items):
    """Puts long files first, so that the end is short work: a file's tests, which share fixtures, stay on one worker."""
    ranks = {name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def tpu_compiler(monkeypatch):
    """Skips where there is none; it compiles for chips that are not here, in as many processes as ask."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes in the libtpu package, which only TPU hosts install")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture
def four_tpu_chips(tpu_compiler):
    """Four chips of a v5e to compile for."""
    from jax.experimental import topologies

    given = dict(topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1), num_slices=1)
    return topologies.get_topology_desc(platform="tpu", **given).devices


@pytest.fixture(scope="session")
def cache_directory():
    """The session's cache: prepared data and compiled programs are shared by the tests that start processes."""
    return _CACHE


@pytest.fixture
def nvidia_smi(tmp_path_factory, monkeypatch):
    """Returns `attach(count)`: makes a host on which the driver lists so many GPUs, for this process and those it starts."""
    folder = tmp_path_factory.mktemp("driver")

    def attach(count):
        lines = [f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number:04d})" for number in range(count)]
        (folder / "nvidia-smi").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
        (folder / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return attach
