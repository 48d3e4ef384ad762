"""The tree passes the linter and the formatter."""

import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    ruff = shutil.which("ruff", path=sys.prefix + "/bin")
    done = subprocess.run([ruff, *command, "."], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
