"""One writer per run directory. Row C6 of the fault matrix."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmos_jax.compute.host import pid_space, process_start
from llmos_jax.errors import RunDirectoryError, RunDirectoryLocked
from llmos_jax.train.lease import LEASE_FILE, RunDirectoryLease
from tests.gang import launch


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


ELSEWHERE = {"host": "elsewhere", "pid_space": "another boot", "pid": 1, "process_start": 1, "token": "x"}


@pytest.mark.parametrize("skew_seconds", [-5.0, -1e6, 1e6])
def test_a_holder_on_another_host_that_renews_is_refused(skew_seconds, tmp_path):
    """However far the clock of the file system is from this host's."""
    file, stop = tmp_path / LEASE_FILE, threading.Event()
    file.write_text(json.dumps(ELSEWHERE))

    def renew():
        turn = 0
        while not stop.wait(0.1):
            turn += 1
            os.utime(file, (time.time() + skew_seconds + turn / 10,) * 2)

    holder = threading.Thread(target=renew)
    holder.start()
    try:
        with pytest.raises(RunDirectoryLocked, match="process 1 on elsewhere"), RunDirectoryLease(tmp_path, renew_seconds=4.0):
            pass
    finally:
        stop.set()
        holder.join()
    assert json.loads(file.read_text()) == ELSEWHERE


@pytest.mark.parametrize("skew_seconds", [-5.0, -1e6, 1e6])
def test_a_holder_on_another_host_that_is_gone_is_followed(skew_seconds, tmp_path):
    """Its node was lost seconds ago: the process that is started in its place must not end for good."""
    file = tmp_path / LEASE_FILE
    file.write_text(json.dumps(ELSEWHERE))
    os.utime(file, (time.time() + skew_seconds,) * 2)
    with RunDirectoryLease(tmp_path, renew_seconds=0.2) as lease:
        assert json.loads(file.read_text()) == lease._content
    assert not list(tmp_path.iterdir())


def test_a_pid_of_another_container_is_not_looked_up(tmp_path):
    """It has this host's name and a number that a process has here, but is another process: it is watched."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid()), "token": "x"}
    (tmp_path / LEASE_FILE).write_text(json.dumps(here | {"pid_space": "another container"}))
    with RunDirectoryLease(tmp_path, renew_seconds=0.2):
        pass


def test_half_a_lease_is_waited_for_then_removed(tmp_path):
    (tmp_path / LEASE_FILE).write_text('{"host": "else')
    with RunDirectoryLease(tmp_path, renew_seconds=0.2) as lease:
        assert json.loads((tmp_path / LEASE_FILE).read_text()) == lease._content


@pytest.mark.slow
def test_a_run_goes_on_when_process_0_comes_back_on_another_host(tmp_path):
    """By the launcher: the lease of a host that was lost a moment ago ends nothing."""
    (tmp_path / LEASE_FILE).write_text(json.dumps(ELSEWHERE))
    done = launch(tmp_path, processes=1, train__steps=2)
    assert done.code == 0 and done.restarts == 0 and f"taking over {tmp_path}" in done.text, done.text


def test_a_reused_pid_is_not_the_holder(tmp_path):
    content = {"host": "here", "pid_space": pid_space(), "pid": os.getpid(), "process_start": process_start(os.getpid()) - 1}
    (tmp_path / LEASE_FILE).write_text(json.dumps(content))
    with RunDirectoryLease(tmp_path):
        pass


def test_the_lease_is_renewed(tmp_path):
    with RunDirectoryLease(tmp_path, renew_seconds=0.1):
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
    file.write_text(json.dumps(ELSEWHERE))
    faster, slower = (RunDirectoryLease(tmp_path, renew_seconds=0.1) for _ in range(2))
    judge = slower._is_renewed

    def judge_slowly(seen):
        verdict = judge(seen)
        if not hasattr(faster, "_thread"):
            faster.__enter__()
        return verdict

    monkeypatch.setattr(slower, "_is_renewed", judge_slowly)
    with pytest.raises(RunDirectoryLocked):
        slower.__enter__()
    assert json.loads(file.read_text()) == faster._content
    faster.__exit__()
    assert not list(tmp_path.iterdir())


def test_a_lease_that_can_not_be_read_for_a_moment_is_renewed_later(tmp_path, monkeypatch):
    with RunDirectoryLease(tmp_path, renew_seconds=0.1) as lease:
        with monkeypatch.context() as patch:
            failed = []

            def fail(file):
                failed.append(file)
                raise OSError(errno.EIO, "Input/output error")

            patch.setattr(os, "utime", fail)
            patch.setattr(lease, "_look", lambda: (None, None))
            deadline = time.monotonic() + 10
            while not failed:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        old = time.time() - 50
        os.utime(tmp_path / LEASE_FILE, (old, old))
        while (tmp_path / LEASE_FILE).stat().st_mtime < old + 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
