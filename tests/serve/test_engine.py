"""The engine against a plain reference that runs every request alone, without cache, pages, drafts or neighbours."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from llmos_jax import config as config_lib
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError, DeviceMemoryError
from llmos_jax.models import attention_paged, few_rows, gpt, llama
from llmos_jax.models.rope import RopeConfig
from llmos_jax.serve import cache, programs
from llmos_jax.serve.engine import Engine, EngineConfig, _fine_ladder, _row_ladder
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train.state import describe_model

VOCAB, END = 60, 7
LLAMA = llama.Config(vocab_size=64, context=96, width=32, layers=2, heads=8, kv_heads=8, mlp=48, window=20, global_layers=(1,))
GPT = gpt.Config(vocab_size=64, context=96, width=32, layers=2, heads=4)
SMALL = EngineConfig(rows=4, page_size=4, cache_bytes=1, prefill_tokens=16, decode_steps=3, draft_tokens=3)
PAIR = dataclasses.replace(SMALL, rows=2)  # half as many programs


def make(family=llama, config=LLAMA, mesh=None, settings=SMALL, devices=None):
    placement = make_placement(mesh, devices or jax.devices()[:1])
    handle = describe_model(functools.partial(family.build, config, placement), placement)
    params = jax.jit(handle.init)(jax.random.key(0))
    # Initial weights are too small and too regular to show a mistake: scale matrices, jitter vectors.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: 6 * x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    params = jax.device_put(params, handle.shardings)
    return Engine(handle, family, config, params, vocab_size=VOCAB, end_ids={END}, settings=settings), params


@functools.cache
def logits_program(family, config):
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(family.build, config, placement), placement)

    @jax.jit
    def run(params, tokens_BL, last):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens_BL, jnp.arange(tokens_BL.shape[1])[None]))[0, last, :VOCAB]

    return run


def naive_choice(logits, sampling, stream, prompt, drawn):
    """Draws a token as the settings' definitions say, in numpy but for the random numbers."""
    logits = np.array(logits, np.float64)
    for token in set(prompt + drawn):
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    for token in drawn:
        logits[token] -= sampling.frequency_penalty
    for token in set(drawn):
        logits[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        logits[int(token)] += bias
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits /= sampling.temperature
    order = np.argsort(-logits)
    kept = list(order[: sampling.top_k])
    shares = np.exp(logits[kept] - logits.max()) / np.exp(logits[kept] - logits.max()).sum()
    kept = [t for t, before in zip(kept, np.cumsum(shares) - shares, strict=True) if before < (sampling.top_p or 2.0)]
    kept = [t for t in kept if np.exp(logits[t] - logits.max()) >= (sampling.min_p or 0)]
    hidden = np.full(logits.shape, -np.inf)
    hidden[kept] = logits[kept]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), stream), len(drawn))
    gumbel = jax.random.gumbel(key, (64,))[:VOCAB]
    return int(np.argmax(hidden + np.asarray(gumbel, np.float64)))


def reference(params, prompt, sampling, stream=0, family=llama, config=LLAMA):
    """Returns (tokens, reason) of a request that is alone in the world."""
    run, drawn, padded = logits_program(family, config), [], np.zeros((1, config.context), np.int32)
    while True:
        known = prompt + drawn
        padded[0, : len(known)] = known
        drawn.append(naive_choice(run(params, padded.copy(), len(known) - 1), sampling, stream, prompt, drawn))
        if drawn[-1] == END:
            return tuple(drawn[:-1]), "end"
        if len(drawn) == sampling.max_tokens:
            return tuple(drawn), "length"
        if len(prompt) + len(drawn) > config.context:
            return tuple(drawn), "context"


GREEDY = SamplingConfig(max_tokens=20, temperature=0.0)
SAMPLINGS = [
    GREEDY,
    SamplingConfig(max_tokens=12, temperature=1.0, seed=3),
    SamplingConfig(max_tokens=30, temperature=0.7, top_k=9, seed=2**32 - 1),
    SamplingConfig(max_tokens=15, temperature=1.3, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
    SamplingConfig(
        max_tokens=25, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.7, logit_bias={"5": 2.5, "9": -9.0}
    ),
    SamplingConfig(max_tokens=1, temperature=0.0),
]


def prompts(count, seed=0):
    """Prompts of all lengths, some with a beginning in common, some that repeat themselves."""
    random = np.random.default_rng(seed)
    common = random.integers(8, VOCAB, 30).tolist()
    found = []
    for index in range(count):
        own = random.integers(8, VOCAB, random.integers(1, 30)).tolist()
        found.append([own, common[: random.integers(4, 30)] + own, (own[:4] * 12)[:40]][index % 3])
    return found


@pytest.fixture(scope="module")
def made():
    return make()


def assert_empty(engine):
    counts = engine.pool.counts()
    assert counts["held"] == 0 and sum(counts.values()) == engine.pool.pages and not len(engine.scheduler)


ASKED = [(prompt, SAMPLINGS[index % len(SAMPLINGS)]) for index, prompt in enumerate(prompts(12))]


@pytest.fixture(scope="module")
def expected(made):
    return [reference(made[1], prompt, sampling, index) for index, (prompt, sampling) in enumerate(ASKED)]


def test_no_program_copies_the_cache(made):
    """Keys and values of all requests are updated in place: XLA copies what it might write before it has read it."""
    engine, _ = made
    engine.warm_up()
    groups, pages, page_size, size = engine._pools[0][0].shape
    shape = f"{groups},{pages},{page_size},{size}"
    kinds = collections.Counter()
    for (kind, *_), program in engine.programs._compiled.items():
        text = program.as_text()
        assert f"[{shape}]" in text and not re.search(rf"f32\[{shape}\]\S* copy\(", text), kind
        if kind == "decode":
            lie = rf"\d+,{groups},({size},{engine._seats.width}|{engine._seats.width},{size})"
            assert re.search(rf"\[{lie}\]", text) and not re.search(rf"f32\[{lie}\]\S* copy\(", text)
        kinds[kind] += 1
    assert kinds.keys() == {"prefill", "gather", "gather_some", "decode", "verify"}


def test_sizes_of_programs():
    assert [_row_ladder(most) for most in (1, 2, 3, 4)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4]]
    assert _row_ladder(6) == [1, 2, 4, 6] and _row_ladder(20) == [1, 2, 4, 8, 12, 16, 20]
    assert _row_ladder(48) == [1, 2, 4, 8, 12, 16, 24, 32, 48]
    assert _fine_ladder(16, 64, 8) == [16, 24, 32, 40, 48, 56, 64]
    assert _fine_ladder(1, 6, 1) == [1, 2, 3, 4, 5, 6] and _fine_ladder(16, 10, 8) == [10]
    sizes = _fine_ladder(16, 8192, 8)
    assert sizes[-1] == 8192 and all(b <= 1.25 * a for a, b in zip(sizes[2:], sizes[3:], strict=False)) and len(sizes) == 35


class Oracle:
    """Drafts what will come, but for a mistake now and then."""

    def __init__(self, full, period):
        self.full, self.period = full, period

    def propose(self, tokens, count):
        draft = list(self.full[len(tokens) : len(tokens) + count])
        return [token ^ 1 if (len(tokens) + i) % self.period == 0 else token for i, token in enumerate(draft)]

    def report(self, proposed, accepted):
        pass


def test_every_request_is_as_if_it_were_alone(made, expected):
    engine, _ = made
    found = engine.generate(*zip(*ASKED, strict=True))
    assert [row[:2] for row in found] == expected
    assert_empty(engine)
    assert engine.counts["reused_tokens"] and engine.counts["preemptions"]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_schedule_draws_the_same(made, expected, data):
    """Arrivals, cancellations, other people's pages, drafts that are right or wrong: nothing shows in the tokens."""
    engine, _ = made
    hostages = engine.pool.allocate(data.draw(st.integers(0, engine.pool.available - 24)))
    chosen = data.draw(st.lists(st.sampled_from(range(len(ASKED))), min_size=2, max_size=6, unique=True))
    arrivals = {index: data.draw(st.integers(0, 8)) for index in chosen}
    leaves = data.draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 9), max_size=2))
    period = data.draw(st.sampled_from([0, 2, 3, 1000]))
    running, tokens, reasons = {}, {index: () for index in chosen}, {}
    try:
        for number in range(300):
            for index in (index for index in chosen if arrivals[index] == number):
                prompt, sampling = ASKED[index]
                running[engine.submit(prompt, sampling, stream=index)] = index
                if period:
                    full = [*prompt, *expected[index][0], END]
                    engine.scheduler.find(next(reversed(running))).payload.drafter = Oracle(full, period)
            for identity, index in running.items():
                if leaves.get(index) == number:
                    engine.cancel(identity)
            for event in engine.step():
                tokens[running[event.id]] += event.tokens
                reasons[running[event.id]] = event.reason
            counts = engine.pool.counts()
            assert sum(counts.values()) == engine.pool.pages
            if number > 9 and not len(engine.scheduler):
                break
    finally:
        for identity in running:
            engine.cancel(identity)
        engine.forget_events()
        engine.pool.release(hostages)
    assert_empty(engine)
    for index in chosen:
        if reasons[index] == "cancelled":
            assert expected[index][0][: len(tokens[index])] == tokens[index]
        else:
            assert (tokens[index], reasons[index]) == expected[index]


def test_programs_are_warm_after_warm_up(made, expected):
    engine, _ = made
    count = engine.warm_up()
    accepted = engine.counts["accepted_tokens"]
    found = engine.generate(*zip(*ASKED, strict=True))
    assert [row[:2] for row in found] == expected
    loop = [11, 12, 13, 14] * 8
    engine.generate([loop], dataclasses.replace(GREEDY, logit_bias={str(token): 1000.0 for token in loop[:1]}))
    assert engine.counts["accepted_tokens"] > accepted  # the biased row repeats itself, and its history says so
    # Gather (all blocks, some), decode and verify for 1, 2 and 4 rows; prefill with a past and without.
    assert engine.programs.count == count == 4 * 3 + 2


def test_a_known_prefix_leaves_chunks_of_several_sizes_and_all_are_warm():
    """Chunks behind a past have sizes of their own on a CPU, from one page; no request compiles a program."""
    settings = dataclasses.replace(PAIR, page_size=16, prefill_tokens=48, draft_tokens=0)
    engine, params = make(config=dataclasses.replace(LLAMA, layers=1, global_layers=()), settings=settings)
    assert engine._whole_ladder == [32, 48] and engine._chunk_ladder == [16, 32, 48]
    count, lengths, run = engine.warm_up(), set(), engine.programs.run

    def noted(kind, weights, held, rows, **static):
        if static.get("has_past"):
            lengths.add(rows["tokens"].shape[1])
        return run(kind, weights, held, rows, **static)

    engine.programs.run = noted
    known = list(range(8, 40))
    sampling = dataclasses.replace(GREEDY, max_tokens=2)
    for left in (1, 16, 17, 33, 48):
        prompt = known + [40 + (left * token) % 19 for token in range(left)]
        engine.generate([known + [9]], sampling)
        assert engine.generate([prompt], sampling)[0][:2] == reference(params, prompt, sampling, 0, config=engine.config)
    assert lengths == {16, 32, 48} and engine.programs.count == count


def test_a_past_is_gathered_once_for_as_long_as_its_rows_stay(made):
    engine, _ = made
    before = engine.counts.copy()
    engine.generate([list(range(8, 28))], dataclasses.replace(GREEDY, max_tokens=40, logit_bias={str(END): -100.0}))
    counts = engine.counts - before
    # Only a pass over drafts computes tokens that the past does not get.
    assert counts["decode"] > 1 + counts["verify"] >= counts["gather"] > 0
    assert engine._blocks is None  # what is nobody's takes no memory


def test_an_interrupt_while_a_step_waits_loses_nothing(made, monkeypatch):
    engine, _ = made
    prompt, sampling = list(range(8, 28)), dataclasses.replace(GREEDY, max_tokens=40, logit_bias={str(END): -100.0})
    [(expected, _, _)] = engine.generate([prompt], sampling)
    engine.submit(prompt, sampling)
    tokens, get = [token for event in engine.step() for token in event.tokens], jax.device_get

    def interrupted(values):
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        monkeypatch.setattr(jax, "device_get", get)
        tokens += [token for event in engine.step() for token in event.tokens]
    while len(engine.scheduler):
        tokens += [token for event in engine.step() for token in event.tokens]
    assert tuple(tokens) == expected


def test_an_exception_in_a_step_loses_no_news(made, monkeypatch):
    """The second prompt's program fails; the first one's token was drawn, and is told by the next step."""
    engine, _ = made
    prompts = [list(range(8, 24)), list(range(24, 40))]
    alone = [engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=1))[0][0] for prompt in prompts]
    engine.pool.forget()
    first, second = (engine.submit(prompt, dataclasses.replace(GREEDY, max_tokens=1)) for prompt in prompts)
    calls, get = [], jax.device_get

    def once(values):
        calls.append(values)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return get(values)

    monkeypatch.setattr(jax, "device_get", once)
    told = []
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            told += engine.step()
    monkeypatch.setattr(jax, "device_get", get)
    while len(engine.scheduler):
        told += engine.step()
    assert {event.id: event.tokens for event in told} == {first: alone[0], second: alone[1]}


def test_a_device_that_runs_out_says_what_takes_its_memory(made, monkeypatch):
    def run_out(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    engine, _ = made
    monkeypatch.setattr(engine.programs, "run", run_out)
    with pytest.raises(DeviceMemoryError, match=r"while it generated .*5 bytes.*weights \d.* MiB.*lower cache_bytes"):
        engine.generate([[8, 9, 10]], GREEDY)
    assert_empty(engine)


def test_blocks_are_given_up_with_their_last_request(made):
    engine, _ = made
    one = engine.submit(list(range(8, 28)), dataclasses.replace(GREEDY, max_tokens=40, logit_bias={str(END): -100.0}))
    while engine._blocks is None:
        engine.step()
    engine.cancel(one)
    assert engine._blocks is None
    engine.step()


def test_more_steps_than_blocks_have_room_for():
    """A dispatch draws more tokens than a row's context has room for, or than a block: what is beyond is nobody's."""
    config = dataclasses.replace(LLAMA, context=192)
    engine, params = make(config=config, settings=EngineConfig(rows=2, page_size=16, decode_steps=300, draft_tokens=0))
    count = engine.warm_up()
    samplings = [dataclasses.replace(GREEDY, max_tokens=count, logit_bias={str(END): -100.0}) for count in (310, 90)]
    asked = list(zip([[9, 10], [11] * 80], samplings, strict=True))
    found = engine.generate(*zip(*asked, strict=True))
    assert [row[1] for row in found] == ["context", "length"] and engine.programs.count == count
    assert [row[:2] for row in found] == [reference(params, *one, config=config) for one in asked]


def test_logits_that_are_no_numbers_draw_a_known_token():
    engine, params = make(settings=PAIR)
    engine.load(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params))
    [(tokens, _, _)] = engine.generate([[9, 10]], dataclasses.replace(GREEDY, max_tokens=3))
    assert tokens == (0, 0, 0)


def test_what_pages_held_before_never_matters(made, expected):
    engine, _ = made
    engine._pools = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), engine._pools)
    engine.pool.forget()
    found = engine.generate(*zip(*ASKED[:3], strict=True))
    assert [row[:2] for row in found] == expected[:3]


def test_pages_read_where_they_lie_draw_the_same(monkeypatch):
    """The kernel that GPUs read pages with, interpreted: every request is as if alone; nobody reads what is not finite."""
    run = functools.partial(attention_paged._gpu, interpret=True)
    kernel = dataclasses.replace(attention_paged.KERNELS["gpu"], run=run, dtypes=("float32",))
    config = dataclasses.replace(LLAMA, heads=2, kv_heads=1, window=None, global_layers=())
    with pytest.raises(ConfigError, match="decode_attention=paged runs on gpu and tpu, and the devices are cpu"):
        make(config=config, settings=dataclasses.replace(PAIR, decode_attention="paged"))
    monkeypatch.setitem(attention_paged.KERNELS, "cpu", kernel)
    with pytest.raises(ConfigError, match="decode_attention=paged has no sliding window.*of 20; take 'gathered'"):
        make(settings=dataclasses.replace(PAIR, decode_attention="paged"))
    several = dataclasses.replace(SMALL, rows=3, cache_bytes=2**20, prefill_tokens=96, prefill_rows=3)
    engine, params = make(config=config, settings=several)  # several prompts in one dispatch, as on accelerators
    assert engine.programs.reads_pages
    asked = ASKED[:7]
    expected = [reference(params, prompt, s, index, config=config) for index, (prompt, s) in enumerate(asked)]
    assert [row[:2] for row in engine.generate(*zip(*asked, strict=True))] == expected
    alike, before = [list(range(8 + first, 28 + first)) for first in range(3)], engine.counts["prefill"]
    found = [row[:2] for row in engine.generate(alike, GREEDY)]
    assert found == [reference(params, prompt, GREEDY, config=config) for prompt in alike]
    assert engine.counts["prefill"] == before + 1 and engine.counts["reused_tokens"]
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    engine.load(broken)
    engine.generate(*zip(*asked[:3], strict=True))
    pools = engine._pools
    engine.load(params)
    engine._pools = pools
    assert [row[:2] for row in engine.generate(*zip(*asked, strict=True))] == expected
    assert_empty(engine)


def test_a_row_at_its_end_reads_no_further_while_its_neighbour_goes_on(monkeypatch):
    """The TPU's kernel, interpreted, reads as many pages as it is told to, also behind the table's end: that raises here."""

    def run(*arguments):
        with pltpu.force_tpu_interpret_mode():
            return attention_paged._tpu(*arguments)

    kernel = dataclasses.replace(attention_paged.KERNELS["tpu"], run=run, dtypes=("float32",))
    monkeypatch.setitem(attention_paged.KERNELS, "cpu", kernel)
    config = dataclasses.replace(LLAMA, context=64, layers=1, width=256, heads=2, kv_heads=2, window=None, global_layers=())
    settings = EngineConfig(rows=2, page_size=16, decode_steps=8, draft_tokens=0)
    engine, _ = make(config=config, settings=settings)
    assert engine.programs.reads_pages
    long = dataclasses.replace(GREEDY, logit_bias={str(END): -1000.0}, max_tokens=9)
    found = engine.generate([list(range(8, 18)), [9] * 61], long)
    assert [(len(tokens), reason) for tokens, reason, _ in found] == [(9, "length"), (4, "context")]


@pytest.mark.slow
def test_a_tpu_reads_pages_where_they_lie(four_tpu_chips):
    """Decoding compiled for four TPU chips: a kernel a layer, no copy of the cache, nothing gathered but logits."""
    placement = make_placement(MeshConfig(data=1, model=4), four_tpu_chips)
    config = llama.Config(vocab_size=4096, context=4096, width=1024, layers=2, heads=8, kv_heads=4, mlp=2048)
    handle = describe_model(functools.partial(llama.build, config, placement), placement)
    made = programs.Programs(handle, llama, config, 4096, [0], 16, reads_pages=True)

    def laid(shapes, shardings):
        give = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        return jax.tree.map(lambda x, sharding: give(x.shape, sharding=sharding), shapes, shardings)

    blocks = jax.eval_shape(made.stages.split, handle.abstract["stack"]["blocks"])
    shardings = made.stages.split_shardings(handle.shardings["stack"]["blocks"])
    weights = laid(handle.abstract, handle.shardings), laid(blocks, shardings)
    pool = jax.ShapeDtypeStruct((4, 2001, 16, 128), jnp.bfloat16, sharding=cache.pool_sharding(made.stages))
    layout = programs.layout_of(programs.row_arrays([], 8, 1, 256, 4096))
    text = made._compile("decode", weights, ([(pool, pool)] * 2, None), layout, {"steps": 8}).as_text()
    assert text.count("tpu_custom_call") == 2
    assert "bf16[1,2001,16,128]" in text and not re.search(r"bf16\[1,2001,16,128\]\S* copy\(", text)
    gathered = set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text))
    assert all(re.fullmatch(r"f32\[8,(1,)?4096\]", shape) for shape in gathered), gathered


def test_log_probabilities_are_the_models_own(made):
    engine, params = made
    prompt = ASKED[0][0]
    sampling = SamplingConfig(max_tokens=6, temperature=1.5, presence_penalty=1.0, logprobs=3)
    ((tokens, _, logprobs),) = engine.generate([prompt], sampling)
    assert len(logprobs) == len(tokens) > 2
    run, padded = logits_program(llama, LLAMA), np.zeros((1, LLAMA.context), np.int32)
    for index, (token, (own, top)) in enumerate(zip(tokens, logprobs, strict=True)):
        known = [*prompt, *tokens[:index]]
        padded[0, : len(known)] = known
        true = np.asarray(jax.nn.log_softmax(run(params, padded.copy(), len(known) - 1)))
        assert own == pytest.approx(true[token], abs=1e-4) and list(top) == np.argsort(-true)[:3].tolist()
        np.testing.assert_allclose(list(top.values()), np.sort(true)[:-4:-1], atol=1e-4)


def test_streams_that_are_left_give_their_pages_back(made):
    engine, _ = made
    stream = engine.stream([prompt for prompt, _ in ASKED[:5]], GREEDY)
    next(stream)
    stream.close()
    assert_empty(engine)
    assert engine.step() == []


def test_a_shared_prefix_is_computed_once(made):
    engine, params = made
    prompt = np.random.default_rng(5).integers(8, VOCAB, 41).tolist()
    first = engine.generate([prompt], GREEDY)
    before = engine.counts["prefilled_tokens"]
    again = engine.generate([prompt, prompt[:39]], GREEDY)
    assert again[0] == first[0] and engine.counts["prefilled_tokens"] == before + 3  # 40 and 36 of them lie in pages
    engine.load(params)
    assert engine.generate([prompt], GREEDY) == first and engine.counts["prefilled_tokens"] == before + 3 + 41


def test_learned_positions_up_to_the_last(made):
    engine, params = make(gpt, GPT)
    prompt = np.random.default_rng(1).integers(8, VOCAB, 90).tolist()
    sampling = dataclasses.replace(GREEDY, logit_bias={str(END): -1000.0})
    (found,) = engine.generate([prompt], sampling)
    assert found[:2] == reference(params, prompt, sampling, family=gpt, config=GPT) and found[1] == "context"


def test_angles_that_depend_on_the_length_do_not_depend_on_the_schedule():
    rope = RopeConfig(scaling="dynamic", original_context=24, factor=4.0)
    config = dataclasses.replace(LLAMA, rope=rope, window=None, global_layers=())
    whole, _ = make(
        config=config, settings=EngineConfig(rows=2, page_size=32, prefill_tokens=96, decode_steps=1, draft_tokens=0)
    )
    pieces, _ = make(config=config, settings=PAIR)
    asked = [prompt for prompt, _ in ASKED[:6]]
    expected = [whole.generate([prompt], GREEDY)[0] for prompt in asked]
    assert pieces.generate(asked, GREEDY) == expected
    assert pieces.generate(asked, GREEDY) == expected  # from pages


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=1, model=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, model=4), marks=pytest.mark.slow),
        MeshConfig(data=1, model=8),
    ],
    ids=str,
)
def test_tensor_parallel_draws_the_same(mesh, expected):
    devices = jax.devices()[: abs(mesh.data) * mesh.model]
    engine, _ = make(mesh=mesh, devices=devices, settings=PAIR)
    assert engine._pools[0][0].sharding.shard_shape(engine._pools[0][0].shape)[0] == 8 // mesh.model
    found = engine.generate(*zip(*ASKED[:7], strict=True))
    assert [row[:2] for row in found] == expected[:7]


@pytest.fixture(scope="module")
def four_layers():
    """Layers 1 and 3 see everything, 0 and 2 a window: the config, its parameters and what one device draws."""
    config = dataclasses.replace(LLAMA, layers=4, global_layers=(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "LEAST_SIZE", 1)
        whole, params = make(config=config, settings=PAIR)
        return config, params, whole.generate(*zip(*ASKED[:7], strict=True))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, pipeline=2),
        pytest.param(MeshConfig(data=1, pipeline=4), marks=pytest.mark.slow),  # the first layers of stages differ in kind
        MeshConfig(data=1, pipeline=2, model=2, pipeline_repeats=2),  # stages of layers 0, 2 and 1, 3: these differ, too
    ],
    ids=str,
)
def test_layers_over_devices_draw_the_same(mesh, four_layers, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST_SIZE", 1)  # as in a model that is not tiny
    config, params, expected = four_layers
    engine, laid = make(config=config, mesh=mesh, devices=jax.devices()[: mesh.pipeline * mesh.model], settings=PAIR)
    order = np.array(engine.handle.merge(laid).stack.order)
    blocks = jax.tree.map(lambda x: np.asarray(x)[order], params["stack"]["blocks"])
    params = params | {"stack": params["stack"] | {"blocks": blocks}}
    engine.load(jax.device_put(params, engine.handle.shardings))
    pool, weight = engine._pools[0][0], engine._weights[1][0]["down"]["weight"]
    assert len(engine._pools) == len(engine._weights[1]) == 4 // mesh.pipeline
    assert pool.sharding.shard_shape(pool.shape)[:2] == (1, 8 // mesh.model)
    assert weight.sharding.shard_shape(weight.shape) == (1, 48 // mesh.model, 32)
    assert engine.generate(*zip(*ASKED[:7], strict=True)) == expected
    assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [(gpt, GPT), (llama, dataclasses.replace(LLAMA, global_layers=(), experts=4, experts_per_token=2, expert_mlp=16, mlp=0))],
    ids=["gpt", "experts"],
)
def test_stages_of_other_forms_draw_the_same(family, config):
    asked = list(zip(*ASKED[:5], strict=True))
    expected = make(family, config, settings=PAIR)[0].generate(*asked)
    mesh = MeshConfig(data=1, pipeline=2)
    assert make(family, config, mesh, PAIR, jax.devices()[:2])[0].generate(*asked) == expected


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([], {}, "the prompt has 0 tokens; the model's context is 96"),
        ([1] * 97, {}, "the prompt has 97 tokens"),
        ([1, 60], {}, "the token 60; the vocabulary has 60"),
        ([1], {"logit_bias": {"60": 1.0}}, "there is no token 60"),
        ([1], {"logit_bias": {"x": 1.0}}, "'x' is not the number of a token"),
        ([1], {"top_p": 0.0}, "top_p=0.0 must be above 0.0"),
        ([1], {"logprobs": 21}, "logprobs=21 must be at most 20"),
        ([1], {"stop": ("",)}, "an empty text"),
    ],
)
def test_wrong_requests_are_refused(made, prompt, sampling, words):
    with pytest.raises(ConfigError, match=words):
        made[0].submit(prompt, config_lib.parse(SamplingConfig, sampling))
    assert_empty(made[0])


def test_weights_change_between_requests_only(made):
    engine, params = made
    identity = engine.submit([9, 10], GREEDY)
    with pytest.raises(ConfigError, match="1 requests still run"):
        engine.load(params)
    assert engine.cancel(identity) and not engine.cancel(identity)
    assert [(event.id, event.reason) for event in engine.step()] == [(identity, "cancelled")]
    with pytest.raises(ConfigError, match="prefill_tokens=8 is less than a page"):
        EngineConfig(prefill_tokens=8, page_size=16)
