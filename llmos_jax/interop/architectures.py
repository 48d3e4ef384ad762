"""The table of Hugging Face architectures: what each calls a setting, what it fixes, and what it calls otherwise.

`model_config.py` reads and writes `config.json` by it, `huggingface.py` the tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# All the same function.
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of transformers as settings of one of our models.

    name, model_type: as `config.json` has them. unit: our model's module. keys: {its key: our setting, or several}. defaults:
    {its key: value} where the file leaves it out. aliases: {its key: the one that some releases write}. constants: our
    settings that it implies. allowed: {its key: values that are computed here}; another one is refused. windows: how the
    layers with a window are told (`model_config.WINDOWS`). pattern: every so many layers one has none. ropes: "one", "by
    kind" of layer, "partial" (of a share of a head's features, plain or longrope), or None. names: entries of `HF_NAMES`
    that are other here. ignored: endings of tensors that hold no parameter. prefix: of tensors' names, which files of the bare
    model leave out.
    """

    name: str
    model_type: str
    unit: str = "llama"
    keys: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    windows: str = "none"
    pattern: int = 0
    ropes: str | None = "one"
    names: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model."


_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "is_tied",
}
_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_SILU = {"hidden_act": ("silu", "swish")}
_BLOCK = "stack/blocks/"
_LAYER = "model.layers.{n}."
_ATTENTION_BIAS = {"attention_bias": ("has_qkv_bias", "has_output_bias")}
_QWEN_MOE = {"num_experts": "experts", "num_experts_per_tok": "experts_per_token", "moe_intermediate_size": "expert_mlp"}
_GEMMA = dict(is_norm_centered=True, is_embedding_scaled=True, activation="gelu")
_GEMMA_DEFAULTS = _DEFAULTS | {"tie_word_embeddings": True, "head_dim": 256, "attention_bias": False}
_GEMMA_2_KEYS = {
    "query_pre_attn_scalar": "query_scale",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logits_softcap",
}
_GEMMA_2_NAMES = {
    f"{_BLOCK}attention_post_norm/scale": {f"{_LAYER}post_attention_layernorm.weight": "D -> D"},
    f"{_BLOCK}mlp_norm/scale": {f"{_LAYER}pre_feedforward_layernorm.weight": "D -> D"},
    f"{_BLOCK}mlp_post_norm/scale": {f"{_LAYER}post_feedforward_layernorm.weight": "D -> D"},
}
_GEMMA_ALLOWED = {"use_bidirectional_attention": (None, False)}
_PHI_3_NAMES = {
    f"{_BLOCK}attention/query/weight": {f"{_LAYER}self_attn.qkv_proj.weight": "*HK|GK|GK,D -> DHK"},
    f"{_BLOCK}attention/key_value/weight": {
        f"{_LAYER}self_attn.qkv_proj.weight": "HK|*2GK,D -> DG2K",
    },
    f"{_BLOCK}gate_up/weight": {f"{_LAYER}mlp.gate_up_proj.weight": "2F,D -> D2F"},
}
_MIXTRAL_EXPERT = _LAYER + "block_sparse_moe.experts.{e}."
_MIXTRAL_NAMES = {
    f"{_BLOCK}experts/router": {f"{_LAYER}block_sparse_moe.gate.weight": "E,D -> DE"},
    f"{_BLOCK}experts/gate": {f"{_MIXTRAL_EXPERT}w1.weight": "F,D -> DF"},
    f"{_BLOCK}experts/up": {f"{_MIXTRAL_EXPERT}w3.weight": "F,D -> DF"},
    f"{_BLOCK}experts/down": {f"{_MIXTRAL_EXPERT}w2.weight": "D,F -> FD"},
}

# In the order in which one is sought for a model of ours: the plainest that can say it.
ARCHITECTURES = (
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        unit="gpt",
        keys={
            "vocab_size": "vocab_size",
            "n_embd": "width",
            "n_layer": "layers",
            "n_head": "heads",
            "n_positions": "context",
            "n_inner": "mlp",
            "layer_norm_epsilon": "norm_epsilon",
            "tie_word_embeddings": "is_tied",
        },
        defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        allowed={
            "activation_function": _TANH_GELU[::-1],  # written as its own files have it
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        ropes=None,
        ignored=(".attn.bias", ".attn.masked_bias"),
        prefix="transformer.",
    ),
    Architecture(
        "LlamaForCausalLM",
        "llama",
        keys=_KEYS | _ATTENTION_BIAS | {"mlp_bias": "has_mlp_bias"},
        defaults=_DEFAULTS | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
        allowed=_SILU,
    ),
    Architecture(
        "MistralForCausalLM",
        "mistral",
        keys=_KEYS,
        defaults=_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        allowed=_SILU,
        windows="all",
    ),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        keys=_KEYS,
        defaults=_DEFAULTS | {"num_key_value_heads": 32},
        constants={"has_qkv_bias": True},
        allowed=_SILU,
        windows="switched by kind",
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        keys=_KEYS | _ATTENTION_BIAS,
        defaults=_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
        constants={"is_qk_normed": True},
        allowed=_SILU,
        windows="switched by kind",
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        keys=_KEYS | {"num_local_experts": "experts", "num_experts_per_tok": "experts_per_token"},
        defaults=_DEFAULTS
        | {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
        | {"rope_theta": 1e6},
        allowed=_SILU,
        windows="all",
        names=_MIXTRAL_NAMES,
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        keys=_KEYS | _ATTENTION_BIAS | _QWEN_MOE | {"norm_topk_prob": "is_router_normalised"},
        defaults=_DEFAULTS | {"num_key_value_heads": 4, "attention_bias": False, "norm_topk_prob": False},
        aliases={"num_experts": "num_local_experts"},
        constants={"is_qk_normed": True},
        allowed=_SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
        windows="switched",
    ),
    Architecture(
        "Phi3ForCausalLM",
        "phi3",
        keys={key: ours for key, ours in _KEYS.items() if key != "head_dim"},
        defaults=_DEFAULTS | {"rms_norm_eps": 1e-5},
        allowed=_SILU,
        windows="all",
        ropes="partial",
        names=_PHI_3_NAMES,
    ),
    Architecture(
        "GemmaForCausalLM",
        "gemma",
        keys=_KEYS | _ATTENTION_BIAS,
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        constants=_GEMMA,
        allowed=_GEMMA_ALLOWED | {"hidden_act": _TANH_GELU, "hidden_activation": (None, *_TANH_GELU)},
    ),
    Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        keys=_KEYS | _ATTENTION_BIAS | _GEMMA_2_KEYS,
        defaults=_GEMMA_DEFAULTS
        | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        constants=_GEMMA | {"is_post_normed": True},
        allowed=_GEMMA_ALLOWED | {"hidden_activation": _TANH_GELU},
        windows="by kind",
        pattern=2,
        names=_GEMMA_2_NAMES,
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        keys=_KEYS | _ATTENTION_BIAS | _GEMMA_2_KEYS,
        defaults=_GEMMA_DEFAULTS
        | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "max_position_embeddings": 131_072}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        constants=_GEMMA | {"is_post_normed": True, "is_qk_normed": True},
        allowed=_GEMMA_ALLOWED | {"hidden_activation": _TANH_GELU},
        windows="by kind",
        pattern=6,
        ropes="by kind",
        names=_GEMMA_2_NAMES,
    ),
)
