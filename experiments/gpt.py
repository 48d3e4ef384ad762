"""GPT-2 and GPT-3 architectures on text (Radford et al. 2019; Brown et al. 2020).

The default trains a 1.4 M parameter model on the source code of Python's standard library, which every machine has:

    python -m llmos_jax.main --config=experiments/gpt.py

Hardware: 2 CPU cores, at most 5 minutes. Expected: validation bits per byte well below `gzip -9` of the same bytes.
Options (`--config=experiments/gpt.py:size=124m,data=corpus.txt`):
    size       small (default), nano (nanoGPT's CPU setting), 124m, 355m, 774m, 1.5b, 6.7b, 13b, 175b
    data       what to train on: stdlib, a file or folder of text, jsonl(.gz, .zst) or parquet, tfds:NAME, a prepared
               folder; several with weights as PATH@3+PATH@1
    tokenizer  byte, bpe:SIZE, or a tokenizer.json
    smoke      a few steps of a tiny model: proves that everything works, in seconds
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.data.sources import parse_sources
from llmos_jax.errors import ConfigError

# width, layers, heads, context, batch (rows), learning rate, steps. GPT-2: its paper, table 2. GPT-3: its table 2.1
# (batch in tokens / context; 300 B tokens).
SIZES = {
    "small": (128, 4, 4, 256, 16, 1e-2, 800),
    "nano": (128, 4, 4, 64, 12, 1e-3, 2000),
    "124m": (768, 12, 12, 1024, 512, 6e-4, 20_000),
    "355m": (1024, 24, 16, 1024, 512, 3e-4, 60_000),
    "774m": (1280, 36, 20, 1024, 512, 2.5e-4, 100_000),
    "1.5b": (1600, 48, 25, 1024, 512, 2e-4, 200_000),
    "6.7b": (4096, 32, 32, 2048, 1024, 1.2e-4, 143_000),
    "13b": (5120, 40, 40, 2048, 1024, 1e-4, 143_000),
    "175b": (12288, 96, 96, 2048, 1536, 6e-5, 95_000),
}


def get_config(arg=""):
    """Returns the choices of this experiment; everything else has its default beside its owner."""
    options = parse_arg(arg, size="small", data="", tokenizer="", smoke=False)
    size = options["size"]
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is unknown; known: {', '.join(SIZES)}.")
    width, layers, heads, context, batch_size, learning_rate, steps = SIZES[size]
    is_large = size not in ("small", "nano")

    config = ConfigDict()
    config.name = "gpt"
    config.model = dict(name="gpt", width=width, layers=layers, heads=heads, context=context)
    sources = parse_sources(options["data"] or ("stdlib:asyncio" if options["smoke"] else "stdlib"))
    config.data = dict(sources=sources, tokenizer=options["tokenizer"], length=context)
    config.task = dict(name="language")
    if sources[0]["path"].startswith("stdlib"):
        config.task.prompts = ("def", "import")
    config.optim = dict(learning_rate=learning_rate)
    config.train = dict(batch_size=batch_size, steps=steps, log_every_steps=10, evaluate_every_steps=250)
    config.checkpoint = dict(every_steps=250)
    config.data.tokenizer = options["tokenizer"] or ("bpe:50257" if is_large else "bpe:4096")
    if size == "small":
        # Minutes are what a first run has: few parameters, and Muon, which learns faster per token than AdamW.
        config.optim.name = "muon"
        config.train.update(max_seconds=240.0, evaluate_every_steps=200, sample_every_steps=200)
        config.data.validation_fraction = 0.02  # of 30 MB; a tenth would take longer to evaluate than to learn from
    if size == "nano":
        # https://github.com/karpathy/nanoGPT, section "I only have a macbook": its CPU command and learning rates.
        # Muon in place of its AdamW: 1.78 against 1.94 nats a byte on 1.1 MB of English, all else equal.
        config.optim.update(name="muon", warmup=0.05, beta2=0.99)
    if is_large:
        config.mesh = dict(parameters="fsdp")
        config.model.remat = "full" if size in ("6.7b", "13b", "175b") else "projections"
        config.train.update(evaluate_every_steps=1000, log_every_steps=20)
        config.task.evaluation_batches = 8  # some millions of tokens
        config.checkpoint = dict(every_seconds=1800.0)
    if options["smoke"]:
        config.model.update(width=32, layers=2, heads=2, context=64, remat="none")
        config.data.update(length=64)
        config.train.update(batch_size=8, steps=12, max_seconds=None, log_every_steps=4, evaluate_every_steps=8)
        config.train.sample_every_steps = None
        config.data.validation_fraction = 0.1
        config.task = dict(name="language", prompts=("def", "import"), evaluation_batches=4, sample_tokens=16)
        config.checkpoint = dict(every_steps=8)
        config.data.tokenizer = options["tokenizer"] or "byte"
    return config
