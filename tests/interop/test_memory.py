"""What importing takes of the host's memory, and of each device's."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "size_gb"), [(1, 2.0), (8, 2.0)])
def test_import_is_bounded_by_the_largest_tensor(devices, size_gb):
    command = [sys.executable, "scripts/measure_import.py", f"--devices={devices}", f"--size_gb={size_gb}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["file_bytes"] > 0.95e9 * size_gb
    assert found["beside_bytes"] < 2 * found["largest_tensor_bytes"] + 10**9
    assert found["device_bytes"] == found["shard_bytes"]
    assert found["device_bytes"] < 1.01 * found["file_bytes"] / devices
