"""What runs differently on each kind of device, on the one at hand: kernels, a run and its continuation, the engine.

The suite sees CPUs. On a machine with a GPU: `LLMOS_TEST_PLATFORM=cuda python -m pytest tests/test_accelerator.py`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import api
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import gpt, llama, moe
from llmos_jax.models.attention import _PREFERRED, attend, attend_cached
from llmos_jax.models.attention_paged import KERNELS, attend_pages
from llmos_jax.serve.engine import Engine, EngineConfig
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train.state import describe_model

PLACEMENT = make_placement(None, jax.devices()[:1])
# On a CPU the rest of the suite asks the same, and more; here it is only kept from growing old.
repeated_on_cpu = pytest.mark.slow if PLACEMENT.platform == "cpu" else lambda test: test
MASKS = {
    "causal": {},
    "window": {"window": 100},
    "segments": {"segments": True},
    "window and segments": {"window": 100, "segments": True},
    "no mask": {"is_causal": False},
}
# Of the largest element; float32 products on GPUs are TF32 unless asked otherwise, which all that is compared here does.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("implementation", _PREFERRED[PLACEMENT.platform])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_gradients_are_those_of_the_reference(implementation, mask):
    masks, length = dict(MASKS[mask]), 256
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(1, 4, (2, length)), 1), jnp.int32)
    masks["segments_BL"] = segments if masks.pop("segments", False) else None
    dtype = "bfloat16" if implementation == "cudnn" else "float32"
    keys, heads = jax.random.split(jax.random.key(0), 4), (4, 2, 2, 4)
    tensors = [jax.random.normal(key, (2, length, h, 64)).astype(dtype) for key, h in zip(keys, heads, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, query, key, value, gradient):
        given = dict(masks, implementation=implementation, placement=PLACEMENT)
        output, backward = jax.vjp(lambda *qkv: attend(*qkv, **given), query, key, value)
        return output, *backward(gradient)

    with jax.default_matmul_precision("highest"):
        found, expected = run(implementation, *tensors), run("reference", *tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE[dtype] * np.abs(theirs).max(), rtol=0)


@pytest.mark.skipif(PLACEMENT.platform not in KERNELS, reason="no kernel of this platform reads pages")
@pytest.mark.parametrize("heads, groups, size, softcap", [(8, 2, 128, None), (32, 8, 128, None), (4, 4, 128, 20.0)])
def test_pages_are_read_where_they_lie(heads, groups, size, softcap):
    keys, shape = jax.random.split(jax.random.key(0), 3), (groups, 200, 16, size)
    query_BHK = jax.random.normal(keys[0], (3, heads, size), jnp.bfloat16)
    pools = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
    table_BP = np.random.default_rng(0).permutation(200)[:150].reshape(3, 50).astype(np.int32)
    length_B = np.array([1, 320, 799], np.int32)
    run = functools.partial(attend_pages, scale=0.25, softcap=softcap, placement=PLACEMENT)
    found = jax.jit(run)(query_BHK, pools, table_BP, length_B)
    for row, length in enumerate(length_B):
        key, value = (pool[:, table_BP[row]].reshape(groups, -1, size)[:, :length].astype(jnp.float32) for pool in pools)
        query = query_BHK[row][None, None].astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            expected = attend_cached(query, [(key.swapaxes(1, 2), value)], None, length - 1, scale=0.25, softcap=softcap)[0, 0]
        np.testing.assert_allclose(np.asarray(found[row], np.float32), expected, atol=2e-2)


def test_experts_by_the_platforms_own_product_are_those_of_capacity_for_all():
    """Where every expert has room for all tokens, the capacity form (batched products) must agree with the dropless one."""
    from flax import nnx

    def output(capacity):
        sizes = dict(experts=4, per_token=2, stddev=0.2, output_stddev=0.2)
        layer = moe.MixtureOfExperts(64, 128, capacity=capacity, placement=PLACEMENT, rngs=nnx.Rngs(params=0), **sizes)
        x, segments = jax.random.normal(jax.random.key(1), (4, 32, 64)), jnp.ones((4, 32), jnp.int32)
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda x: layer(x, segments)[0])(x)

    expected = np.asarray(output(4.0))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(output(None), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@repeated_on_cpu
def test_a_run_learns_reports_the_device_and_goes_on_where_it_stopped(tmp_path):
    def train(name, steps):
        overrides = [("train.steps", str(steps)), ("optim.schedule", "constant"), ("optim.warmup", "0")]
        api.run_training(api.load_settings("experiments/gpt.py:smoke", overrides)[0], tmp_path / name)

    train("whole", 24)
    train("parts", 12)
    train("parts", 24)
    whole, parts = (
        [e for e in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) if "train/loss" in e]
        for name in ("whole", "parts")
    )
    losses = [{entry["step"]: entry["train/loss"] for entry in entries} for entries in (whole, parts)]
    assert losses[0].keys() == losses[1].keys() and losses[0][24] < losses[0][4] - 0.5
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-3)
    if PLACEMENT.platform != "cpu":
        assert whole[-1]["throughput/mfu"] > 0 and whole[-1]["memory/device_peak_bytes"] > 0


@repeated_on_cpu
@pytest.mark.parametrize("family, config", [(gpt, gpt.Config), (llama, functools.partial(llama.Config, kv_heads=2, window=24))])
def test_the_engine_draws_what_the_whole_model_says(family, config):
    config = config(vocab_size=128, context=128, width=64, layers=2, heads=4, mlp=96, dtype="float32")
    handle = describe_model(functools.partial(family.build, config, PLACEMENT), PLACEMENT)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.jit(handle.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 6 * x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    prompts = [np.random.default_rng(length).integers(0, 128, length).tolist() for length in (1, 17, 40, 5)]
    settings = EngineConfig(rows=4, page_size=8, cache_bytes=1, prefill_tokens=32, decode_steps=4)

    @jax.jit
    def likeliest(params, tokens_BL, last):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens_BL, jnp.arange(tokens_BL.shape[1])[None]))[0, last].argmax()

    with jax.default_matmul_precision("highest"):
        engine = Engine(handle, family, config, params, vocab_size=128, settings=settings)
        found = engine.generate(prompts, SamplingConfig(max_tokens=12, temperature=0.0))
        for prompt, (tokens, *_) in zip(prompts, found, strict=True):
            known = list(prompt)
            while len(known) < len(prompt) + 12:
                padded = np.zeros((1, 128), np.int32)
                padded[0, : len(known)] = known
                known.append(int(likeliest(params, padded, len(known) - 1)))
            assert list(tokens) == known[len(prompt) :]


@repeated_on_cpu
def test_cached_logits_in_bfloat16_are_those_of_the_whole_row():
    config = llama.Config(vocab_size=128, context=64, width=64, layers=2, heads=4, kv_heads=2, mlp=96, dtype="bfloat16")
    handle = describe_model(functools.partial(llama.build, config, PLACEMENT), PLACEMENT)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(handle.init)(jax.random.key(0)))
    prompt = np.random.default_rng(0).integers(0, 128, 33).tolist()
    engine = Engine(handle, llama, config, params, vocab_size=128, settings=EngineConfig(rows=2, cache_bytes=1))
    sampling = SamplingConfig(max_tokens=4, temperature=0.0, logprobs=3)
    ((tokens, _, logprobs),) = engine.generate([prompt], sampling)

    @jax.jit
    def whole(params, tokens_BL):
        model = handle.merge(params)
        return jax.nn.log_softmax(model.logits(model.hidden(tokens_BL, jnp.arange(tokens_BL.shape[1])[None])), -1)

    logits = np.asarray(whole(params, np.asarray([prompt + list(tokens)]))[0, len(prompt) - 1 : -1], np.float32)
    assert len(logprobs) == 4
    for step, (own, _) in enumerate(logprobs):
        assert abs(own - logits[step, tokens[step]]) < 0.05
