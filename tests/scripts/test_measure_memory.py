import argparse
import pathlib
import runpy

import pytest

from llmos_jax import api

SCRIPT = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "scripts" / "measure_memory.py"))


@pytest.mark.parametrize("kind", ["pipeline", "context"])
def test_every_point_is_a_setting_of_its_experiment(kind):
    args = argparse.Namespace(
        schedule="circular",
        repeats=2,
        microbatches=[8, 64],
        remat="full",
        shards=[4, 128],
        form="ring",
        length=4096,
        width=512,
        vocab=512,
    )
    points = list(SCRIPT[f"of_{kind}"](args))
    assert len(points) == 2
    for experiment, topology, _, values in points:
        config = f"{SCRIPT['EXPERIMENTS'] / experiment}"
        settings, _ = api.load_settings(config, [(name, str(value)) for name, value in values.items()])
        chips = settings.mesh.pipeline * settings.mesh.data * settings.mesh.model * settings.mesh.context
        assert topology.partition(":")[2] in ("4x4x4", "2x2x1", "4x4x8") and chips in (64, 4, 128)
