"""What the tests of many processes share: the launcher, the smallest model, and a look into a run directory."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

# Small enough that starting is nearly all that takes time.
TINY = {
    "model.layers": 1,
    "optim.name": "adamw",
    "train.log_every_steps": 2,
    "train.evaluate_every_steps": "none",
    "task.evaluation_batches": 1,
    "task.sample_tokens": 1,
    "distributed.heartbeat_seconds": 10,
    "watchdog.floor_seconds": 120,
}


@dataclasses.dataclass(frozen=True)
class Launched:
    """How a launch ended: exit code, what it said, and (process, code, seconds after the first) of every process."""

    code: int
    text: str

    @property
    def ends(self):
        found = re.findall(r"launch: process (\d+) ended with (-?\d+), ([\d.]+) s after the first", self.text)
        return [(int(number), int(code), float(seconds)) for number, code, seconds in found]

    @property
    def restarts(self):
        return self.text.count("launch: starting again")


def launch_command(directory, *, processes, devices=1, options=(), **overrides):
    """The command line of a launch; an override `a__b=1` is the setting a.b."""
    chosen = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
    return [
        sys.executable,
        "scripts/launch.py",
        f"--processes={processes}",
        f"--devices={devices}",
        *options,
        "--",
        "--config=experiments/gpt.py:smoke",
        f"--workdir={directory}",
        *[f"--config.{name}={value}" for name, value in chosen.items()],
    ]


def launch(directory, *, fault="", timeout=480, **choices):
    """Runs a gang to its end. After `timeout` seconds its processes dump their stacks into the run directory's logs."""
    environment = os.environ | {"LLMOS_FAULT": fault}
    process = subprocess.Popen(launch_command(directory, **choices), stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _, text = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        logs = "".join(file.read_text() for file in pathlib.Path(directory).glob("log*.txt"))
        raise AssertionError(f"no end after {timeout} s: {process.communicate(timeout=60)[1]}\n{logs}") from None
    assert "Traceback" not in text, text
    return Launched(process.returncode, text)


def losses(directory):
    """Returns {step: loss} as they were written, in the order of the lines."""
    entries = map(json.loads, (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
