"""Llama architectures on text (Touvron et al. 2023; Dubey et al. 2024).

The default trains a 1.4 M parameter model on the source code of Python's standard library, which every machine has:

    python -m llmos_jax.main --config=experiments/llama.py

Hardware: 2 CPU cores, at most 5 minutes. Expected: validation bits per byte well below `gzip -9` of the same bytes.
Options (`--config=experiments/llama.py:size=8b,data=corpus.txt`):
    size       small (default), 7b and 70b-2 (Llama 2), 8b and 70b (Llama 3.1)
    data       what to train on: stdlib, a file or folder of text, jsonl(.gz, .zst) or parquet, tfds:NAME, a prepared
               folder; several with weights as PATH@3+PATH@1
    tokenizer  byte, bpe:SIZE, or a tokenizer.json
    smoke      a few steps of a tiny model: proves that everything works, in seconds
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.data.sources import parse_sources
from llmos_jax.errors import ConfigError

# width, layers, heads, key-value heads, MLP, context, vocabulary, batch (rows), learning rate, steps.
# Llama 2: its paper, tables 1 and section 2.2 (4 M tokens a batch, 2 T in all). Llama 3.1: its paper, table 3; batch and
# steps are Llama 2's, which fits the smaller models better than the 16 M tokens given for the largest.
SIZES = {
    "small": (128, 4, 4, 2, 384, 256, 4096, 16, 1e-2, 800),
    "7b": (4096, 32, 32, 32, 11008, 4096, 32_000, 1024, 3e-4, 480_000),
    "70b-2": (8192, 80, 64, 8, 28672, 4096, 32_000, 1024, 1.5e-4, 480_000),
    "8b": (4096, 32, 32, 8, 14336, 8192, 128_256, 512, 3e-4, 480_000),
    "70b": (8192, 80, 64, 8, 28672, 8192, 128_256, 512, 1.5e-4, 480_000),
}


def get_config(arg=""):
    """Returns the choices of this experiment; everything else has its default beside its owner."""
    options = parse_arg(arg, size="small", data="", tokenizer="", smoke=False)
    size = options["size"]
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is unknown; known: {', '.join(SIZES)}.")
    width, layers, heads, kv_heads, mlp, context, vocab, batch_size, learning_rate, steps = SIZES[size]

    config = ConfigDict()
    config.name = "llama"
    shape = dict(width=width, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp, context=context)
    config.model = dict(name="llama", **shape)
    sources = parse_sources(options["data"] or ("stdlib:asyncio" if options["smoke"] else "stdlib"))
    config.data = dict(sources=sources, tokenizer=options["tokenizer"] or f"bpe:{vocab}", length=context)
    config.task = dict(name="language")
    if sources[0]["path"].startswith("stdlib"):
        config.task.prompts = ("def", "import")
    config.optim = dict(learning_rate=learning_rate)
    config.train = dict(batch_size=batch_size, steps=steps, log_every_steps=20, evaluate_every_steps=1000)
    config.checkpoint = dict(every_seconds=1800.0)
    if size == "small":  # as in gpt.py: minutes are what a first run has
        config.optim.name = "muon"
        config.train.update(max_seconds=240.0, log_every_steps=10, evaluate_every_steps=200, sample_every_steps=200)
        config.checkpoint = dict(every_steps=250)
        config.data.validation_fraction = 0.02
    else:
        config.model.remat = "full" if width > 4096 else "projections"
        config.mesh = dict(parameters="fsdp")
        config.task.evaluation_batches = 8  # some tens of millions of tokens
    if size in ("8b", "70b"):
        scaling = dict(scaling="llama3", factor=8.0, low_factor=1.0, high_factor=4.0, original_context=8192)
        config.model.rope = dict(base=500_000.0, **scaling)
    if options["smoke"]:
        config.model.update(width=32, layers=2, heads=4, kv_heads=2, mlp=96, context=64, remat="none")
        config.data.update(length=64, validation_fraction=0.1, tokenizer=options["tokenizer"] or "byte")
        config.train.update(batch_size=8, steps=12, max_seconds=None, log_every_steps=4, evaluate_every_steps=8)
        config.train.sample_every_steps = None
        config.task = dict(name="language", prompts=("def", "import"), evaluation_batches=4, sample_tokens=16)
        config.checkpoint = dict(every_steps=8)
    return config
