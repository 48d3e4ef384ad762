"""Pipeline schedules: the same numbers as one device, the bubble that is predicted, refusals that say why."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from llmos_jax.compute import memory, pipeline, planner
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError
from llmos_jax.models import gpt, llama
from llmos_jax.train import optim, state
from tests.train.test_step import MODEL, Trainer, assert_close, make_batches

ROTATED = llama.Config(vocab_size=128, context=32, width=64, layers=4, heads=8, mlp=128, execution="scan")
# Scanned, so that a stage's program is compiled once and not once a layer.
DEEP = dataclasses.replace(MODEL, layers=4, execution="scan")


@pytest.fixture(scope="module")
def single():
    """Ten steps on one device, the last batch with rows that are padding alone: losses and final parameters."""
    trainer = Trainer(model=DEEP)
    return trainer.run(batches()), trainer.params()


def batches():
    made = make_batches(10)
    made[-1]["weights"][5:] = 0
    return made


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        (dict(pipeline=4), {}),  # on four devices
        pytest.param(dict(pipeline=4, data=2), {}, marks=pytest.mark.slow),
        pytest.param(dict(pipeline=2, data=4, pipeline_microbatches=1), {}, marks=pytest.mark.slow),
        (dict(pipeline=2, data=2, model=2, pipeline_microbatches=8, parameters="fsdp"), {}),
        (dict(pipeline=2, data=2, model=2, pipeline_repeats=2, pipeline_microbatches=4), dict(remat="full")),
        (dict(pipeline=2, replica=2, data=2, pipeline_microbatches=2, parameters="zero1"), dict(microbatches=2)),
        (dict(pipeline=2, context=2, model=2, pipeline_microbatches=4), {}),
        pytest.param(dict(pipeline=4, data=2, pipeline_schedule="gpipe"), {}, marks=pytest.mark.slow),
        (dict(pipeline=2, data=2, model=2, pipeline_schedule="gpipe", parameters="fsdp"), dict(remat="full", microbatches=2)),
        (dict(pipeline=2, data=4, pipeline_schedule="circular", pipeline_repeats=2), {}),
        pytest.param(dict(pipeline=2, data=1, context=2, model=2, pipeline_microbatches=4), {}, marks=pytest.mark.slow),
        pytest.param(
            dict(pipeline=2, data=2, context=2, pipeline_schedule="gpipe", context_attention="all_gather"),
            dict(remat="full"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_schedule_gives_the_numbers_of_one_device(mesh, choices, single):
    choices = dict(choices)
    model = dataclasses.replace(DEEP, remat=choices.pop("remat", "none"))
    mesh = MeshConfig(**{"data": 1} | mesh)
    devices = jax.devices()[: mesh.pipeline * mesh.replica * mesh.data * mesh.context * mesh.model]
    trainer = Trainer(model=model, mesh=mesh, devices=devices, **choices)
    losses, params = single
    np.testing.assert_allclose(trainer.run(batches()), losses, rtol=1e-5)
    assert_close(trainer.params(), params, 1e-5)
    weight = trainer.state.params["stack"]["blocks"]["up"]["weight"]
    assert {shard.data.shape[0] for shard in weight.addressable_shards} == {DEEP.layers // mesh.pipeline}


def test_positions_of_a_microbatch_go_with_it():
    """A Llama's blocks are given rotations by position, which 1F1B computes anew for what each stage works on."""
    single = Trainer(model=ROTATED, family=llama)
    piped = Trainer(model=ROTATED, family=llama, mesh=MeshConfig(pipeline=2, data=4, pipeline_microbatches=4))
    batches = make_batches(2)
    for batch in batches:
        batch["positions"] = np.random.default_rng(0).integers(0, 32, batch["positions"].shape, np.int32)
    np.testing.assert_allclose(piped.run(batches), single.run(batches), rtol=1e-5)


@pytest.mark.slow
def test_dropout_is_that_of_accumulation():
    """1F1B gives microbatch m the key that accumulation on one device gives it."""
    model = dataclasses.replace(DEEP, dropout=0.2)
    single = Trainer(model=model, microbatches=4).run(make_batches(2))
    piped = Trainer(model=model, mesh=MeshConfig(pipeline=2, data=4, pipeline_microbatches=4)).run(make_batches(2))
    np.testing.assert_allclose(piped, single, rtol=1e-5)


@pytest.mark.parametrize(("stages", "repeats", "microbatches"), [(2, 1, 2), (4, 1, 6), (4, 1, 3), (2, 3, 4), (4, 2, 8)])
def test_every_block_sees_every_microbatch_once_in_order(stages, repeats, microbatches):
    """The clock of both directions, tick by tick, and the bubble that it leaves."""
    plan = pipeline.Plan("1f1b", stages, repeats, microbatches)
    depth, forward, backward = stages * repeats, {}, {}
    for tick in range(plan.ticks + depth):
        for stage in range(stages):
            chunk, microbatch, is_real = pipeline._clock(plan, tick - stage)
            if is_real:
                forward[int(microbatch), int(chunk) * stages + stage] = tick
            chunk, microbatch, is_real = pipeline._clock(plan, tick - (depth - 1) - (stages - 1 - stage), is_backward=True)
            if is_real:
                backward[int(microbatch), int(chunk) * stages + stage] = tick
    everything = {(m, block) for m in range(microbatches) for block in range(depth)}
    assert set(forward) == set(backward) == everything
    for m, block in everything:
        if block:
            assert forward[m, block] == forward[m, block - 1] + 1  # what rolls on is used in the very next tick
            assert backward[m, block - 1] == backward[m, block] + 1
        assert backward[m, block] - forward[m, block] < 2 * depth - 1  # the ring still holds the block's input
    assert all(backward[m, depth - 1] == forward[m, depth - 1] for m in range(microbatches))
    idle = 1 - len(forward) / (stages * (max(forward.values()) + 1))
    assert idle == pytest.approx(plan.bubble)


@pytest.mark.slow
def test_what_rematerialisation_repeats_in_a_pipeline():
    """Policies mean what they mean without stages; full keeps the inputs of a tick alone, 1F1B those of a stage in any case."""

    def products(remat, schedule):
        model = dataclasses.replace(DEEP, remat=remat)
        trainer = Trainer(model=model, mesh=MeshConfig(data=4, pipeline=2, pipeline_schedule=schedule))
        traced = trainer.trace(trainer.place(make_batches(1)[0]))
        return planner.matmul_flops(traced.jaxpr.jaxpr)

    kept = products("none", "gpipe")
    assert products("matmuls", "gpipe") == kept
    assert products("full", "gpipe") > 1.2 * kept
    assert products("matmuls", "1f1b") == products("none", "1f1b")


def traced_step(model, mesh, rows):
    """Returns (trace of a step of Llama on `rows` rows of shapes alone, its Plan)."""
    trainer = Trainer(model=model, mesh=mesh, family=llama, devices=jax.devices()[: mesh.pipeline * mesh.data])
    where = trainer.placement.sharding("batch", "length")
    batch = {
        name: jax.ShapeDtypeStruct((rows, DEEP.context), value.dtype, sharding=where)
        for name, value in make_batches(1)[0].items()
        if value.ndim == 2
    }
    return trainer.trace(batch), trainer.placement.pipeline


@pytest.mark.parametrize(
    ("schedule", "repeats", "ticks"),
    [("1f1b", 1, [1, 4, 1]), ("1f1b", 2, [3, 6, 3]), ("gpipe", 1, [5, 5]), ("circular", 2, [9, 9])],
)
def test_a_stage_waits_as_long_as_predicted(schedule, repeats, ticks):
    """Loops of the traced program, for 4 microbatches in 2 stages; 1F1B: forward alone, both, backward alone."""
    mesh = MeshConfig(data=4, pipeline=2, pipeline_schedule=schedule, pipeline_microbatches=4, pipeline_repeats=repeats)
    traced, plan = traced_step(ROTATED, mesh, 64)
    lengths = [eqn.params["length"] for eqn in traced.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    found = [length for length in lengths if schedule == "1f1b" or length == ticks[0]]
    assert found == ticks
    forward = sum(found[:2]) if schedule == "1f1b" else found[0]
    assert plan.bubble == pytest.approx(1 - 4 * repeats / forward)


@pytest.mark.parametrize(
    ("schedule", "repeats"),
    [
        ("1f1b", 1),
        ("1f1b", 2),
        pytest.param("gpipe", 1, marks=pytest.mark.slow),
        pytest.param("circular", 2, marks=pytest.mark.slow),
    ],
)
def test_memory_of_the_program(schedule, repeats):
    """What the compiler plans for few and many microbatches of one size."""
    model, temporaries = dataclasses.replace(ROTATED, remat="full"), {}
    for microbatches in (4, 16):
        counts = dict(pipeline_microbatches=microbatches, pipeline_repeats=repeats)
        mesh = MeshConfig(data=1, pipeline=2, pipeline_schedule=schedule, **counts)
        traced, _ = traced_step(model, mesh, 4 * microbatches)
        temporaries[microbatches] = memory.compiled_bytes(traced.lower().compile())["temporaries"]
    grown = temporaries[16] / temporaries[4]
    assert grown < 1.05 if schedule == "1f1b" else grown > 1.5


def test_few_microbatches_are_allowed_and_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        plan = pipeline.make_plan("1f1b", 4, 1, 2)
    assert plan.bubble == pytest.approx(3 / 5) and "a stage waits 60 % of the time" in caplog.text


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(pipeline=8), "model.layers=4 is not divisible by mesh.pipeline=8 .*can be one of .1, 2, 4"),
        (dict(pipeline=2, pipeline_repeats=4, pipeline_microbatches=4), "layers=4 is not divisible by .*repeats=4"),
        (dict(pipeline=2, pipeline_repeats=2, pipeline_microbatches=3), "microbatches=3 is not divisible by mesh.pipeline=2"),
        (dict(pipeline=2, pipeline_schedule="gpipe", pipeline_repeats=2), "gpipe has one block per stage"),
        (dict(pipeline=2, pipeline_schedule="circular"), "circular at least two"),
        (dict(pipeline=1, pipeline_microbatches=8), "pipeline_microbatches has no effect without stages"),
    ],
    ids=str,
)
def test_what_can_not_be_piped_is_refused(mesh, words):
    with pytest.raises(ConfigError, match=words):
        Trainer(model=DEEP, mesh=MeshConfig(**mesh))


def test_factored_moments_are_refused_where_layers_are_reordered():
    wide = dataclasses.replace(DEEP, width=256, mlp=256)  # adafactor factors dimensions from 128 on
    with pytest.raises(ConfigError, match="pipeline_repeats above 1 needs an optimizer"):
        Trainer(model=wide, mesh=MeshConfig(pipeline=2, pipeline_repeats=2), config=optim.OptimConfig(name="adafactor"))


def test_layers_are_initialised_and_saved_in_natural_order():
    def parameters(mesh):
        placement = make_placement(mesh)
        handle = state.describe_model(lambda rngs: gpt.build(DEEP, placement, rngs=rngs), placement)
        return handle, jax.jit(handle.init, out_shardings=handle.shardings)(jax.random.key(0))

    _, plain = parameters(MeshConfig())
    handle, stored = parameters(MeshConfig(pipeline=2, pipeline_repeats=2))
    weight = ("stack", "blocks", "up", "weight")
    assert handle.stack[1].order == (0, 2, 1, 3)
    canonical = state.in_canonical_order(stored, handle)
    jax.tree.map(np.testing.assert_array_equal, canonical, plain)
    jax.tree.map(np.testing.assert_array_equal, state.in_stored_order(canonical, handle), stored)
    for name in weight:
        plain, stored = plain[name], stored[name]
    assert not np.array_equal(plain, stored)
