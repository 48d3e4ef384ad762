"""Faults on purpose, for tests of recovery: named by one environment variable, inert without it."""

import os
import pathlib
import re
import signal
import threading
import time

from llmos_jax.errors import ConfigError

VARIABLE = "LLMOS_FAULT"
KINDS = ("kill", "sigterm", "freeze", "stuck", "error")
_FORM = re.compile(r"(?P<kind>\w+):p(?P<process>\d+):(?P<when>step|save|end)(?P<step>\d+)")


class Faults:
    """Faults of this process, from text such as `kill:p1:step12,kill:p0:save20,sigterm:p0:step40`.

    kill (SIGKILL), sigterm (SIGTERM), freeze (SIGSTOP), stuck (sleeps for ever) and error (an OSError) strike process `pN`:
    `stepN` before it dispatches the step, `saveN` as soon as the step's unfinished checkpoint is seen, `endN` before the last
    evaluation of a run that ends at the step. Each strikes once per run directory: a marker file tells the process that is
    started next. After a SIGTERM two seconds pass: the runtime looks for it once a second, and small runs would end before.
    """

    def __init__(self, directory, process, text=None):
        self._directory = pathlib.Path(directory)
        self._waiting = {}
        for item in filter(None, (text if text is not None else os.environ.get(VARIABLE, "")).split(",")):
            found = _FORM.fullmatch(item.strip())
            if not found or found["kind"] not in KINDS:
                raise ConfigError(
                    f"{VARIABLE}={item!r} must be KIND:pPROCESS:stepSTEP (saveSTEP, endSTEP), KIND one of {', '.join(KINDS)}."
                )
            if int(found["process"]) == process:
                self._waiting[int(found["step"]), found["when"] == "end"] = (found["kind"], found["when"], item.strip())

    def strike(self, step, is_end=False):
        """Does what is planned before `step` is dispatched, or for the save after it, or after the last, if anything is."""
        if (step, is_end) not in self._waiting:
            return
        kind, when, name = self._waiting.pop((step, is_end))
        if when == "save":
            threading.Thread(target=self._strike_in_save, args=(step, kind, name), daemon=True).start()
        else:
            self._strike(kind, name)

    def _strike_in_save(self, step, kind, name):
        while not any(self._directory.glob(f"checkpoints/{step}.orbax-checkpoint-tmp*")):
            time.sleep(0.0005)
        self._strike(kind, name)

    def _strike(self, kind, name):
        try:
            (self._directory / f"fault-{name.replace(':', '-')}").touch(exist_ok=False)
        except FileExistsError:
            return  # it has struck an earlier process of this run
        if kind == "error":
            raise OSError(f"a fault on purpose: {name}")
        if kind == "stuck":
            while True:
                time.sleep(60)
        number = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "freeze": signal.SIGSTOP}[kind]
        os.kill(os.getpid(), number)
        if kind == "sigterm":
            time.sleep(2)
