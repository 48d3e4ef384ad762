"""A GPT whose MLPs are mixtures of experts, on text (Shazeer et al. 2017; Fedus et al. 2021; Dai et al. 2024).

The default trains 8 experts per block, 2 of them and one shared expert per token, on the source code of Python's standard
library, which every machine has:

    python -m llmos_jax.main --config=experiments/moe.py

Every expert is as wide as a third of the dense model's MLP, so a token costs what it costs in `experiments/gpt.py`, with
more parameters. Hardware: 2 CPU cores, at most 5 minutes. Expected: validation bits per byte below `gzip -9` of the same
bytes, and a busiest expert whose share of a row's tokens stays near what 8 experts give by chance (train/router_busiest_share).
Options (`--config=experiments/moe.py:size=8x124m,data=corpus.txt`):
    size       small (default), 8x124m (a Switch-like GPT-2), 64x1b (DeepSeekMoE's 16B shape: 64 small experts, 6 and 2 shared)
    data       what to train on: stdlib, a file or folder of text, jsonl(.gz, .zst) or parquet, tfds:NAME, a prepared folder
    capacity   0 (default): dropless; else each expert takes so many times its equal share of a row, the rest passes by
    smoke      a few steps of a tiny model: proves that everything works, in seconds
On many devices experts lie over their own axis: --config.mesh.expert=8.
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.errors import ConfigError

# width, layers, heads, context, batch (rows), learning rate, steps; experts, of them per token, shared, width of one.
SIZES = {
    "small": (128, 4, 4, 256, 16, 1e-2, 800, 8, 2, 1, 176),
    "8x124m": (768, 12, 12, 1024, 512, 6e-4, 20_000, 8, 2, 0, 3072),
    "64x1b": (2048, 28, 16, 4096, 1024, 4.2e-4, 100_000, 64, 6, 2, 1408),
}


def get_config(arg=""):
    """Returns the choices of this experiment; everything else has its default beside its owner."""
    options = parse_arg(arg, size="small", data="", capacity=0.0, smoke=False)
    size = options["size"]
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is unknown; known: {', '.join(SIZES)}.")
    width, layers, heads, context, batch_size, learning_rate, steps, experts, per_token, shared, expert_mlp = SIZES[size]

    config = ConfigDict()
    config.name = "moe"
    config.model = dict(
        name="gpt",
        width=width,
        layers=layers,
        heads=heads,
        context=context,
        experts=experts,
        experts_per_token=per_token,
        shared_experts=shared,
        expert_mlp=expert_mlp,
        router_balance=0.01,
        router_z_loss=0.001,
    )
    config.model.expert_capacity = options["capacity"] or None
    source = options["data"] or ("stdlib:asyncio" if options["smoke"] else "stdlib")
    config.data = dict(sources=[dict(path=source)], tokenizer="bpe:4096", length=context)
    config.task = dict(name="language", prompts=("def", "import") if source.startswith("stdlib") else ("",))
    config.optim = dict(learning_rate=learning_rate)
    config.train = dict(batch_size=batch_size, steps=steps, log_every_steps=10, evaluate_every_steps=200)
    config.checkpoint = dict(every_steps=250)
    if size == "small":
        # As in experiments/gpt.py, which says why.
        config.optim.name = "muon"
        config.train.update(max_seconds=240.0, sample_every_steps=200)
        config.data.validation_fraction = 0.02
    else:
        config.data.tokenizer = "bpe:50257"
        config.mesh = dict(parameters="fsdp")
        config.model.remat = "full"
        config.task.evaluation_batches = 8  # some millions of tokens
        config.train.update(evaluate_every_steps=1000, log_every_steps=20)
        config.checkpoint = dict(every_seconds=1800.0)
    if options["smoke"]:
        config.model.update(
            width=32, layers=2, heads=2, context=64, remat="none", experts=4, experts_per_token=2, expert_mlp=32
        )
        config.data.update(length=64, tokenizer="byte", validation_fraction=0.1)
        config.train.update(batch_size=8, steps=12, max_seconds=None, log_every_steps=4, evaluate_every_steps=8)
        config.train.sample_every_steps = None
        config.task = dict(name="language", prompts=("def", "import"), evaluation_batches=4, sample_tokens=16)
        config.checkpoint = dict(every_steps=8)
    return config
