"""Training with experts: the same numbers on every mesh, in microbatches and in pipeline stages, as on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.errors import ConfigError
from llmos_jax.tasks import language
from llmos_jax.train import optim, step
from tests.train.test_step import MODEL, Trainer, assert_close, make_batches

# Losses of the router that count: with the usual weights a wrong one would hide behind the tolerance.
SPARSE = dataclasses.replace(
    MODEL, execution="scan", experts=8, expert_mlp=32, shared_experts=1, router_balance=0.5, router_z_loss=0.05
)
FORMS = {"dropless": SPARSE, "capacity": dataclasses.replace(SPARSE, expert_capacity=1.0)}


def batches(count=10):
    """Packed rows, with padding at their ends, and at last rows that are padding alone."""
    made = make_batches(count)
    for number, batch in enumerate(made):
        ends = np.random.default_rng(number).integers(20, 40, (batch["tokens"].shape[0], 1))
        is_padding = np.arange(batch["tokens"].shape[1]) >= ends
        if number == count - 1:
            is_padding[12:] = True
        batch["segments"] = np.where(is_padding, 0, batch["segments"]).astype(np.int32)
        batch["weights"] = np.where(is_padding, 0, batch["weights"]).astype(np.float32)
    return made


@functools.cache
def single(form):
    """Ten steps on one device: losses, final parameters, the last step's metrics."""
    trainer = Trainer(model=FORMS[form])
    return trainer.run(batches()), trainer.params(), jax.device_get(trainer.metrics)


_PIPELINED = dict(pipeline=2, expert=2, data=2, pipeline_microbatches=2, parameters="fsdp")
_CONTEXT = dict(expert=2, context=2, model=2, parameters="fsdp")
_GPIPE = dict(pipeline=2, expert=2, model=2, pipeline_schedule="gpipe")


@pytest.mark.parametrize(
    ("form", "mesh", "choices"),
    [
        ("dropless", dict(expert=8, data=1), {}),
        pytest.param("dropless", dict(expert=4, data=2), {}, marks=pytest.mark.slow),
        ("dropless", dict(expert=2, data=2, model=2, parameters="fsdp"), dict(remat="full")),
        ("dropless", _PIPELINED, {}),
        pytest.param("capacity", dict(expert=4, data=2), {}, marks=pytest.mark.slow),
        pytest.param("capacity", dict(expert=2, data=2, model=2, parameters="fsdp"), {}, marks=pytest.mark.slow),
        ("capacity", _CONTEXT, {}),
        pytest.param("capacity", _PIPELINED, {}, marks=pytest.mark.slow),
        pytest.param("dropless", _CONTEXT, {}, marks=pytest.mark.slow),
        pytest.param("dropless", _GPIPE, dict(microbatches=2), marks=pytest.mark.slow),
        pytest.param("capacity", _GPIPE, dict(microbatches=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mesh_shapes_give_the_same_numbers(form, mesh, choices):
    choices = dict(choices)
    model = dataclasses.replace(FORMS[form], remat=choices.pop("remat", "none"))
    trainer = Trainer(model=model, mesh=MeshConfig(**mesh), **choices)
    losses, params, metrics = single(form)
    np.testing.assert_allclose(trainer.run(batches()), losses, rtol=1e-5)
    assert_close(trainer.params(), params, 1e-5)
    for name in ("balance", "z", "busiest_share", "dropped_share"):
        assert float(trainer.metrics[f"train/router_{name}"]) == pytest.approx(float(metrics[f"train/router_{name}"]), rel=1e-5)
    weight = trainer.state.params["stack"]["blocks"]["experts"]["up"]
    over = mesh.get("data", 1) * mesh.get("context", 1) if mesh.get("parameters") == "fsdp" else 1
    shards = weight.size // weight.addressable_shards[0].data.size
    assert shards == mesh["expert"] * mesh.get("model", 1) * mesh.get("pipeline", 1) * over


def test_something_is_dropped_and_something_is_learnt():
    """What the equalities above hold for is not a special case."""
    (losses, _, metrics), (_, _, dropless) = single("capacity"), single("dropless")
    assert 0.05 < float(metrics["train/router_dropped_share"]) < 0.7 and float(dropless["train/router_dropped_share"]) == 0
    assert losses[-1] < losses[0] and float(metrics["train/router_balance"]) > 1


@pytest.mark.parametrize("form", ["dropless", "capacity"])
@pytest.mark.slow
def test_accumulation_equals_the_large_batch(form):
    trainer = Trainer(model=FORMS[form])
    batch = {k: jnp.asarray(v) for k, v in batches(1)[0].items()}

    def loss_of(params, batch, key):
        total, weight, sums = language.loss(trainer.handle.merge(params), batch, key)
        return total, (weight, sums)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def accumulated(microbatches):
        run = functools.partial(
            step.accumulate, gradient, key=jax.random.key(0), microbatches=microbatches, handle=trainer.handle
        )
        return jax.jit(lambda params, batch: run(params, batch=batch))(trainer.state.params, batch)

    assert_close(accumulated(4), accumulated(1), 2e-6)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="model.experts=6 is not divisible by mesh.expert=4"):
        Trainer(model=dataclasses.replace(SPARSE, experts=6), mesh=MeshConfig(expert=4))
    with pytest.raises(ConfigError, match="model.expert_mlp=20 is not divisible by mesh.model=8"):
        Trainer(model=dataclasses.replace(SPARSE, expert_mlp=20), mesh=MeshConfig(model=8))
    rules = MeshConfig(data=4, model=2, rules={"experts": ("model",), "mlp": ()})
    with pytest.raises(ConfigError, match="lay experts over .'model',. and batch over .'data',."):
        Trainer(model=SPARSE, mesh=rules)
    rules = MeshConfig(data=8, rules={"mlp": ("data",)})
    with pytest.raises(ConfigError, match="lay mlp over .'data',.*can't be cut over an axis that cuts tokens"):
        Trainer(model=SPARSE, mesh=rules)


@pytest.mark.slow
def test_muon_orthogonalises_every_expert():
    config = optim.OptimConfig(name="muon", learning_rate=1.0, weight_decay=0.0, schedule="constant", warmup=0.0)
    trainer = Trainer(model=SPARSE, config=config)
    before = trainer.params()["stack"]["blocks"]["experts"]["up"]
    trainer.run(batches(1))
    update = trainer.params()["stack"]["blocks"]["experts"]["up"] - before
    values = np.linalg.svd(update, compute_uv=False)  # [layers, experts, 32]
    assert (values.max(-1) / values.min(-1)).max() < 4
