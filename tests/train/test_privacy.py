"""Differential privacy: clipping against the naive per-document gradient, noise, meshes, accounting, whole runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from llmos_jax import api
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError, DataIdentityMismatch, RunDirectoryError
from llmos_jax.models import gpt
from llmos_jax.tasks import base, language
from llmos_jax.train import optim, privacy, private_step, state, step
from llmos_jax.train.metrics import read_metrics

MODEL = gpt.Config(vocab_size=128, context=16, width=32, layers=1, heads=4, mlp=64)
ROWS, LENGTH = 16, 16
# Programs for eight devices compile: minutes where the machine is shared by many.
slow_to_compile = pytest.mark.timeout(1200)
CLIP = 0.7


def make_rows(drawn, *, seed=0, parts=4):
    """A batch of ROWS rows, of which the first `drawn` in the order of microbatches are documents."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128, (ROWS, LENGTH + 1)).astype(np.int32)
    order = (np.arange(ROWS) % parts) * (ROWS // parts) + np.arange(ROWS) // parts
    is_drawn = (order < drawn).astype(np.float32)
    lengths = rng.integers(3, LENGTH, (ROWS, 1))
    weights = (np.arange(LENGTH) < lengths) * is_drawn[:, None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": (weights > 0).astype(np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": weights.astype(np.float32),
        "target_bytes": np.full(ROWS, LENGTH, np.int32),
        "is_drawn": is_drawn,
        "noise_key": np.tile(np.array([7, seed], np.uint32), (ROWS, 1)),
    }


class Trainer:
    """The step with a Privatizer, on a mesh."""

    def __init__(self, mesh=None, *, parts=4, noise=0.0, model=MODEL):
        mesh = mesh or MeshConfig(data=1)
        self.placement = make_placement(mesh, jax.devices()[: mesh.replica * mesh.data * mesh.model])
        build = functools.partial(gpt.build, model)
        self.handle = state.describe_model(functools.partial(build, self.placement), self.placement)
        row_placement, axes = private_step._for_rows(self.placement)
        rows = state.describe_model(functools.partial(build, row_placement), row_placement)
        self.privatizer = private_step.Privatizer(CLIP, noise, 10, parts, rows, axes)
        config = optim.OptimConfig(learning_rate=1e-2, epsilon=1e-3, clip_norm=None)
        optimizer = optim.make_optimizer(config, self.handle.infos)
        self.state = state.init_state(self.handle, optimizer, self.placement, 0)
        function = step.make_step(language.loss, self.handle, optimizer, config, seed=0, steps=20, privatizer=self.privatizer)
        where = state.state_shardings(self.handle, optimizer, self.placement)
        self.step = jax.jit(function, out_shardings=(where, self.placement.sharding()))

    def place(self, batch):
        return {
            name: jax.device_put(x, self.placement.sharding(*("batch", None if name == "noise_key" else "length")[: x.ndim]))
            for name, x in batch.items()
        }

    @functools.cached_property
    def _gradients(self):
        return jax.jit(self.privatizer.gradient(language.loss, self.handle))

    def gradients(self, batch):
        return self._gradients(self.state.params, self.place(batch), jax.random.key(0))

    def run(self, batches):
        losses = []
        for batch in batches:
            self.state, metrics = self.step(self.state, self.place(batch), jnp.float32(0))
            losses.append(float(metrics["train/loss"]))
        return losses, jax.tree.map(np.asarray, self.state.params)


@pytest.fixture(scope="module")
def still():
    """A trainer that takes no step."""
    return Trainer()


def naive(trainer, batch):
    """The sum of clipped gradients, one document after the other, in float64 after the gradient; and every norm."""

    def mean_loss(params, row):
        total, weight, _ = language.loss(trainer.handle.merge(params), row, jax.random.key(0))
        return total / weight

    (total, norms), gradient_of = (None, []), jax.jit(jax.grad(mean_loss))
    for number in np.flatnonzero(batch["is_drawn"]):
        row = {name: jnp.asarray(x[number : number + 1]) for name, x in batch.items()}
        gradient = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient_of(trainer.state.params, row))
        norms.append(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))))
        scaled = jax.tree.map(lambda g, norm=norms[-1]: g * min(1.0, CLIP / norm), gradient)
        total = scaled if total is None else jax.tree.map(np.add, total, scaled)
    return total, np.array(norms)


@pytest.mark.parametrize(
    ("parts", "drawn"), [(4, 11), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((16, 11), (1, 16)))]
)
def test_clipped_gradients_equal_those_taken_one_by_one(parts, drawn, still):
    trainer, batch = still if parts == 4 else Trainer(parts=parts), make_rows(drawn, parts=parts)
    (total, (weight, sums)), gradients = trainer.gradients(batch)
    expected, norms = naive(trainer, batch)
    assert (norms > CLIP).any()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, largest)), gradients, expected)
    assert float(weight) == batch["weights"].sum() and float(sums["nll"]) == pytest.approx(float(total), rel=1e-5)


def test_some_gradients_are_below_the_norm_and_stay_what_they_are():
    trainer, batch = Trainer(parts=16), make_rows(1, parts=16)
    big = dataclasses.replace(trainer.privatizer, clip_norm=1e3)
    gradients = jax.jit(big.gradient(language.loss, trainer.handle))(
        trainer.state.params, trainer.place(batch), jax.random.key(0)
    )[1]
    row = {name: jnp.asarray(x[:1]) for name, x in batch.items()}

    def mean_loss(params):
        total, weight, _ = language.loss(trainer.handle.merge(params), row, None)
        return total / weight

    plain = jax.jit(jax.grad(mean_loss))(trainer.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradients, plain)


def test_a_document_moves_the_sum_by_no_more_than_the_norm(still):
    with_it = make_rows(12)
    without = dict(with_it, is_drawn=with_it["is_drawn"].copy(), weights=with_it["weights"].copy())
    number = np.flatnonzero(with_it["is_drawn"])[5]
    without["is_drawn"][number] = 0
    without["weights"][number] = 0
    # Far too large a loss, and one that is not finite.
    for factor in (1.0, 1e6, np.nan):
        with_it["weights"][number] = np.where(with_it["weights"][number] > 0, factor, 0)
        apart = jax.tree.map(lambda a, b: a - b, still.gradients(with_it)[1], still.gradients(without)[1])
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(apart)))
        assert np.isfinite(norm) and norm <= CLIP * (1 + 1e-4)


def test_a_damaged_document_does_not_decide_whether_a_step_is_skipped():
    batch = make_rows(12)
    batch["weights"][np.flatnonzero(batch["is_drawn"])[3]] = np.nan
    trainer = Trainer()
    trainer.run([batch])
    assert int(trainer.state.step) == 1 and int(trainer.state.guard["skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.state.params))


def test_noise_has_its_scale_and_is_new_in_every_step():
    trainer, made = Trainer(noise=3.0), []
    zeros = jax.tree.map(jnp.zeros_like, trainer.state.params)
    average = jax.jit(lambda batch: trainer.privatizer.average(zeros, batch, trainer.handle))
    for seed in range(40):
        made.append(
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(average(trainer.place(make_rows(4, seed=seed))))])
        )
    made = np.array(made)
    scale = 3.0 * CLIP / 10  # noise multiplier x clip_norm, over the expected documents
    count = made.size
    assert made.mean() == pytest.approx(0, abs=5 * scale / np.sqrt(count))
    assert made.std() == pytest.approx(scale, rel=5 / np.sqrt(2 * count))
    assert stats.kstest(made[0] / scale, "norm").pvalue > 1e-4
    correlations = np.corrcoef(made)[~np.eye(40, dtype=bool)]
    assert np.abs(correlations).max() < 6 / np.sqrt(made.shape[1])
    halves = made[:, : made.shape[1] // 2], made[:, made.shape[1] // 2 : made.shape[1] // 2 * 2]
    assert abs(np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1]) < 6 / np.sqrt(count / 2)
    np.testing.assert_array_equal(
        made[3], np.concatenate([np.ravel(x) for x in jax.tree.leaves(average(trainer.place(make_rows(9, seed=3))))])
    )


def test_the_sum_is_divided_by_the_expected_number(still):
    batch = make_rows(13)
    _, gradients = still.gradients(batch)
    averaged = still.privatizer.average(gradients, still.place(batch), still.handle)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 10, rtol=1e-6, atol=1e-9), averaged, gradients)


@slow_to_compile
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (MeshConfig(data=2, model=2, parameters="fsdp"), 4),
        pytest.param(MeshConfig(replica=2, data=2, parameters="zero1"), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_trains_like_one_device(mesh, parts):
    batches = [make_rows(drawn, seed=seed, parts=parts) for seed, drawn in enumerate((11, 16, 3))]
    losses, params = Trainer(parts=parts, noise=0.5).run(batches)
    found, others = Trainer(mesh, parts=parts, noise=0.5).run(batches)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), others, params)


# ---- accounting
def test_one_step_agrees_with_the_integral():
    """delta(epsilon) of one sampled Gaussian by its definition, for adding and for removing a document."""
    noise, probability = 0.9, 0.05

    def delta(budget):
        grid = np.linspace(-12, 13, 400_001)
        plain = stats.norm.pdf(grid, 0, noise)
        mixed = (1 - probability) * plain + probability * stats.norm.pdf(grid, 1, noise)
        gains = (mixed - np.exp(budget) * plain, plain - np.exp(budget) * mixed)
        return max(integrate.trapezoid(np.maximum(gain, 0), grid) for gain in gains)

    found = privacy.epsilon(noise, probability, 1, 1e-4)
    assert delta(found) <= 1.001e-4 and delta(found - 0.02) > 1e-4


@pytest.mark.parametrize(
    ("noise", "probability", "steps", "at"), [(1.1, 0.01, 1000, 1e-5), (0.7, 0.002, 5000, 1e-6), (2.0, 1.0, 20, 1e-5)]
)
def test_epsilon_is_that_of_dp_accounting(noise, probability, steps, at):
    import dp_accounting
    from dp_accounting import pld, rdp

    def compose(accountant):
        event = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
        return accountant.compose(event, steps).get_epsilon(at)

    found = privacy.epsilon(noise, probability, steps, at)
    assert found == pytest.approx(compose(pld.PLDAccountant()), rel=1e-9)
    assert found < compose(rdp.RdpAccountant())  # a looser bound by another method
    assert privacy.epsilon(noise, probability, 0, at) == 0.0


def test_noise_is_the_least_that_keeps_to_the_budget():
    noise = privacy.calibrate(3.0, 0.02, 300, 1e-5)
    assert privacy.epsilon(noise, 0.02, 300, 1e-5) <= 3.0 < privacy.epsilon(noise - 2e-3, 0.02, 300, 1e-5)


@pytest.mark.slow
def test_steps_are_the_most_that_keep_to_the_budget():
    for limit in (None, 5000):
        steps = privacy.most_steps(2.0, 1.0, 0.02, 1e-5, limit)
        assert privacy.epsilon(1.0, 0.02, steps, 1e-5) <= 2.0 < privacy.epsilon(1.0, 0.02, steps + 1, 1e-5)
    assert privacy.most_steps(2.0, 1.0, 0.02, 1e-5, 7) == 7
    assert privacy.most_steps(0.01, 0.3, 0.5, 1e-5, 100) == 0


def test_batches_have_room_for_any_draw():
    for expected in (1, 16, 300):
        rows = privacy._capacity(expected)
        assert stats.poisson.sf(rows, expected) < 1e-20 and rows < expected + 10 * np.sqrt(expected) + 25
        assert stats.binom.sf(rows, 1000, expected / 1000) < 1e-20


# ---- runs
RUN = {
    "train.steps": 8,
    "train.batch_size": 8,
    "train.log_every_steps": 4,
    "train.evaluate_every_steps": "none",
    "train.privacy.noise_multiplier": 0.8,
    "data.packing": "document",
    "data.tokenizer": "byte",
    "optim.schedule": "constant",
    "optim.warmup": 0,
    "model.dropout": 0.1,
    "task.sample_tokens": 1,
    "task.evaluation_batches": 1,
    "model.layers": 1,
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("private") / "documents.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join("abcdefgh"[n] * 3 for n in rng.integers(0, 8, rng.integers(2, 12))) for _ in range(200)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def settings_for(documents, **overrides):
    changed = RUN | {name.replace("__", "."): value for name, value in overrides.items()}
    pairs = [(name, str(value)) for name, value in changed.items()]
    return api.load_settings(f"experiments/gpt.py:smoke,data={documents}", pairs)[0]


def params_of(directory):
    return jax.tree.map(np.asarray, api.load(directory).params)


def losses(directory):
    return {e["step"]: e["train/loss"] for e in read_metrics(directory / "metrics.jsonl") if "train/loss" in e}


@pytest.fixture(scope="module")
def whole(documents, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, api.run_training(settings_for(documents), directory)


@slow_to_compile
def test_a_run_says_what_it_spent(documents, whole):
    _, summary = whole
    account = summary["privacy"]
    assert account["epsilon"] == privacy.epsilon(0.8, account["sampling_probability"], 8, 1e-5)
    assert account["sampling_probability"] == pytest.approx(8 / 180, rel=0.1) and account["steps"] == 8
    assert api.run_training(settings_for(documents), whole[0])["privacy"] == account  # finished: not trained again


@pytest.mark.slow
@slow_to_compile
def test_a_resumed_run_is_bitwise_the_same(documents, whole, tmp_path):
    api.run_training(settings_for(documents, train__steps=3), tmp_path)
    api.run_training(settings_for(documents), tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(whole[0]))


@pytest.mark.slow
@slow_to_compile
def test_training_stops_at_the_budget(documents, tmp_path):
    summary = api.run_training(settings_for(documents, train__privacy__epsilon=2.0, train__steps=500), tmp_path)
    account = summary["privacy"]
    assert 0 < summary["step"] == account["steps"] < 500
    assert account["epsilon"] <= 2.0 < privacy.epsilon(0.8, account["sampling_probability"], account["steps"] + 1, 1e-5)


@pytest.mark.slow
@slow_to_compile
def test_another_key_draws_otherwise_and_is_not_mixed_in(documents, whole, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    directory = tmp_path / "run"
    keyed = settings_for(documents, train__privacy__key_file=key, train__steps=4)
    api.run_training(keyed, directory)
    assert losses(directory)[1] != losses(whole[0])[1]
    with pytest.raises(RunDirectoryError, match="key_file"):
        api.run_training(settings_for(documents), directory)
    key.write_bytes(bytes(range(1, 33)))
    with pytest.raises(DataIdentityMismatch, match="another key"):
        api.run_training(settings_for(documents, train__privacy__key_file=key), directory)
    with pytest.raises(RunDirectoryError, match="noise_multiplier"):
        api.run_training(settings_for(documents, train__privacy__key_file=key, train__privacy__noise_multiplier=0.5), directory)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mesh.pipeline": 2, "model.layers": 2}, ["mesh.pipeline above 1"]),
        ({"mesh.context": 2}, ["mesh.context above 1"]),
        ({"train.microbatches": 2}, ["train.microbatches=2", "rows_at_once"]),
        ({"optim.gradient_dtype": "bfloat16"}, ["gradient_dtype=bfloat16"]),
        ({"data.packing": "stream"}, ["data.packing=stream", "one document"]),
        ({"train.privacy.rows_at_once": 3}, ["rows_at_once=3", "multiple of the 8"]),
        ({"train.batch_size": 400}, ["train.batch_size=400", "lower it"]),
        ({"train.privacy.epsilon": 0.01}, ["epsilon=0.01", "one step"]),
        ({"train.privacy.key_file": "/nowhere/key"}, ["/nowhere/key", "No such file"]),
        ({"train.privacy.noise_multiplier": "none"}, ["needs a budget"]),
        ({"train.privacy.delta": 1.0}, ["train.privacy.delta=1.0", "below"]),
        ({"train.privacy.clipnorm": 1.0}, ["clipnorm", "did you mean 'clip_norm'"]),
    ],
    ids=str,
)
def test_what_can_not_be_private_is_refused(documents, changed, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        api.run_training(
            settings_for(documents, **{name.replace(".", "__"): value for name, value in changed.items()}), tmp_path
        )
    assert all(word in str(error.value) for word in words), error.value


def test_experts_are_refused():
    settings = api.load_settings(
        "experiments/moe.py:smoke",
        [("train.privacy.noise_multiplier", "1"), ("data.packing", "document"), ("train.microbatches", "1")],
    )[0]
    with pytest.raises(ConfigError, match="model.experts"):
        privacy.check_private(settings, make_placement(MeshConfig(), jax.devices()[:1]))


def test_a_plan_needs_the_noise_by_name(documents):
    settings = settings_for(documents, train__privacy__noise_multiplier="none", train__privacy__epsilon=3.0)
    with pytest.raises(ConfigError, match="must be named where no data is read"):
        private_step.make_privatizer(settings, None, make_placement(MeshConfig(), jax.devices()[:1]))


def test_fields_of_the_sampler_are_told_to_the_compiler():
    fields = privacy.private_fields({"tokens": base.Field(np.int32, (4,), ("batch", "length"))})
    assert list(fields) == ["tokens", "is_drawn", "noise_key"]
