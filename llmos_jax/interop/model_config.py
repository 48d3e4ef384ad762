"""`config.json` read into a model's settings, and written from them, by the table of `architectures.py`.

What would change the numbers and is not known here is refused, never passed over: an architecture, an activation, a kind of
layer, a scaling of rotary positions or a parameter of one.
"""

import dataclasses
import difflib
import math

from llmos_jax.config import parse, unit
from llmos_jax.errors import ConfigError
from llmos_jax.interop.architectures import ARCHITECTURES

# How the layers with a window are told: no window; `sliding_window` for all; only if `use_sliding_window`; by `layer_types`.
WINDOWS = ("none", "all", "switched", "by kind", "switched by kind")
_WINDOWED, _GLOBAL = "sliding_attention", "full_attention"
_ROPE_TYPES = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
    "llama3": "llama3",
}
_ROPE_KEYS = {
    "rope_theta": "base",
    "partial_rotary_factor": "share",
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "is_truncated",
    "attention_factor": "attention_factor",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
# Which of them a scaling has beside the first two.
_ROPE_KEYS_OF = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "is_truncated", "attention_factor"),
    "longrope": ("factor", "original_context", "attention_factor", "short_factors", "long_factors"),
    "llama3": ("factor", "original_context", "low_factor", "high_factor"),
}
# What says how a model is run or trained and not what it is: two that differ in these alone have the same config.json.
EXECUTION = (
    "dropout",
    "dtype",
    "attention",
    "execution",
    "remat",
    "z_loss",
    "expert_capacity",
    "router_balance",
    "router_z_loss",
)
# Settings whose 0 or None means a value that others give: the property that resolves each.
_RESOLVED = {"kv_heads": "groups", "head_width": "head_size", "mlp": "hidden"}


def find_architecture(tree, file):
    """Returns the Architecture that a `config.json`'s content names; ConfigError lists the known ones."""
    names = tree.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: architectures must be a list of names, not {names!r}.")
    for architecture in ARCHITECTURES:
        if architecture.name in names or (not names and architecture.model_type == tree.get("model_type")):
            return architecture
    # A file of the bare model (GPT2Model) has the same tensors but for a head of its own.
    bare = {a.name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model": a for a in ARCHITECTURES}
    if names and names[0] in bare:
        return bare[names[0]]
    asked = names[0] if names else str(tree.get("model_type"))
    known = [architecture.name for architecture in ARCHITECTURES]
    near = difflib.get_close_matches(asked, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"{file}: the architecture {asked!r} is not known; {hint}Known: {', '.join(known)}.")


def read_config(tree, file):
    """Returns (Architecture, model Config) of a `config.json`'s content.

    Raises ConfigError, which begins with the file's name, on what is unknown, missing, out of range or not computed here.
    """
    architecture = find_architecture(tree, file)
    if tree.get("quantization_config"):
        raise ConfigError(f"{file}: the weights are quantised (quantization_config), and only plain ones are read.")
    try:
        settings = _settings(architecture, tree)
        return architecture, parse(unit("llmos_jax.models", architecture.unit).Config, settings, "model")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # a value of a kind that none foresaw
        raise ConfigError(f"{file} is no config of {architecture.name} ({type(error).__name__}: {error}).") from None


def write_config(config, original=None):
    """Returns (Architecture, content of a `config.json`) of a model's settings.

    `original`: the content that it was read from; it is kept where it still says the same. Raises ConfigError when no
    architecture of transformers computes what the settings say.
    """
    if original is not None:
        architecture, before = read_config(original, "config.json")
        if essence(before) == essence(config):
            return architecture, original
    for architecture in ARCHITECTURES:
        if architecture.unit == config.name:
            tree = _tree(architecture, config)
            try:
                _, after = read_config(tree, "config.json")
            except ConfigError:  # a setting that this architecture can't have
                continue
            if essence(after) == essence(config):
                return architecture, tree
    raise ConfigError(
        f"no architecture of transformers computes what these settings of {config.name!r} say; what can be written: "
        + ", ".join(architecture.name for architecture in ARCHITECTURES if architecture.unit == config.name)
        + "."
    )


def essence(config):
    """Returns a model's Config with everything resolved that decides what is computed, and the rest at its defaults."""
    resolved = {name: getattr(config, prop) for name, prop in _RESOLVED.items() if hasattr(config, name)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    resolved |= {name: defaults[name] for name in EXECUTION}
    if config.experts:
        resolved["expert_mlp"] = config.expert_hidden
    else:
        resolved |= {name: defaults[name] for name in ("experts_per_token", "expert_mlp", "is_router_normalised")}
    if hasattr(config, "query_scale"):
        resolved["query_scale"] = float(config.query_scale or config.head_size)
        resolved["window_rope"] = None if config.window_rope == config.rope else config.window_rope
    return dataclasses.replace(config, **resolved)


def _settings(architecture, tree):
    settings = {"name": architecture.unit, **architecture.constants}
    for key, ours in architecture.keys.items():
        value = tree.get(key, tree.get(architecture.aliases.get(key), architecture.defaults.get(key, ...)))
        if value is ...:
            raise ConfigError(f"{key} is missing.")
        for name in (ours,) if isinstance(ours, str) else ours:
            if value is not None or name not in _RESOLVED:  # null is our 0: left to the others
                settings[name] = value
    for key, values in architecture.allowed.items():
        value = tree.get(key, values[0])
        if value not in values:
            raise ConfigError(f"{key}={value!r} is not computed here; what is: {', '.join(map(repr, values))}.")
    if settings.get("experts") and settings["experts_per_token"] == 1 and settings.get("is_router_normalised", True):
        raise ConfigError("one expert a token with normalised weights: its router has no effect, and is not computed here.")
    settings |= _read_windows(architecture, tree, settings["layers"])
    if architecture.ropes is not None:
        settings |= _read_ropes(architecture, tree, settings)
    return settings


def _tree(architecture, config):
    """Returns the content of `config.json`, in the keys that transformers 4 and 5 both read."""
    # Left out, the padding token is what the family's own vocabulary has, maybe beyond the end of this one.
    tree = {"architectures": [architecture.name], "model_type": architecture.model_type, "pad_token_id": None}
    for key, ours in architecture.keys.items():
        name = ours if isinstance(ours, str) else ours[0]
        prop = "expert_hidden" if name == "expert_mlp" else _RESOLVED.get(name, name)
        value = getattr(config, prop)
        if name == "query_scale":
            value = config.query_scale or config.head_size
            value = int(value) if float(value).is_integer() else value
        tree[key] = value
    tree |= {key: next(value for value in values if value is not None) for key, values in architecture.allowed.items()}
    if "expert_mlp" not in architecture.keys.values() and config.experts:
        tree["intermediate_size"] = config.expert_hidden
    tree |= _write_windows(architecture, config)
    return tree if architecture.ropes is None else tree | _write_ropes(architecture, config)


# ---- Windows.


def _read_windows(architecture, tree, layers):
    form = architecture.windows
    if form == "none":
        return {}
    window = tree.get("sliding_window", architecture.defaults.get("sliding_window"))
    if window is None or ("switched" in form and not tree.get("use_sliding_window", False)):
        return {}
    if "by kind" not in form:
        return {"window": window}
    kinds = _layer_types(architecture, tree, layers)
    if len(kinds) != layers or set(kinds) - {_WINDOWED, _GLOBAL}:
        raise ConfigError(f"layer_types must be {layers} of {_WINDOWED!r} and {_GLOBAL!r}, not {kinds}.")
    if _WINDOWED not in kinds:
        return {}
    return {"window": window, "global_layers": [layer for layer, kind in enumerate(kinds) if kind == _GLOBAL]}


def _layer_types(architecture, tree, layers):
    if tree.get("layer_types") is not None:
        kinds = tree["layer_types"]
        return kinds if isinstance(kinds, list) else [kinds]
    if not isinstance(layers, int) or not 0 < layers < 2**16:
        raise ConfigError(f"num_hidden_layers={layers!r} must be a number of layers.")
    if architecture.pattern:
        pattern = tree.get("sliding_window_pattern", architecture.pattern)
        if not isinstance(pattern, int) or pattern < 1:
            raise ConfigError(f"sliding_window_pattern={pattern!r} must be a number of layers.")
        return [_WINDOWED if (layer + 1) % pattern else _GLOBAL for layer in range(layers)]
    first = tree.get("max_window_layers", 28)
    return [_WINDOWED if layer >= first else _GLOBAL for layer in range(layers)]


def _write_windows(architecture, config):
    form, is_windowed = architecture.windows, config.window is not None
    if form == "none":
        return {}
    tree = {"sliding_window": config.window}
    if "switched" in form:
        tree["use_sliding_window"] = is_windowed
    if "by kind" in form:
        kinds = [_GLOBAL if not is_windowed or layer in config.global_layers else _WINDOWED for layer in range(config.layers)]
        tree["layer_types"] = kinds
    return tree


# ---- Rotary positions.


def _read_ropes(architecture, tree, settings):
    given = tree.get("rope_parameters")
    if architecture.ropes != "by kind":
        if given is None:
            given = {"rope_theta": tree.get("rope_theta", architecture.defaults.get("rope_theta"))}
            given |= tree.get("rope_scaling") or {}
        rope = _read_rope(given, tree)
        if architecture.ropes == "partial" and rope["scaling"] not in ("none", "longrope"):
            raise ConfigError(f"rotary positions of {architecture.name} are plain or longrope, not {rope['scaling']}.")
        if architecture.ropes != "partial" and rope["share"] != 1.0:
            raise ConfigError(f"partial_rotary_factor={rope['share']}: {architecture.name} turns all features of a head.")
        return {"rope": rope}
    if given is None or not {_WINDOWED, _GLOBAL} & set(given):
        given = {
            _GLOBAL: {"rope_theta": tree.get("rope_theta", 1_000_000.0)} | (tree.get("rope_scaling") or {}),
            _WINDOWED: {"rope_theta": tree.get("rope_local_base_freq", 10_000.0)},
        }
    ropes = {"rope": _read_rope(given[_GLOBAL], tree)}
    return ropes | ({"window_rope": _read_rope(given[_WINDOWED], tree)} if settings.get("window") else {})


def _read_rope(given, tree):
    if not isinstance(given, dict):
        raise ConfigError(f"rope_parameters must be a group of numbers, not {given!r}.")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in _ROPE_TYPES:
        raise ConfigError(f"the scaling {kind!r} of rotary positions is not known; known: {', '.join(_ROPE_TYPES)}.")
    rope = {"scaling": _ROPE_TYPES[kind]}
    given.setdefault("partial_rotary_factor", tree.get("partial_rotary_factor") or 1.0)
    given.setdefault("rope_theta", tree.get("rope_theta", 10_000.0))
    context = tree["max_position_embeddings"]
    if kind == "dynamic":
        given["original_max_position_embeddings"] = context
    elif tree.get("original_max_position_embeddings"):  # Phi-3's, which goes before that of the group
        given["original_max_position_embeddings"] = tree["original_max_position_embeddings"]
    mscale, of_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if mscale and of_all and given.get("factor", 0.0) > 1.0:  # DeepSeek's two sharpenings, one over the other
        above, below = (0.1 * scale * math.log(given["factor"]) + 1.0 for scale in (mscale, of_all))
        given.setdefault("attention_factor", above / below)
    wanted = ("base", "share", *_ROPE_KEYS_OF[rope["scaling"]])
    for key, value in given.items():
        if key not in _ROPE_KEYS:
            raise ConfigError(f"rotary positions have {key}={value!r}, which is not known; known: {', '.join(_ROPE_KEYS)}.")
        if _ROPE_KEYS[key] in wanted:
            rope[_ROPE_KEYS[key]] = value
    if rope["scaling"] in ("yarn", "longrope", "llama3"):
        original = rope.setdefault("original_context", context)
        if "factor" not in rope and rope["scaling"] != "llama3":
            rope["factor"] = max(1.0, context / original)
    if rope["scaling"] == "dynamic":
        rope["original_context"] = context
    if "factor" not in rope and rope["scaling"] != "none":
        raise ConfigError(f"rotary positions with the scaling {kind!r} lack their factor.")
    return rope


def _write_ropes(architecture, config):
    tree = _write_rope(config.rope)
    if architecture.ropes != "by kind":
        return tree
    local = _write_rope(config.rope if config.window_rope is None else config.window_rope)
    if set(local) == {"rope_theta"}:
        return tree | {"rope_local_base_freq": local["rope_theta"]}
    kinds = {_GLOBAL: tree, _WINDOWED: local}  # only transformers 5 can say it
    groups = {kind: rope | rope.pop("rope_scaling", {"rope_type": "default"}) for kind, rope in kinds.items()}
    return {"rope_parameters": groups}


def _write_rope(rope):
    tree = {"rope_theta": rope.base}
    if rope.share != 1.0:
        tree["partial_rotary_factor"] = rope.share
    if rope.scaling != "none":
        names = {ours: key for key, ours in _ROPE_KEYS.items()}
        scaling = {names[name]: getattr(rope, name) for name in _ROPE_KEYS_OF[rope.scaling]}
        scaling = {key: list(value) if isinstance(value, tuple) else value for key, value in scaling.items()}
        tree["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
        tree["rope_scaling"]["rope_type"] = rope.scaling
        if rope.scaling == "longrope":
            tree["original_max_position_embeddings"] = rope.original_context
    return tree
