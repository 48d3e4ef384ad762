"""Every test sees eight virtual CPU devices and a cache folder of its own session."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation for eight devices: LLVM without optimisation halves it, and products are a library's.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get(
    "XLA_FLAGS", ""
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share the folder of the process that started them
    _FOLDER = tempfile.TemporaryDirectory(prefix="llmos-tests-")
    os.environ["LLMOS_CACHE"] = _FOLDER.name
_CACHE = os.environ["LLMOS_CACHE"]

import jax  # noqa: E402  the environment above decides what it sees
import pytest  # noqa: E402

# Programs that several tests compile are compiled once.
jax.config.update("jax_compilation_cache_dir", os.path.join(_CACHE, "compile"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


_GANGS = ("test_distributed", "test_launchers", "test_processes", "test_recovery", "test_replicas")


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden from today's settings")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keeps a file's tests on one worker (they share fixtures), and all that start gangs of processes on the same one."""
    for item in items:
        starts_gangs = getattr(item.module, "__name__", "").endswith(_GANGS)
        item.add_marker(pytest.mark.xdist_group("gangs" if starts_gangs else str(item.path)))


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
