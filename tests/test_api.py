"""What the public functions set up before JAX starts."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import sys, time
import llmos_jax
from llmos_jax import api
settings, _ = llmos_jax.load_settings("experiments/gpt.py:smoke")
if sys.argv[1] == "prepared":
    api.prepare_platform(settings.train)
import jax, jax.numpy as jnp
work = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda i, y: y @ x * 1e-3, x))
x = jnp.ones((768, 768))
work(x).block_until_ready()
start = time.perf_counter()
result = work(x)
dispatched = time.perf_counter() - start
result.block_until_ready()
print(dispatched / (time.perf_counter() - start))
"""


@pytest.mark.parametrize(("mode", "is_waited_for"), [("prepared", True), ("plain", False)])
def test_cpu_steps_run_on_the_calling_thread(mode, is_waited_for):
    """A share of one call's own time: the kept heap is that of the thread that runs the step."""
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    assert (float(done.stdout) > 0.5) == is_waited_for
