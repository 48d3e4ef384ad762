"""Records what transformers computes for tiny models of every family, for `tests/interop`; checks what we export.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors
    /tmp/reference/bin/python scripts/reference_models.py write            # tests/interop/reference/*.json anew
    /tmp/reference/bin/python scripts/reference_models.py beams            # tests/serve/beams.json
    /tmp/reference/bin/python scripts/reference_models.py check FOLDER     # every folder in it, as tests/interop leaves them

An environment of its own, because PyTorch is not needed for anything else. The weights are not recorded: tests make them
again from their names (`weights`, also used here), large enough that any mistake shows (default initialisation hides most).
transformers writes the names, shapes and config; logits and greedy tokens are computed from a file with these weights.
"""

import base64
import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent.parent / "tests" / "interop" / "reference"
LENGTHS = (5, 11, 8)  # rows of one batch, padded on the right for logits and on the left to be continued
NEW_TOKENS = 20
SMALL = dict(vocab_size=96, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4)
GROUPED = SMALL | dict(num_key_value_heads=2, max_position_embeddings=64)
GEMMA = GROUPED | dict(head_dim=8, num_hidden_layers=3)
ROPE = dict(rope_theta=1000.0)


def scaled(kind, **values):
    """Rotary positions with a scaling whose original context is shorter than the rows."""
    return dict(rope_parameters=ROPE | dict(rope_type=kind) | values)


# name: (config class, settings of it, dtype of the file, bytes of a file of it)
MODELS = {
    "gpt2": ("GPT2Config", dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4), "float32", None),
    "gpt2-untied": (
        "GPT2Config",
        dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=2, n_inner=56, tie_word_embeddings=False),
        "float32",
        None,
    ),
    "llama": ("LlamaConfig", GROUPED, "float32", None),
    "llama-tied-sharded": ("LlamaConfig", GROUPED | dict(tie_word_embeddings=True, head_dim=12), "float32", 20_000),
    "llama-bf16": ("LlamaConfig", GROUPED | dict(attention_bias=True, mlp_bias=True), "bfloat16", None),
    "llama-f16": ("LlamaConfig", GROUPED | dict(num_key_value_heads=4), "float16", None),
    "llama-linear": ("LlamaConfig", GROUPED | scaled("linear", factor=4.0), "float32", None),
    "llama-dynamic": (
        "LlamaConfig",
        GROUPED | dict(max_position_embeddings=8) | scaled("dynamic", factor=2.0),
        "float32",
        None,
    ),
    "llama-yarn": (
        "LlamaConfig",
        GROUPED | dict(head_dim=16) | scaled("yarn", factor=4.0, original_max_position_embeddings=16),
        "float32",
        None,
    ),
    "llama-longrope": (
        "LlamaConfig",
        GROUPED
        | scaled("longrope", short_factor=[1.0, 1.1, 1.5, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0], factor=8.0)
        | dict(max_position_embeddings=64),
        "float32",
        None,
    ),
    "llama-llama3": (
        "LlamaConfig",
        GROUPED | scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        "float32",
        None,
    ),
    "mistral": ("MistralConfig", GROUPED | dict(sliding_window=4), "float32", None),
    "mistral-global": ("MistralConfig", GROUPED | dict(sliding_window=None, head_dim=10), "bfloat16", 30_000),
    "qwen2": ("Qwen2Config", GROUPED, "float32", None),
    "qwen2-window": (
        "Qwen2Config",
        GROUPED | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        "float32",
        None,
    ),
    "qwen3": ("Qwen3Config", GROUPED | dict(head_dim=16, tie_word_embeddings=True), "float32", None),
    "gemma": ("GemmaConfig", GEMMA | dict(num_key_value_heads=1), "float32", None),
    "gemma2": ("Gemma2Config", GEMMA | dict(sliding_window=4, query_pre_attn_scalar=24), "float32", None),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | dict(sliding_window=4, num_hidden_layers=7, query_pre_attn_scalar=24),
        "float32",
        None,
    ),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        GEMMA
        | dict(sliding_window=3, layer_types=["full_attention", "sliding_attention", "sliding_attention"])
        | dict(
            rope_parameters={
                "full_attention": dict(rope_theta=5000.0, rope_type="linear", factor=8.0),
                "sliding_attention": dict(rope_theta=100.0, rope_type="default"),
            }
        ),
        "bfloat16",
        None,
    ),
    "phi3": ("Phi3Config", GROUPED | dict(sliding_window=6, pad_token_id=0, eos_token_id=1), "float32", None),
    "phi3-longrope": (
        "Phi3Config",
        GROUPED
        | dict(pad_token_id=0, eos_token_id=1, original_max_position_embeddings=4, tie_word_embeddings=True)
        | dict(
            rope_parameters=dict(rope_type="longrope", rope_theta=1000.0, partial_rotary_factor=0.75)
            | dict(short_factor=[1.0, 1.2, 1.5], long_factor=[1.0, 3.0, 9.0])
        ),
        "float32",
        None,
    ),
    "mixtral": ("MixtralConfig", GROUPED | dict(num_local_experts=4, intermediate_size=24), "float32", None),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        GROUPED | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=8, norm_topk_prob=True),
        "float32",
        40_000,
    ),
    "qwen3-moe-plain": (
        "Qwen3MoeConfig",
        GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False, head_dim=8),
        "bfloat16",
        None,
    ),
}
# What is recorded of beam search: an end token that this model likes.
BEAMS = {"model": "llama", "beams": 4, "max_tokens": 10, "end": 5}
BEAMS_FILE = pathlib.Path(__file__).parent.parent / "tests/serve/beams.json"
# Rows in which the row's longest position decides (dynamic, longrope) are compared alone: transformers lets the longest of
# the batch decide, and these models let each row.
BY_LENGTH = ("llama-dynamic", "llama-longrope", "phi3-longrope")


def weights(name, shape):
    """Returns the values of a tensor, float32, from its name: NumPy's frozen generator, so the same for ever."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape)
    if len(shape) == 1:
        return (0.2 * values + (0 if name.endswith("bias") else 1)).astype(np.float32)
    return (values * (0.3 if "emb" in name or "wte" in name or "wpe" in name else 2.0 / shape[-1] ** 0.5)).astype(np.float32)


def tokens():
    """Returns the rows of the batch."""
    random = np.random.RandomState(0)
    return [random.randint(2, 96, length).tolist() for length in LENGTHS]


def write():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (_, _, dtype, _) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            files = save(name, folder)
            index = folder / "model.safetensors.index.json"
            record = {
                "config": json.loads((folder / "config.json").read_text()),
                "dtype": dtype,
                "files": files,
                "index": json.loads(index.read_text()) if index.exists() else None,
                **computed(folder, name in BY_LENGTH),
            }
        (FOLDER / f"{name}.json").write_text(json.dumps(record, sort_keys=True) + "\n")
        print(name, record["tokens"][0][:6])


def save(name, folder):
    """Writes a model as transformers does, with the values of `weights`; returns {file: {tensor: shape}}."""
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import save_file

    kind, settings, dtype, shard_bytes = MODELS[name]
    config = getattr(transformers, kind)(**settings, use_cache=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes = {key: list(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        files[file.name] = shapes
        content = {key: torch.tensor(weights(key, shape)).to(getattr(torch, dtype)) for key, shape in shapes.items()}
        save_file(content, file, metadata={"format": "pt"})
    return files


def write_beams():
    """Records what transformers' beam search finds with the model that `BEAMS` names."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(BEAMS["model"], pathlib.Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    cases = []
    for prompt in tokens():
        for penalty in (0.0, 1.0, -1.0):
            done = model.eval().generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                num_beams=BEAMS["beams"],
                num_return_sequences=BEAMS["beams"],
                max_new_tokens=BEAMS["max_tokens"],
                length_penalty=penalty,
                early_stopping="never",
                do_sample=False,
                eos_token_id=BEAMS["end"],
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            rows = [row[len(prompt) :].tolist() for row in done.sequences]
            rows = [row[: row.index(BEAMS["end"])] if BEAMS["end"] in row else row for row in rows]
            scores = done.sequences_scores.tolist()
            cases.append({"prompt": prompt, "length_penalty": penalty, "tokens": rows, "scores": scores})
            print(penalty, rows[0], scores[0])
    BEAMS_FILE.write_text(json.dumps(BEAMS | {"cases": cases}, sort_keys=True) + "\n")


def computed(folder, is_alone):
    """Returns the logits of every real position and the greedy tokens of each row, from a folder's float32 model."""
    import torch
    import transformers

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()

    rows, logits, drawn = tokens(), [], []
    groups = [[row] for row in rows] if is_alone else [rows]
    with torch.no_grad():
        for group in groups:
            width = max(map(len, group))
            right, left = (torch.zeros((len(group), width), dtype=torch.long) for _ in range(2))
            right_mask, left_mask = torch.zeros_like(right), torch.zeros_like(right)
            for index, row in enumerate(group):
                right[index, : len(row)] = left[index, width - len(row) :] = torch.tensor(row)
                right_mask[index, : len(row)] = left_mask[index, width - len(row) :] = 1
            found = load()(right, attention_mask=right_mask).logits
            logits += [found[index, : len(row)].numpy() for index, row in enumerate(group)]
            done = load().generate(
                left,
                attention_mask=left_mask,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            drawn += done[:, width:].tolist()
    flat = np.concatenate([part.astype("<f4") for part in logits])
    return {"logits": base64.b64encode(flat.tobytes()).decode(), "tokens": drawn}


def check(folder):
    """Raises when a model that tests exported loads otherwise, or computes otherwise, than what was recorded."""
    for path in sorted(pathlib.Path(folder).iterdir()):
        record = json.loads((FOLDER / f"{path.name}.json").read_text())
        found = computed(path, path.name in BY_LENGTH)
        assert found["logits"] == record["logits"], f"{path.name}: other logits"
        assert found["tokens"] == record["tokens"], f"{path.name}: other tokens"
        print(path.name, "loads, with identical logits and tokens")


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:] == ["beams"]:
        write_beams()
    elif sys.argv[1:2] == ["check"] and len(sys.argv) == 3:
        check(sys.argv[2])
    else:
        sys.exit(__doc__)
