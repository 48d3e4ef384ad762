"""One writer per run directory. Row C6 of the fault matrix."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from llmos_jax.compute.host import process_start
from llmos_jax.errors import RunDirectoryError, RunDirectoryLocked
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


def refuse_links(monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    """Colab's mounted Drive has none."""
    refuse_links(monkeypatch, errno.ENOTSUP)
    with RunDirectoryLease(tmp_path):
        with pytest.raises(RunDirectoryLocked), RunDirectoryLease(tmp_path):
            pass
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    refuse_links(monkeypatch, errno.ENOSPC)
    with pytest.raises(RunDirectoryError, match="can't be used .No space left on device"), RunDirectoryLease(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_two_takers_of_a_stale_lease_one_is_refused(tmp_path, monkeypatch):
    """The slower one has judged the old lease when the faster one lays its own: that one is not evicted."""
    file = tmp_path / LEASE_FILE
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process_start": 1, "token": "x"}))
    os.utime(file, (0, 0))
    faster, slower = RunDirectoryLease(tmp_path), RunDirectoryLease(tmp_path)
    judge = slower._is_alive

    def judge_slowly(holder, age):
        verdict = judge(holder, age)
        if not hasattr(faster, "_thread"):
            faster.__enter__()
        return verdict

    monkeypatch.setattr(slower, "_is_alive", judge_slowly)
    with pytest.raises(RunDirectoryLocked):
        slower.__enter__()
    assert json.loads(file.read_text()) == faster._content
    faster.__exit__()
    assert not list(tmp_path.iterdir())


def test_a_lease_that_can_not_be_read_for_a_moment_is_renewed_later(tmp_path, monkeypatch):
    with RunDirectoryLease(tmp_path, stale_after_seconds=0.6) as lease:
        with monkeypatch.context() as patch:
            failed = []

            def fail(file):
                failed.append(file)
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, "utime", fail)
            patch.setattr(lease, "_read", lambda: None)
            deadline = time.monotonic() + 10
            while not failed:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        old = time.time() - 50
        os.utime(tmp_path / LEASE_FILE, (old, old))
        while (tmp_path / LEASE_FILE).stat().st_mtime < old + 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
