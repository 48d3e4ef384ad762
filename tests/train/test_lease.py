"""One writer per run directory. Row C6 of the fault matrix."""

import json
import os
import subprocess
import sys
import time

import pytest

from llmos_jax.compute.host import process_start
from llmos_jax.errors import RunDirectoryLocked
from llmos_jax.train.lease import LEASE_FILE, RunDirectoryLease


def test_a_second_writer_is_refused_at_once(tmp_path):
    with RunDirectoryLease(tmp_path):
        start = time.perf_counter()
        with pytest.raises(RunDirectoryLocked, match=f"in use by process {os.getpid()}"), RunDirectoryLease(tmp_path):
            pass
        assert time.perf_counter() - start < 1.0
    assert not list(tmp_path.iterdir())
    with RunDirectoryLease(tmp_path):
        pass


def test_the_lease_of_a_killed_process_is_taken_over(tmp_path):
    script = f"""
import os, signal
from llmos_jax.train.lease import RunDirectoryLease
RunDirectoryLease({str(tmp_path)!r}).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
    assert (tmp_path / LEASE_FILE).exists()
    with RunDirectoryLease(tmp_path):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("age", "is_refused"), [(5.0, True), (100.0, False)])
def test_a_holder_on_another_host_counts_by_its_renewals(age, is_refused, tmp_path):
    file = tmp_path / LEASE_FILE
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process_start": 1, "token": "x"}))
    os.utime(file, (time.time() - age,) * 2)
    if is_refused:
        with pytest.raises(RunDirectoryLocked, match="process 1 on elsewhere"), RunDirectoryLease(tmp_path):
            pass
    else:
        with RunDirectoryLease(tmp_path):
            pass


def test_a_reused_pid_is_not_the_holder(tmp_path):
    import socket

    content = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid()) - 1, "token": "x"}
    (tmp_path / LEASE_FILE).write_text(json.dumps(content))
    with RunDirectoryLease(tmp_path):
        pass


def test_the_lease_is_renewed(tmp_path):
    with RunDirectoryLease(tmp_path, stale_after_seconds=0.6):
        old = time.time() - 50
        os.utime(tmp_path / LEASE_FILE, (old, old))
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE_FILE).stat().st_mtime < old + 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
