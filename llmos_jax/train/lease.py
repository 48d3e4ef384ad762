"""One writer per run directory: a lease file, renewed while its process lives."""

import errno
import json
import os
import pathlib
import socket
import threading
import time

from absl import logging

from llmos_jax.compute.host import process_start
from llmos_jax.errors import RunDirectoryError, RunDirectoryLocked

LEASE_FILE = "lease.json"
# What file systems without hard links say to one.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_HALF_WRITTEN_SECONDS = 2.0


class RunDirectoryLease:
    """Holds a run directory while it is entered; a second holder gets RunDirectoryLocked at once.

    A lease whose process is gone (same host), or that was not renewed for `stale_after_seconds` (another host), is taken
    over. No file locks: they don't hold on network file systems. RunDirectoryError when the file can't be written.
    """

    def __init__(self, directory, *, stale_after_seconds=60.0):
        self.file = pathlib.Path(directory) / LEASE_FILE
        self.stale_after_seconds = stale_after_seconds
        self._stop = threading.Event()

    def __enter__(self):
        self._content = {
            "host": socket.gethostname(),
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
        if self._read() == self._content:
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
        holder = self._read()
        try:
            age = time.time() - self.file.stat().st_mtime
        except FileNotFoundError:
            return  # released just now
        if holder is None and 0 <= age < _HALF_WRITTEN_SECONDS:
            time.sleep(0.05)  # being written, where there are no hard links
            return
        if holder is not None and self._is_alive(holder, age):
            raise RunDirectoryLocked(
                f"{self.file.parent} is in use by process {holder['pid']} on {holder['host']} (renewed {age:.0f} s ago): wait "
                "for it, stop it, or name another --workdir."
            )
        logging.warning("taking over %s: its holder %s is gone", self.file.parent, holder)
        # Renamed before it is removed: of two takers, one finds nothing to rename, or finds the lease that the other has
        # made since, and lays it back.
        evicted = self.file.with_name(f"{LEASE_FILE}.evicted-{self._content['token']}")
        try:
            self.file.rename(evicted)
        except FileNotFoundError:
            return
        if self._read(evicted) != holder:
            evicted.rename(self.file)
            return
        evicted.unlink()

    def _is_alive(self, holder, age):
        if holder.get("host") == socket.gethostname():
            started = process_start(holder["pid"])
            return started is not None and started == holder.get("process_start")
        return age < self.stale_after_seconds

    def _read(self, file=None):
        try:
            content = json.loads((file or self.file).read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and {"host", "pid"} <= set(content) else None

    def _renew(self):
        while not self._stop.wait(self.stale_after_seconds / 6):
            try:
                holder = self._read()
                if holder is not None and holder != self._content:
                    logging.error("%s: the lease was taken over by another process; stop one of the two.", self.file.parent)
                    return
                os.utime(self.file)
            except OSError as error:  # a network file system may come back: the next renewal is tried as planned
                logging.warning("%s can't be renewed now (%s).", self.file, error.strerror)
