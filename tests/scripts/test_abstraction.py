"""The cost of abstraction: the framework's step against one written by hand, as XLA compiles them."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_framework_costs_nothing():
    done = subprocess.run(
        [sys.executable, "scripts/abstraction.py", "--shape=a"],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])["ratios"]
    assert 0.97 < ratios["flops"] < 1.03 and ratios["temporary_bytes"] < 1.03 and ratios["argument_bytes"] < 1.03
