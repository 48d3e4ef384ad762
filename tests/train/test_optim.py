"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.train.optim import OptimConfig, schedule


def rates(progress, **choices):
    config = OptimConfig(learning_rate=1.0, final_share=0.1, **choices)
    return [float(schedule(config, p)) for p in progress]


def test_warmup_is_linear():
    np.testing.assert_allclose(rates([0.0, 0.05, 0.1], warmup=0.1, schedule="constant"), [0, 0.5, 1], atol=1e-6)


def test_cosine():
    points = [0.1, 0.325, 0.55, 1.0, 2.0]
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, (p - 0.1) / 0.9))) for p in points]
    np.testing.assert_allclose(rates(points, warmup=0.1), expected, rtol=1e-5)


def test_linear():
    np.testing.assert_allclose(rates([0, 0.5, 1], warmup=0.0, schedule="linear"), [1, 0.55, 0.1], rtol=1e-5)


def test_wsd_is_flat_then_falls():
    values = rates([0.1, 0.5, 0.8, 0.9, 1.0], warmup=0.1, decay=0.2, schedule="wsd")
    np.testing.assert_allclose(values, [1, 1, 1, 0.55, 0.1], rtol=1e-5)


def test_wsd_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="exceed"):
        OptimConfig(schedule="wsd", warmup=0.6, decay=0.5)


@pytest.mark.parametrize(("name", "choices"), [("adafactor", dict(beta2=0.99)), ("lion", dict(epsilon=1e-6))])
def test_settings_without_effect_are_refused(name, choices):
    with pytest.raises(ConfigError, match=f"has no effect with optim.name={name}"):
        OptimConfig(name=name, **choices)
