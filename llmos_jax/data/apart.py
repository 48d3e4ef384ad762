"""Work on what others wrote (patterns, templates), in a process of its own that the system ends at its limits.

Such work can take years or all memory inside one call of a library, where nothing of this process can interrupt it. There a
request is a line of JSON, and so is its answer; an alarm ends the process when a request takes too long.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref

# The module whose `main` answers is found where this process finds it.
_PROGRAM = "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"


class EndedError(Exception):
    """The process ended in the middle of a request; its words say at which limit."""


class Process:
    """A process that runs a module's `main` (which calls `serve`); started when first asked, and anew when it is gone.

    greeting: what `main` is given first, JSON.
    """

    def __init__(self, module, greeting=None):
        self._module, self._greeting = module, greeting
        self._start_anew()

    def ask(self, request, seconds, memory_bytes):
        """Returns the answer to a request, both JSON; EndedError when it takes more than so many seconds or bytes."""
        if self._owner != os.getpid():
            self._start_anew()  # a fork's pipes are its parent's
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._forget()  # whatever ended it was not this request
            try:
                if self._process is None:
                    self._start()
                self._send({"request": request, "seconds": seconds, "bytes": memory_bytes})
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # what it answers to this would be taken for an answer to the next
                self._forget()
                raise
            if line:
                return json.loads(line)
            code = self._forget()
        if code == -signal.SIGALRM:
            raise EndedError(f"it takes more than {seconds:.0f} seconds")
        raise EndedError(f"its process ended with {code}, of its own or out of {memory_bytes / 2**30:.1f} GiB of memory")

    def __getstate__(self):
        return {"_module": self._module, "_greeting": self._greeting}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._start_anew()

    def _start_anew(self):
        self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()

    def _start(self):
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), self._module]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise EndedError(f"no process can be started for it: {error}") from None
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._send(self._greeting)

    def _send(self, value):
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def _forget(self):
        process, self._process = self._process, None
        if process is None:
            return None
        self._finalizer.detach()
        return _end(process)


def serve(answer_to):
    """Reads the greeting, then answers requests by `answer_to(greeting)(request)` until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers, answer, greeting = sys.stdout, None, json.loads(sys.stdin.readline())
    sys.stdout = sys.stderr
    for line in sys.stdin:
        limits = json.loads(line)
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        data = limits["bytes"] if most == resource.RLIM_INFINITY else min(limits["bytes"], most)
        resource.setrlimit(resource.RLIMIT_DATA, (data, most))
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
        answer = answer or answer_to(greeting)
        answers.write(json.dumps(answer(limits["request"])) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(process):
    process.kill()  # nothing in a fork: there it is nobody's child
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what it did not read
            pipe.close()
    return code
