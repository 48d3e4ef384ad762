"""Measures the inference engine, in turn with transformers on the same weights.

    python scripts/benchmark_inference.py --transformers /tmp/reference/bin/python     # `scripts/reference_models.py` makes one
    python scripts/benchmark_inference.py                                              # the engine alone
    python scripts/benchmark_inference.py --model=1b --device=cuda --transformers python3 --only=compare     # on a GPU

Models with random weights: 33m, a float32 Llama of 33.6 million parameters (hidden 512, 8 layers, 8 heads of queries, 4 of
keys, MLP 1536, vocabulary 8192), and 1b, the shape of Llama 3.2 1B with 32,768 tokens, in bfloat16. Prompts of 512 tokens, 128
greedy tokens. One JSON line per measurement, medians of `--repeats`. Decoding is the time of 128 tokens less that of the first
one. With random weights a greedy text soon repeats itself, which flatters drafts: they are measured on their own, and every
ratio to transformers is taken without them.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

MODELS = {
    "33m": dict(vocab_size=8192, context=1024, width=512, layers=8, heads=8, kv_heads=4, mlp=1536, dtype="float32"),
    "1b": dict(vocab_size=32768, context=1024, width=2048, layers=16, heads=32, kv_heads=8, mlp=8192, dtype="bfloat16"),
}
PROMPT, NEW = 512, 128


def make_model(name="33m"):
    """Returns (handle, params, config) of a benchmark's model on one device."""
    import functools

    from llmos_jax.compute import host

    host.keep_heap()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.models import llama
    from llmos_jax.train.state import describe_model

    config = llama.Config(**MODELS[name])
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(llama.build, config, placement), placement)
    params = jax.jit(handle.init)(jax.random.key(0))
    return handle, jax.tree.map(lambda x: (3 * x if x.ndim > 1 else x).astype(config.dtype), params), config


def make_engine(model, **choices):
    """Returns an Engine for the model; none of its tokens ends a row."""
    from llmos_jax.models import llama
    from llmos_jax.serve.engine import Engine, EngineConfig

    handle, params, config = model
    settings = EngineConfig(cache_bytes=2**30, **choices)
    return Engine(handle, llama, config, params, vocab_size=config.vocab_size, settings=settings)


def prompts(rows, length, seed=0):
    """Returns rows of random tokens, which every model knows."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, MODELS["33m"]["vocab_size"], (rows, length)).tolist()


def seconds(run):
    """Returns (seconds, result) of a call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


class Ours:
    """The engine, with nothing left in its pages from the call before."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, rows, new_tokens):
        """Returns (seconds, tokens of every row)."""
        from llmos_jax.serve.sample import SamplingConfig

        self.engine.pool.forget()
        sampling = SamplingConfig(max_tokens=new_tokens, temperature=0.0)
        taken, found = seconds(lambda: self.engine.generate(rows, sampling))
        return taken, [list(tokens) for tokens, _, _ in found]


class Theirs:
    """transformers in a process of its own, which waits while we run."""

    def __init__(self, python, folder, device):
        command = [python, __file__, "--worker", str(folder), "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def generate(self, rows, new_tokens):
        """Returns (seconds, tokens of every row)."""
        self.process.stdin.write(json.dumps({"rows": rows, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"transformers ended with {self.process.wait()}; its message stands above.")
        answer = json.loads(line)
        return answer["seconds"], answer["tokens"]

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def worker(folder, device):
    """Answers generation requests, one JSON line each, with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    choices = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    for line in sys.stdin:
        asked = json.loads(line)
        rows = torch.tensor(asked["rows"], device=device)
        count = dict(max_new_tokens=asked["new_tokens"], min_new_tokens=asked["new_tokens"])
        with torch.inference_mode():
            taken, found = seconds(lambda rows=rows, count=count: model.generate(rows, **count, **choices))
        print(json.dumps({"seconds": taken, "tokens": found[:, rows.shape[1] :].tolist()}), flush=True)


def compare(contestants, batch, repeats):
    """Prints prefill and decoding speed of each contestant, taking turns."""
    rows, first, decoded, tokens = prompts(batch, PROMPT), {}, {}, {}
    for name, contestant in contestants.items():
        contestant.generate(rows, 2)  # compiled, warm
        contestant.generate(rows, NEW)
        first[name], decoded[name] = [], []
    for _ in range(repeats):
        for name, contestant in contestants.items():
            first[name].append(contestant.generate(rows, 1)[0])
            taken, tokens[name] = contestant.generate(rows, NEW)
            decoded[name].append(taken)
    report = {"batch": batch}
    for name in contestants:
        prefill, whole = statistics.median(first[name]), statistics.median(decoded[name])
        report[name] = {"prefill_ms": 1e3 * prefill, "decode_tokens_per_second": batch * (NEW - 1) / (whole - prefill)}
    if "transformers" in report:
        report["prefill_ratio"] = report["transformers"]["prefill_ms"] / report["engine"]["prefill_ms"]
        ours, theirs = (report[name]["decode_tokens_per_second"] for name in ("engine", "transformers"))
        report["decode_ratio"] = ours / theirs
        report["rows_with_equal_tokens"] = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    print(json.dumps(report), flush=True)


def measure_batching(model, repeats):
    """Prints the throughput of 32 requests of mixed lengths together and one after another."""
    from llmos_jax.serve.sample import SamplingConfig

    engine = make_engine(model, rows=32, draft_tokens=0)
    lengths = [(37 * index) % 368 + 32 for index in range(32)]
    rows = [prompts(1, length, seed=index)[0] for index, length in enumerate(lengths)]
    samplings = [SamplingConfig(max_tokens=(29 * index) % 112 + 16, temperature=0.0) for index in range(32)]
    engine.warm_up()
    total, figures = sum(sampling.max_tokens for sampling in samplings), {"together": [], "one_by_one": []}
    for _ in range(repeats):
        engine.pool.forget()
        figures["together"].append(seconds(lambda: engine.generate(rows, samplings))[0])
        engine.pool.forget()
        figures["one_by_one"].append(
            seconds(lambda: [engine.generate([row], [s]) for row, s in zip(rows, samplings, strict=True)])[0]
        )
    together, alone = (total / statistics.median(times) for times in figures.values())
    print(
        json.dumps(
            {
                "requests": 32,
                "tokens_per_second": together,
                "one_by_one": alone,
                "batching_ratio": together / alone,
                "programs": engine.programs.count,
            }
        ),
        flush=True,
    )


def measure_reuse(model, repeats):
    """Prints the time to the first token with and without a shared prefix of 400 tokens in the cache."""
    engine = make_engine(model, draft_tokens=0)
    ours, prefix = Ours(engine), prompts(1, 400, seed=99)[0]
    figures = {"cold": [], "warm": []}
    from llmos_jax.serve.sample import SamplingConfig

    one = SamplingConfig(max_tokens=1, temperature=0.0)
    for number in range(repeats + 1):
        ends = [prompts(1, 16, seed=1000 + 2 * number + which)[0] for which in (0, 1)]
        cold = ours.generate([prefix + ends[0]], 1)[0]
        warm = seconds(lambda ends=ends: engine.generate([prefix + ends[1]], one))[0]
        if number:  # the first compiles
            figures["cold"].append(cold)
            figures["warm"].append(warm)
    cold, warm = (1e3 * statistics.median(times) for times in figures.values())
    print(json.dumps({"first_token_ms": cold, "with_prefix_ms": warm, "reuse_ratio": cold / warm}), flush=True)


def measure_drafts(model, repeats):
    """Prints decoding speed with drafts, on greedy text of this model (which repeats itself), and the share accepted."""
    engine = make_engine(model)
    ours, rows = Ours(engine), prompts(1, PROMPT)
    ours.generate(rows, NEW)
    figures = [(ours.generate(rows, NEW)[0], ours.generate(rows, 1)[0]) for _ in range(repeats)]
    taken = statistics.median(whole - first for whole, first in figures)
    accepted = engine.counts["accepted_tokens"] / max(engine.counts["drafted_tokens"], 1)
    print(json.dumps({"drafts": True, "decode_tokens_per_second": (NEW - 1) / taken, "accepted_share": accepted}), flush=True)


def start():
    """Prints the seconds until all programs of an engine are compiled, by the compile cache in LLMOS_CACHE."""
    from llmos_jax import api
    from llmos_jax.train.settings import TrainConfig

    api.prepare_platform(TrainConfig())
    taken, programs = seconds(make_engine(make_model(), rows=4).warm_up)
    print(json.dumps({"seconds": taken, "programs": programs}), flush=True)


def measure_start(model, repeats):
    """Prints the time of `Engine.warm_up` in a fresh process with an empty compile cache, and with what that left."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--start"]
        cold, warm = (
            json.loads(subprocess.run(command, env=os.environ | {"LLMOS_CACHE": cache}, capture_output=True, check=True).stdout)
            for _ in range(2)
        )
    figures = {"programs": cold["programs"], "cold_start_s": cold["seconds"], "warm_start_s": warm["seconds"]}
    print(json.dumps(figures | {"warm_share": warm["seconds"] / cold["seconds"]}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", metavar="PYTHON", help="an interpreter with torch and transformers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("compare", "batching", "reuse", "drafts", "start"))
    parser.add_argument("--model", choices=MODELS, default="33m")
    parser.add_argument("--device", default="cpu", help="where transformers computes: cpu or cuda (the engine: $JAX_PLATFORMS)")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.worker:
        return worker(values.worker, values.device)
    if values.start:
        return start()
    model = make_model(values.model)
    parts = {"batching": measure_batching, "reuse": measure_reuse, "drafts": measure_drafts, "start": measure_start}
    if values.only in (None, "compare"):
        contestants = {"engine": Ours(make_engine(model, draft_tokens=0))}
        with tempfile.TemporaryDirectory() as scratch:
            if values.transformers:
                from llmos_jax.interop.huggingface import save_checkpoint

                folder = pathlib.Path(scratch) / "model"
                save_checkpoint(model[1], model[2], folder, dtype=model[2].dtype)
                contestants["transformers"] = Theirs(values.transformers, folder, values.device)
            for batch in (1, 8):
                compare(contestants, batch, values.repeats)
            if values.transformers:
                contestants["transformers"].close()
    for name, measure in parts.items():
        if values.only in (None, name):
            measure(model, values.repeats)


if __name__ == "__main__":
    main()
