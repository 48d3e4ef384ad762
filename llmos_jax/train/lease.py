"""One writer per run directory: a lease file, renewed while its process lives."""

import contextlib
import errno
import json
import os
import pathlib
import socket
import threading
import time

from absl import logging

from llmos_jax.compute.host import pid_space, process_start
from llmos_jax.errors import RunDirectoryError, RunDirectoryLocked

LEASE_FILE = "lease.json"
# What file systems without hard links say to one.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A holder that renews nothing for so many turns is gone: one turn may be late, of a file system that stalls.
_WATCHED_RENEWALS = 2.5
_HALF_WRITTEN_SECONDS = 2.0
_RELEASED = (None, None)


class RunDirectoryLease:
    """Holds a run directory while it is entered; a second holder gets RunDirectoryLocked.

    Whether a holder lives is looked up where it is a process of this host, at once. One of another host (or container) is
    watched: it lives if it renews its lease, every `renew_seconds`; if it does not for 2.5 times as long, it is taken over.
    The file's times are compared with each other only, never with this host's clock. No file locks: they don't hold on
    network file systems. RunDirectoryError when the file can't be written.
    """

    def __init__(self, directory, *, renew_seconds=10.0):
        self.file = pathlib.Path(directory) / LEASE_FILE
        self.renew_seconds = renew_seconds
        self._stop = threading.Event()

    def __enter__(self):
        self._content = {
            "host": socket.gethostname(),
            "pid_space": pid_space(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "token": os.urandom(8).hex(),
        }
        try:
            while not self._create():
                self._refuse_or_evict()
        except OSError as error:
            raise RunDirectoryError(
                f"{self.file.parent} can't be used ({error.strerror}): make it writable, make room, or name another --workdir."
            ) from None
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a file system that is gone: the lease is stale from here on
            if self._look()[0] == self._content:
                self.file.unlink(missing_ok=True)

    def _create(self):
        # A hard link appears with its content and fails if the name exists: no reader sees half a lease.
        temporary = self.file.with_name(f"{LEASE_FILE}.{self._content['token']}")
        try:
            temporary.write_text(json.dumps(self._content))
            os.link(temporary, self.file)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_without_links()
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_without_links(self):
        """The same on file systems without hard links (Colab's Google Drive), where half a lease can be seen for a moment."""
        try:
            with open(self.file, "x") as stream:
                stream.write(json.dumps(self._content))
        except FileExistsError:
            return False
        except OSError:
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _refuse_or_evict(self):
        holder, _ = seen = self._look()
        if seen == _RELEASED:
            return
        if holder is not None and holder.get("pid_space") == pid_space():
            started = process_start(holder["pid"])
            is_alive = started is not None and started == holder.get("process_start")
        else:
            is_alive = self._is_renewed(seen)
        if is_alive is None:
            return
        if is_alive:
            raise RunDirectoryLocked(
                f"{self.file.parent} is in use by process {holder['pid']} on {holder['host']}: wait for it, stop it, or name "
                "another --workdir."
            )
        logging.warning("taking over %s: its holder %s is gone", self.file.parent, holder)
        # Renamed before it is removed: of two takers, one finds nothing to rename, or finds the lease that the other has
        # made since, and lays it back.
        evicted = self.file.with_name(f"{LEASE_FILE}.evicted-{self._content['token']}")
        try:
            self.file.rename(evicted)
        except FileNotFoundError:
            return
        if self._look(evicted)[0] != holder:
            evicted.rename(self.file)
            return
        evicted.unlink()

    def _is_renewed(self, seen):
        """Returns, after watching the file, whether it was renewed; None when it has become another lease, or none."""
        holder = seen[0]
        seconds = _WATCHED_RENEWALS * self.renew_seconds
        if holder is not None:
            logging.warning(
                "%s was in use by process %s on %s: taken over if that does not renew its lease within %g s.",
                self.file.parent, holder["pid"], holder["host"], seconds,
            )  # fmt: skip
        else:  # half a lease, being written where there are no hard links
            seconds = min(seconds, _HALF_WRITTEN_SECONDS)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self.renew_seconds / 50)
            found = self._look()
            if found[0] != holder:
                return None
            if found != seen and holder is not None:
                return True
        return False

    def _look(self, file=None):
        """Returns (holder, time of the last renewal); holder None when half of it is there, both None when it is released."""
        try:
            # Network file systems ask their server for a file's times when it is opened: those of `stat` may be a minute old.
            with open(file or self.file) as stream:
                renewed = os.fstat(stream.fileno()).st_mtime_ns
                content = json.load(stream)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return _RELEASED
        except ValueError:
            return None, renewed
        return content if isinstance(content, dict) and {"host", "pid"} <= set(content) else None, renewed

    def _renew(self):
        while not self._stop.wait(self.renew_seconds):
            try:
                holder = self._look()[0]
                if holder is not None and holder != self._content:
                    logging.error("%s: the lease was taken over by another process; stop one of the two.", self.file.parent)
                    return
                os.utime(self.file)
            except OSError as error:  # a network file system may come back: the next renewal is tried as planned
                logging.warning("%s can't be renewed now (%s).", self.file, error.strerror)
