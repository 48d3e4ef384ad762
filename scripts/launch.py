"""Runs llmos as a gang of processes on this host, and keeps it running: the local launcher with its supervisor.

    python scripts/launch.py --processes=2 -- --config=experiments/gpt.py:smoke --workdir=runs/smoke
    python scripts/launch.py --through="srun --wait=60" -- --config=...    (a cluster's launcher starts the processes)

What follows `--` is llmos's own command line. When a process ends badly the rest is stopped (a frozen one by SIGKILL) and all
are started again on a new port, from the last checkpoint: at once after a preemption (exit code 42) or when the run came
further than ever before, else after a growing pause; after --restarts without a new step it gives up with the last error.
Exit codes 78 (settings) and 65 (data, checkpoint) are passed on: starting again would not help. The run directory's
DONE.json counts for more than any exit code. SIGTERM or Ctrl-C is passed on, and answered by 42 when all have saved, else 75; a
Ctrl-C after it kills. Processes on a host with GPUs get an even share of them.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from llmos_jax import api, errors
from llmos_jax.compute import host

_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_LONGEST_PAUSE_SECONDS = 60.0


@dataclasses.dataclass
class Child:
    """One process of the gang (or a launcher of many). errors: what was reported, as `errors.describe` has it."""

    number: int
    process: subprocess.Popen
    reader: threading.Thread | None = None
    errors: list[dict] = dataclasses.field(default_factory=list)


class Stop:
    """What signals ask for: SIGTERM or Ctrl-C to save and stop (`is_asked`), a Ctrl-C after it not to wait (`is_urgent`)."""

    def __init__(self):
        self.is_urgent, self._asked = False, threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    @property
    def is_asked(self):
        """Whether a signal has arrived."""
        return self._asked.is_set()

    def wait(self, seconds):
        """Returns after `seconds`, or True when a signal arrives before."""
        return self._asked.wait(seconds)

    def _ask(self, number, _):
        self.is_urgent = self.is_urgent or (number == signal.SIGINT and self.is_asked)
        self._asked.set()


class Gang:
    """All processes of one attempt."""

    def __init__(self, command, count, devices):
        port = _free_port()
        self.children = [self._start(command, number, count, devices, port) for number in range(count)]

    def _start(self, command, number, count, devices, port):
        environment = os.environ | {"LLMOS_SUPERVISED": "1", "PYTHONUNBUFFERED": "1"}
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
                "JAX_PROCESS_COUNT": str(count),
                "JAX_PROCESS_ID": str(number),
            }
        if devices:
            others = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES_FLAG)]
            environment["XLA_FLAGS"] = " ".join([*others, f"{_DEVICES_FLAG}={devices}"])
            environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(number * devices, (number + 1) * devices)))
        # A session of its own: Ctrl-C reaches the supervisor alone, which passes it on.
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        child = Child(number, process)
        child.reader = threading.Thread(target=self._read, args=(child,), daemon=True)
        child.reader.start()
        return child

    def _read(self, child):
        for line in child.process.stderr:
            if line.startswith('{"class"'):
                child.errors.append(json.loads(line))
            else:
                print(line if child.number == 0 else f"[{child.number}] {line}", end="", file=sys.stderr, flush=True)

    def wait(self, stop, stop_command, grace_seconds, stop_grace_seconds):
        """Returns all exit codes. After a bad one the rest has `grace_seconds` to leave, after a stop `stop_grace_seconds`."""
        codes, deadline, is_told, first = {}, math.inf, False, None
        while len(codes) < len(self.children):
            for child in self.children:
                code = child.process.poll()
                if code is None or child.number in codes:
                    continue
                codes[child.number] = code
                first = first or time.monotonic()
                say(f"process {child.number} ended with {code}, {time.monotonic() - first:.1f} s after the first")
                is_leaving = is_told and code == errors.EXIT_PREEMPTED  # the others still save
                if code != errors.EXIT_DONE and not is_leaving:
                    deadline = min(deadline, time.monotonic() + grace_seconds)
            if stop.is_asked and not is_told:
                subprocess.run(stop_command, check=False) if stop_command else self.signal(signal.SIGTERM)
                is_told, deadline = True, min(deadline, time.monotonic() + stop_grace_seconds)
            if time.monotonic() > deadline or stop.is_urgent:
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        for child in self.children:
            child.reader.join(timeout=5.0)
        return [codes[child.number] for child in self.children]

    def signal(self, number):
        """Sends a signal to every process that still runs."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    def last_error(self, codes):
        """Returns one line: the error of the process that most likely began it."""
        reported = [error for child in self.children for error in child.errors]
        # Who lost a peer is not the cause; who died of a signal reported nothing.
        reported.sort(key=lambda error: error["class"] == "PeerLost")
        killed = [f"process {number} was killed by signal {-code}" for number, code in enumerate(codes) if code < 0]
        told = [f"process {error['process']}: {error['class']}: {error['what']}" for error in reported]
        return "; ".join(killed[:1] + told[:1]) or f"exit codes {codes}"


def supervise(command, directory, args, stop):
    """Runs gangs until the run is done, can't be helped, or is told to stop; returns the exit code."""
    furthest, failures = newest_step(directory), 0
    while True:
        marked = done_marker(directory)
        gang = Gang(command, args.processes, args.devices)
        try:
            codes = gang.wait(stop, shlex.split(args.stop), args.grace, args.stop_grace)
        finally:
            gang.signal(signal.SIGKILL)
        if done_marker(directory) not in (None, marked) or set(codes) == {errors.EXIT_DONE}:
            return errors.EXIT_DONE
        for code in (errors.EXIT_CONFIG, errors.EXIT_CORRUPT):
            if code in codes:
                say(f"given up, starting again does not help: {gang.last_error(codes)}")
                return code
        if stop.is_asked:
            has_saved = set(codes) <= {errors.EXIT_DONE, errors.EXIT_PREEMPTED}
            return errors.EXIT_PREEMPTED if has_saved else errors.EXIT_RETRYABLE
        step = newest_step(directory)
        if step > furthest:
            furthest, failures = step, 0
        elif errors.EXIT_PREEMPTED not in codes:
            failures += 1
        if failures > args.restarts:
            say(f"given up after {args.restarts} restarts without a new step: {gang.last_error(codes)}")
            return errors.EXIT_RETRYABLE
        pause = min(_LONGEST_PAUSE_SECONDS, args.pause * 2 ** (failures - 1)) if failures else 0.0
        say(f"starting again in {pause:g} s, step {step} was reached: {gang.last_error(codes)}")
        if stop.wait(pause):
            return errors.EXIT_PREEMPTED


def newest_step(directory):
    """Returns the newest step that a run directory knows of, from its metrics and checkpoints; 0 for none."""
    steps = [int(entry.name) for entry in (directory / "checkpoints").glob("*") if entry.name.isdigit()]
    metrics = directory / "metrics.jsonl"
    if metrics.is_file():
        steps += [int(step) for step in re.findall(rb'^\{"step": (\d+),', metrics.read_bytes()[-65536:], re.MULTILINE)]
    return max(steps, default=0)


def done_marker(directory):
    """Returns what tells one marker of a run's end from an earlier one, or None when there is none."""
    try:
        # Compared with itself only: the clock of a network file system is not this host's.
        found = (directory / "DONE.json").stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def run_directory(words):
    """Returns the run directory of an llmos command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--workdir")
    parser.add_argument("--config", default="")
    known, _ = parser.parse_known_args(words)
    return pathlib.Path(known.workdir or api.default_directory(*known.config.partition(":")[::2]))


def say(text):
    """Prints one line on standard error."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    """Parses the command line, supervises, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--through", default="", help="command that starts llmos on all hosts, and ends with its exit code")
    parser.add_argument("--stop", default="", help="command that asks the processes to stop; none: SIGTERM to what was started")
    parser.add_argument("--devices", type=int, help="devices of each process: virtual ones on CPU, attached GPUs")
    parser.add_argument("--restarts", type=int, default=3, help="restarts without a new step before it gives up")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before the first such restart, then doubled")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds for the rest to leave after a bad exit")
    parser.add_argument("--stop-grace", type=float, default=1800.0, help="seconds to finish a step and save when asked to stop")
    parser.add_argument("words", nargs="+", metavar="-- llmos arguments")
    args = parser.parse_args()
    if args.processes > 1 and args.devices is None and os.environ.get("JAX_PLATFORMS") != "cpu":
        try:
            args.devices = host.share_of_gpus(host.visible_gpus(), args.processes) or None
        except errors.ConfigError as error:
            say(f"{error} (--devices sets their number)")
            return errors.EXIT_CONFIG
    stop = Stop()
    command = [*shlex.split(args.through), sys.executable, "-m", "llmos_jax.main", *args.words]
    return supervise(command, run_directory(args.words), args, stop)


if __name__ == "__main__":
    sys.exit(main())
