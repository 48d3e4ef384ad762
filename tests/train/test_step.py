"""The compiled step: accumulation, guard, meshes and averaging, each against its plain meaning."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError, TrainingDiverged
from llmos_jax.models import gpt
from llmos_jax.tasks import base, language
from llmos_jax.train import guard, optim, state, step

MODEL = gpt.Config(vocab_size=128, context=32, width=64, layers=2, heads=8, mlp=128)
ROWS, LENGTH = 16, 32


class Trainer:
    """The smallest use of the step's parts."""

    def __init__(self, *, model=MODEL, config=None, mesh=None, microbatches=1, steps=20, family=gpt, devices=None):
        # A large epsilon: some gradients are zero but for rounding (biases of keys), and Adam would blow those up.
        self.config = config or optim.OptimConfig(learning_rate=1e-2, epsilon=1e-3)
        self.placement = make_placement(mesh or MeshConfig(), devices or (None if mesh else jax.devices()[:1]))
        self.handle = state.describe_model(functools.partial(family.build, model, self.placement), self.placement)
        optimizer = optim.make_optimizer(self.config, self.handle.infos)
        with_ema = self.config.ema is not None
        self._describe = functools.partial(state.abstract_state, self.handle, optimizer, self.placement, with_ema=with_ema)
        self._init = functools.partial(state.init_state, self.handle, optimizer, self.placement, 0, with_ema=with_ema)
        function = step.make_step(
            language.loss, self.handle, optimizer, self.config, seed=0, steps=steps, microbatches=microbatches
        )
        where = state.state_shardings(self.handle, optimizer, self.placement, with_ema=with_ema)
        self.step = jax.jit(function, donate_argnums=0, out_shardings=(where, self.placement.sharding()))

    @functools.cached_property
    def state(self):
        return self._init()

    def trace(self, batch):
        """Traces a step, by the shapes of the state alone."""
        return self.step.trace(self._describe(), batch, jnp.float32(0))

    def run(self, batches):
        losses = []
        for batch in batches:
            self.state, self.metrics = self.step(self.state, self.place(batch), jnp.float32(0))
            losses.append(float(self.metrics["train/loss"]))
        return losses

    def place(self, batch):
        def axes(x):
            return ("batch", "length")[: x.ndim]

        fields = {name: base.Field(x.dtype, x.shape[1:], axes(x)) for name, x in batch.items()}
        task = types.SimpleNamespace(fields=fields, batch_size=ROWS)
        rows = lambda index, start, stop: {name: x[start:stop] for name, x in batch.items()}  # noqa: E731
        return base.make_batch(task, self.placement, rows, 0)

    def params(self):
        return jax.tree.map(np.asarray, state.in_canonical_order(self.state.params, self.handle))


def make_batches(count, *, seed=0):
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        tokens = rng.integers(0, 128, (ROWS, LENGTH + 1)).astype(np.int32)
        segments = 1 + (np.arange(LENGTH) > rng.integers(5, 25, (ROWS, 1))).astype(np.int32)
        weights = (rng.random((ROWS, LENGTH)) < 0.9).astype(np.float32)
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
        batches.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segments": segments,
                "positions": positions,
                "weights": weights,
                "target_bytes": np.full((ROWS,), LENGTH, np.int32),
            }
        )
    return batches


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance):
    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

    jax.tree.map(close, a, b)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_equals_the_large_batch(microbatches):
    # Compared through sgd-like gradients: Adam's division would magnify rounding in near-zero gradients.
    whole, pieces = Trainer(), Trainer()
    batch = {k: jnp.asarray(v) for k, v in make_batches(1)[0].items()}

    def loss_of(params, batch, key):
        total, weight, sums = language.loss(whole.handle.merge(params), batch, key)
        return total, (weight, sums)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    key = jax.random.key(0)
    large = jax.jit(lambda p, b: step.accumulate(gradient, p, b, key, 1, whole.handle))(whole.state.params, batch)
    small = jax.jit(lambda p, b: step.accumulate(gradient, p, b, key, microbatches, whole.handle))(pieces.state.params, batch)

    def close(x, y):  # in norm: one element of 100,000 may round to as much, whichever way it is summed
        assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)

    jax.tree.map(close, small, large)
    assert_close(small, large, 2e-6)


def test_accumulated_training_follows_the_large_batch(single):
    losses, _ = single
    np.testing.assert_allclose(Trainer(microbatches=4).run(make_batches(10)), losses, rtol=1e-6)


@pytest.fixture(scope="module")
def single():
    """Ten steps on one device: losses and final parameters."""
    trainer = Trainer()
    return trainer.run(make_batches(10)), trainer.params()


@pytest.mark.parametrize(
    "mesh",
    [
        dict(data=8),
        dict(data=1, model=8),
        pytest.param(dict(data=1, replica=8), marks=pytest.mark.slow),
        dict(data=1, context=8),
        dict(data=4, model=2),
        pytest.param(dict(data=8, parameters="fsdp"), marks=pytest.mark.slow),
        dict(data=4, model=2, parameters="fsdp"),
        dict(data=4, model=2, parameters="zero1"),
        dict(data=2, model=4, is_sequence_sharded=False),
        dict(replica=2, data=2, model=2, parameters="fsdp"),
        pytest.param(dict(data=2, context=4), marks=pytest.mark.slow),
        dict(data=2, context=2, model=2, parameters="fsdp"),
        dict(data=2, context=4, parameters="zero1", context_attention="all_gather"),
        dict(data=2, context=2, model=2, parameters="fsdp", context_attention="all_gather"),
    ],
    ids=str,
)
def test_mesh_shapes_give_the_same_numbers(mesh, single):
    sharded = Trainer(mesh=MeshConfig(**mesh))
    losses, params = single
    np.testing.assert_allclose(sharded.run(make_batches(10)), losses, rtol=1e-5)
    assert_close(sharded.params(), params, 1e-5)

    def shards(leaf):
        return leaf.size // leaf.addressable_shards[0].data.size

    over_data, form = mesh["data"] * mesh.get("context", 1), mesh.get("parameters", "replicated")
    assert shards(sharded.state.params["stack"]["blocks"]["up"]["weight"]) == mesh.get("model", 1) * (
        over_data if form == "fsdp" else 1
    )
    moments = jax.tree_util.tree_leaves_with_path(sharded.state.optimizer)
    named = [leaf for path, leaf in moments if state.leaf_name(path).endswith("mu/stack/blocks/up/weight")]
    assert [shards(leaf) for leaf in named] == [mesh.get("model", 1) * (1 if form == "replicated" else over_data)]


def test_residuals_are_sharded_by_position_between_blocks():
    """Only with sequence sharding are positions gathered (before the products) that norms and residuals hold apart."""
    gathers = {}
    for is_sharded in (True, False):
        trainer = Trainer(mesh=MeshConfig(data=2, model=4, is_sequence_sharded=is_sharded))
        batch = trainer.place(make_batches(1)[0])
        text = trainer.trace(batch).lower().compile().as_text()
        gathers[is_sharded] = text.count(" all-gather(")
    assert gathers[True] > 0 and gathers[False] == 0


@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_no_device_holds_what_is_as_long_as_a_row(form):
    """Length and parameters are cut over the context axis: only gathered keys and values have length x width elements."""
    length = 256
    model = dataclasses.replace(MODEL, context=length, remat="full")
    placement = make_placement(MeshConfig(data=1, context=8, parameters="fsdp", context_attention=form))
    handle = state.describe_model(functools.partial(gpt.build, model, placement), placement)
    batch = {
        name: jax.ShapeDtypeStruct((1, length), dtype, sharding=placement.sharding("batch", "length"))
        for name, dtype in (("tokens", int), ("targets", int), ("segments", int), ("positions", int), ("weights", np.float32))
    }
    gradient = jax.grad(lambda params, batch: language.loss(handle.merge(params), batch, None)[0])
    program = jax.jit(gradient, out_shardings=handle.shardings).lower(handle.abstract, batch).compile().as_text()
    shapes = {tuple(int(n) for n in shape.split(",")) for shape in re.findall(r"f32\[(\d[\d,]*)\]", program)}
    longest = max(np.prod(shape) for shape in shapes)
    assert (longest >= length * model.width) == (form == "all_gather")


def test_gradients_are_reduced_in_the_dtype_asked_for(single):
    """Training with bfloat16 gradients follows that in float32 closely, not exactly."""
    config = optim.OptimConfig(learning_rate=1e-2, epsilon=1e-3, gradient_dtype="bfloat16")
    losses, _ = single
    trainer = Trainer(config=config, mesh=MeshConfig(data=8))
    rounded = trainer.run(make_batches(10))
    np.testing.assert_allclose(rounded, losses, rtol=1e-2)
    assert rounded != losses
    assert trainer.state.params["embedding"].dtype == jnp.float32
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(config=dataclasses.replace(config, gradient_dtype=dtype), mesh=MeshConfig(data=8))
        traced = trainer.trace(trainer.place(make_batches(1)[0]))
        shape = trainer.handle.shapes["stack"]["blocks"]["up"]["weight"].shape
        laid = [eqn.invars[0].aval for eqn in traced.jaxpr.jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
        # The constraint is where the gradient is summed over devices.
        assert [x.dtype.name for x in laid if x.shape == shape] == [dtype]


def test_experts_have_an_axis_only_where_there_are_experts():
    with pytest.raises(ConfigError, match="mesh.expert=2, and the model has no experts"):
        Trainer(mesh=MeshConfig(expert=2, data=4))


@pytest.mark.parametrize("choices", [dict(execution="scan"), dict(remat="full"), dict(remat="matmuls")], ids=str)
def test_scan_and_remat_are_the_same(choices, single):
    losses, _ = single
    trainer = Trainer(model=dataclasses.replace(MODEL, **choices))
    np.testing.assert_allclose(trainer.run(make_batches(10)[:3]), losses[:3], rtol=1e-6)


def poison(batch, value):
    """A batch whose loss weight makes loss and gradients NaN, infinite or huge."""
    return batch | {"weights": batch["weights"] * np.float32(value)}


def test_bad_batches_leave_no_trace():
    """Row N1: NaN and infinite batches are skipped, bitwise as if never seen."""
    batches = make_batches(8)
    spoiled = list(batches)
    spoiled.insert(3, poison(batches[0], np.nan))
    spoiled.insert(6, poison(batches[1], np.inf))
    config = optim.OptimConfig(learning_rate=1e-2, ema=0.9)
    clean, guarded = Trainer(config=config), Trainer(config=config)
    clean.run(batches)
    guarded.run(spoiled)
    assert_equal(guarded.params(), clean.params())
    assert_equal(guarded.state.ema, clean.state.ema)
    assert_equal(jax.tree.leaves(guarded.state.optimizer), jax.tree.leaves(clean.state.optimizer))
    assert int(guarded.state.step) == 8 and int(guarded.state.guard["skipped"]) == 2
    assert int(guarded.state.guard["bad_batch"]) == 6 and int(guarded.state.guard["seen"]) == 10


def test_spikes_are_skipped_once_the_mean_is_trusted():
    """Row N1: a gradient 1e4 times its running mean. The loss is scaled inside, so that weights don't divide it away."""
    config = optim.OptimConfig(learning_rate=1e-3, spike_warmup_steps=4, spike_factor=10.0)
    norms = [1.0, 1.2, 0.9, 1.1, 1.0, 1e4, 1.0]
    values, applied, verdicts = guard.initial_guard(), 0, []
    for norm in norms:
        is_good, _, values = guard.judge(config, values, applied, jnp.float32(1), [jnp.float32(norm**2)])
        applied += int(is_good)
        verdicts.append(bool(is_good))
    assert verdicts == [True] * 5 + [False, True]
    assert 0.9 < float(values["norm_mean"]) < 1.2


def test_spiking_batches_leave_no_trace():
    """Row N1 through the compiled step: one token's gradient is some twenty times that of a batch, and finite."""
    batches = make_batches(8)
    one_token = np.zeros((ROWS, LENGTH), np.float32)
    one_token[0, 0] = 1
    spoiled = list(batches)
    spoiled.insert(5, batches[0] | {"weights": one_token})
    config = optim.OptimConfig(learning_rate=1e-2, ema=0.9, spike_warmup_steps=4, spike_factor=5.0)
    clean, guarded = Trainer(config=config), Trainer(config=config)
    clean.run(batches)
    losses = guarded.run(spoiled)
    assert np.isfinite(losses).all()
    for name in ("params", "optimizer", "ema", "step"):
        assert_equal(jax.tree.leaves(getattr(guarded.state, name)), jax.tree.leaves(getattr(clean.state, name)))
    assert float(guarded.state.guard["norm_mean"]) == float(clean.state.guard["norm_mean"])
    told = {name: int(guarded.state.guard[name]) for name in ("skipped", "bad_batch", "bad_leaf", "seen")}
    assert told == {"skipped": 1, "bad_batch": 5, "bad_leaf": -1, "seen": 9}


def test_all_bad_batches_stop_with_the_first_bad_leaf():
    """Row N2: the host check names the batch and the leaf."""
    config = optim.OptimConfig(max_skipped=3)
    trainer = Trainer(config=config)
    names = [state.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainer.handle.shapes)]
    trainer.run([poison(batch, np.nan) for batch in make_batches(2)])
    guard.check(config, jax.device_get(trainer.state.guard), names)
    trainer.run([poison(batch, np.nan) for batch in make_batches(1)])
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*batch 2.*embedding"):
        guard.check(config, jax.device_get(trainer.state.guard), names)
    assert TrainingDiverged.exit_code == 65


def test_averaged_weights():
    trainer = Trainer(config=optim.OptimConfig(learning_rate=1e-2, ema=0.5))
    average = trainer.params()
    for batch in make_batches(3):
        trainer.run([batch])
        average = jax.tree.map(lambda old, new: old + 0.5 * (new - old), average, trainer.params())
    assert_close(trainer.state.ema, average, 1e-6)


def test_clipping_and_adamw_follow_optax():
    batches = make_batches(3)
    config = optim.OptimConfig(learning_rate=1e-3, schedule="constant", warmup=0.0, clip_norm=0.5, epsilon=1e-4)
    trainer, plain = Trainer(config=config), Trainer(config=config)
    decayed = jax.tree.map(lambda info: info.kind != "vector", plain.handle.infos)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-4, weight_decay=0.1, mask=decayed)
    )
    params = plain.state.params
    moments = reference.init(params)

    @jax.jit
    def mean_gradient(params, batch):
        def mean_loss(params):
            total, weight, _ = language.loss(plain.handle.merge(params), batch, None)
            return total / weight

        return jax.grad(mean_loss)(params)

    for batch in batches:
        updates, moments = reference.update(mean_gradient(params, batch), moments, params)
        params = optax.apply_updates(params, updates)
    trainer.run(batches)
    assert_close(trainer.params(), jax.tree.map(np.asarray, params), 1e-5)


def test_dropout_changes_with_step_and_seed_only():
    first, second = (Trainer(model=dataclasses.replace(MODEL, dropout=0.2)) for _ in range(2))
    batch = make_batches(1)[0]
    losses = first.run([batch] * 2)
    assert losses == second.run([batch] * 2)
    second.state = dataclasses.replace(second.state, step=jnp.int32(7))
    assert second.run([batch]) != first.run([batch])


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_learns(name):
    batch = make_batches(1)[0]
    rate = {"lion": 1e-3, "adafactor": 1e-2}.get(name, 3e-3)
    trainer = Trainer(config=optim.OptimConfig(name=name, learning_rate=rate, schedule="constant", warmup=0.0))
    losses = trainer.run([batch] * 15)
    assert losses[-1] < 0.9 * losses[0]


def test_muon_orthogonalises_the_matrices():
    trainer = Trainer(
        config=optim.OptimConfig(name="muon", learning_rate=1.0, weight_decay=0.0, schedule="constant", warmup=0.0)
    )
    before = trainer.params()["stack"]["blocks"]["up"]["weight"]
    trainer.run(make_batches(1))
    update = trainer.params()["stack"]["blocks"]["up"]["weight"] - before
    for layer in update:
        # Newton-Schulz brings every singular value near one; the last is zero: normalised inputs have mean zero.
        values = np.linalg.svd(layer, compute_uv=False)[:-1]
        assert values.max() / values.min() < 4
    rms = np.sqrt(np.square(update).mean())
    assert 0.1 < rms < 0.3  # AdamW's, so that learning rates carry over


def test_model_that_does_not_divide_is_refused():
    model = gpt.Config(vocab_size=128, context=32, width=48, layers=2, heads=6)
    with pytest.raises(ConfigError, match="model.heads=6 is not divisible by mesh.model=8"):
        Trainer(model=model, mesh=MeshConfig(data=1, model=8))
    with pytest.raises(ConfigError, match="model.mlp=100 is not divisible by mesh.model=8: change one of them"):
        Trainer(model=dataclasses.replace(MODEL, mlp=100), mesh=MeshConfig(data=1, model=8))
    model = gpt.Config(vocab_size=100, context=32, width=64, layers=2, heads=8)
    with pytest.raises(ConfigError, match="embedding.*vocab.*100.*8 shards"):
        Trainer(model=model, mesh=MeshConfig(data=1, model=8))
    with pytest.raises(ConfigError, match="width=50 is not divisible by model.heads=4"):
        gpt.Config(width=50, heads=4)


def test_no_parameter_is_ever_whole_on_one_device():
    model = dataclasses.replace(MODEL, width=256, mlp=1024)
    placement = make_placement(MeshConfig(data=8, parameters="fsdp"))
    handle = state.describe_model(functools.partial(gpt.build, model, placement), placement)
    compiled = jax.jit(handle.init, out_shardings=handle.shardings).lower(jax.random.key(0)).compile()
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(handle.shapes))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(handle.shapes))
    assert compiled.memory_analysis().temp_size_in_bytes < largest
    assert compiled.memory_analysis().output_size_in_bytes < 1.05 * total / 8
