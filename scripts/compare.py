"""Compares two runs step by step: the same losses exactly, or within a tolerance, or where they first part.

    python scripts/compare.py runs/one runs/two
    python scripts/compare.py --tolerance=1e-5 --devices=8 --common="--config=experiments/gpt.py:smoke" \\
        --left="--config.mesh.data=8" --right="--config.mesh.data=4 --config.mesh.model=2"
    python scripts/compare.py --common="--config=experiments/gpt.py:smoke" --left=@main --right=@HEAD

A side is a run directory, or the flags of a run that is then made in a folder of its own; `@COMMIT` before them runs that
commit, out of a worktree that is removed again. Exit code 0: they agree; 1: they differ; 2: they can't be compared.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
METRICS_FILE = "metrics.jsonl"
_DEVICES_FLAG = "--xla_force_host_platform_device_count"


class NotComparable(Exception):
    """Two sides that can't be held against each other; the message says why."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two curves have in common.

    steps: compared. first: (step, left, right) of the first step that differs by more than the tolerance, or None. worst:
    (step, relative difference) of the largest. missing: steps that only one side has.
    """

    steps: int
    first: tuple[int, float, float] | None
    worst: tuple[int, float]
    missing: tuple[int, ...]

    @property
    def is_equal(self):
        """Whether both sides have the same steps, and no step differs by more than the tolerance."""
        return self.first is None and not self.missing


def read_curve(directory, metric):
    """Returns {step: value} of a metric in a run directory."""
    from llmos_jax.train.metrics import read_metrics

    file = pathlib.Path(directory) / METRICS_FILE
    if not file.is_file():
        raise NotComparable(f"{directory} is no run directory: it has no {METRICS_FILE}.")
    entries = read_metrics(file)
    curve = {entry["step"]: entry[metric] for entry in entries if metric in entry}
    if not curve:
        known = sorted({name for entry in entries for name in entry} - {"step"})
        raise NotComparable(f"{file} has no {metric!r}; it has {', '.join(known)}.")
    return curve


def difference(left, right):
    """Returns the difference relative to the larger one; 0 for equal values, NaN and NaN among them."""
    if left == right or (math.isnan(left) and math.isnan(right)):
        return 0.0
    found = abs(left - right) / max(abs(left), abs(right))
    return found if math.isfinite(found) else math.inf


def compare(left, right, tolerance=0.0):
    """Returns the Comparison of two curves {step: value}; with tolerance 0 values must be equal to the last bit."""
    common = sorted(set(left) & set(right))
    differences = {step: difference(left[step], right[step]) for step in common}
    first = next((step for step in common if differences[step] > tolerance), None)
    worst = max(common, key=differences.get, default=None)
    return Comparison(
        steps=len(common),
        first=None if first is None else (first, left[first], right[first]),
        worst=(worst, differences.get(worst, 0.0)),
        missing=tuple(sorted(set(left) ^ set(right))),
    )


def describe(found, names, metric, tolerance):
    """Returns the comparison as text for people."""
    within = f"within {tolerance:g}" if tolerance else "to the last bit"
    lines = [f"{metric}: {found.steps} steps in common of {names[0]} and {names[1]}"]
    if found.missing:
        shown = ", ".join(map(str, found.missing[:8])) + (", ..." if len(found.missing) > 8 else "")
        lines.append(f"{len(found.missing)} steps are in one alone: {shown}")
    if found.first is not None:
        step, left, right = found.first
        lines.append(f"step {step} is the first to differ: {left!r} and {right!r} ({difference(left, right):.3g} relative)")
    if found.steps:
        lines.append(f"largest relative difference {found.worst[1]:.3g}, at step {found.worst[0]}")
    lines.append(f"equal {within}" if found.is_equal else f"NOT equal {within}")
    return "\n".join(lines)


def make_run(side, common, folder, name, devices):
    """Returns the run directory of a side, running it first if it is given by its flags."""
    words = shlex.split(side)
    if len(words) == 1 and (pathlib.Path(side) / METRICS_FILE).is_file():
        return pathlib.Path(side)
    commit = words.pop(0)[1:] if words and words[0].startswith("@") else None
    if any(not word.startswith("--") for word in words) or not common + words:
        raise NotComparable(f"{side!r} is neither a run directory nor flags (nor @COMMIT and flags).")
    source = ROOT
    if commit is not None:
        source = folder / f"{name}-source"
        _call(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(source), commit], ROOT, os.environ)
    try:
        environment = os.environ | {"PYTHONPATH": str(source)}
        if devices:
            others = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES_FLAG)]
            environment["XLA_FLAGS"] = " ".join([*others, f"{_DEVICES_FLAG}={devices}"])
        directory = folder / name
        command = [sys.executable, "-m", "llmos_jax.main", "train", *common, *words, f"--workdir={directory}"]
        _call(command, source, environment)
        return directory
    finally:
        if commit is not None:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(source)], check=False)


def _call(command, where, environment):
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotComparable(f"{shlex.join(command)} ended with exit code {done.returncode}: {last}")


def make_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="two run directories")
    parser.add_argument("--left", default="", help="run directory, or flags of a run, or @COMMIT and flags")
    parser.add_argument("--right", default="", help="the same")
    parser.add_argument("--common", default="", help="flags of both runs")
    parser.add_argument("--metric", default="train/loss")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that is allowed; 0: none")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of the runs; 0: as the machine is")
    return parser


def main(argv=None):
    """Parses the command line, makes what runs are missing, compares; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    sides = args.runs or [args.left, args.right]
    if len(sides) != 2:
        parser.error(f"two runs are compared, not {len(sides)}.")
    with tempfile.TemporaryDirectory(prefix="llmos-compare-") as folder:
        try:
            runs = [
                make_run(side, shlex.split(args.common), pathlib.Path(folder), name, args.devices)
                for side, name in zip(sides, ("left", "right"), strict=True)
            ]
            found = compare(*(read_curve(run, args.metric) for run in runs), args.tolerance)
        except NotComparable as error:
            print(error, file=sys.stderr)
            return 2
    print(describe(found, sides, args.metric, args.tolerance))
    return 0 if found.is_equal and found.steps else 1


if __name__ == "__main__":
    sys.exit(main())
