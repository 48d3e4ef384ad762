"""Damaged files of a checkpoint: one line that names the leaf, and nothing else is said. Row C2 of the fault matrix."""

import asyncio
import gc
import logging
import re
import subprocess
import sys

import pytest

from llmos_jax.train import damage

# The largest file of step 2, in each way: reads of many leaves are under way when the first fails.
SCRIPT = """
import pathlib, random, shutil, sys
import jax.numpy as jnp
from llmos_jax.train import checkpoint as lib

root = pathlib.Path(sys.argv[1])
values = jnp.arange(4096.0)
tree = {"params": {f"layer{number}": {"w": values * number + 1 / 3} for number in range(100)}}
checkpointer = lib.Checkpointer(root / "good", lib.CheckpointConfig(is_async=False))
for step in (1, 2):
    checkpointer.save(step, tree, {})
checkpointer.close()
for damage in ("deleted", "halved", "zeroed", "garbage"):
    shutil.copytree(root / "good", root / damage)
    files = [file for file in (root / damage / "2" / "params").rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.unlink()
    if damage == "halved":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif damage == "garbage":
        file.write_bytes(random.Random(1).randbytes(len(content)))
    for _ in range(3):  # the noise varies
        lib.verify_checkpoints(root / damage)
    print(*(f"{damage} {row.step} {row.is_good} {row.message}" for row in lib.verify_checkpoints(root / damage)), sep="\\n")
"""


def test_damage_is_one_line_that_names_the_leaf(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], timeout=120, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [damage, step, good]
        for damage in ("deleted", "halved", "zeroed", "garbage")
        for step, good in (("1", "True"), ("2", "False"))
    ]
    for line in lines[1::2]:
        assert re.search(r"False leaf params/layer\d+/w can't be read \([A-Z_]+: .{5,}\)$", line) and len(line) < 300, line


@pytest.fixture
def hooked(monkeypatch):
    """What reaches the hook that was there before the filter."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    damage.hush_leftovers()
    damage.hush_leftovers()
    return seen


def test_other_errors_that_nobody_waits_for_are_said_as_before(hooked, caplog):
    class Dropped:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    async def fail():
        raise ValueError("of a user's task")

    async def forget():
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task

    Dropped()
    asyncio.run(forget())
    gc.collect()
    assert hooked == ["Event loop is closed"]
    assert "exception was never retrieved" in caplog.text and "of a user's task" in caplog.text


def test_leftovers_of_a_read_are_not_said(hooked, caplog):
    code = compile(
        "async def read():\n  raise ValueError('x')", damage.os.sep.join(["", "orbax", "checkpoint", "a.py"]), "exec"
    )
    names = {}
    exec(code, names)

    async def forget():
        tasks = [asyncio.ensure_future(names["read"]()), asyncio.get_running_loop().create_future()]
        tasks[1].set_exception(ValueError('NOT_FOUND: Error reading "w/.zarray" in OCDBT database at local file "/x/"'))
        await asyncio.sleep(0)

    asyncio.run(forget())
    gc.collect()
    assert not hooked and not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'NOT_FOUND: Error opening "zarr" driver: Error reading "params.a.b/0.0" in OCDBT database at local file "/": gone '
            "[tensorstore_spec='{}']",
            "leaf params/a/b can't be read (NOT_FOUND: gone)",
        ),
        ("something else", "its arrays can't be read: ValueError: something else"),
        ("", "its arrays can't be read: ValueError: no message"),
    ],
)
def test_what_is_said_of_a_failed_read(text, line):
    assert damage.describe(ValueError(text), {"params/a": None, "params/a/b": None}) == line
