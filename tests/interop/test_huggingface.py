"""Folders that can't be read: named by our own errors before anything is allocated; exports that are whole or not there."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.errors import ConfigError, DataError, DataIdentityMismatch
from llmos_jax.interop import huggingface, safetensors, tokens
from llmos_jax.interop.architectures import ARCHITECTURES
from llmos_jax.interop.model_config import read_config
from llmos_jax.models import gpt, llama
from tests.interop.reference import load, record, tensors, write_folder


def rewrite(folder, change):
    """Writes a folder's only file anew, after `change({name: array})`."""
    content = tensors(folder)
    change(content)
    writer = safetensors.Writer(folder / safetensors.SINGLE_FILE, {n: (a.shape, a.dtype) for n, a in content.items()})
    for name, array in content.items():
        writer.write(name, array)
    writer.close()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"architectures": ["LlamaForCausalML"]}, "did you mean 'LlamaForCausalLM'"),
        ("llama", {"architectures": ["BertForMaskedLM"]}, "'BertForMaskedLM' is not known; .*Known: GPT2LMHeadModel"),
        ("llama", {"architectures": [], "model_type": "t5"}, "'t5' is not known"),
        ("llama", {"architectures": 7}, "must be a list of names"),
        ("llama", {"hidden_size": -1}, "model.width=-1 must be at least 1"),
        ("llama", {"hidden_size": "big"}, "model.width must be a whole number"),
        ("llama", {"num_key_value_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3"),
        ("llama", {"rms_norm_eps": 0.0}, "model.norm_epsilon=0.0 must be above 0.0"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2' is not computed here; what is: 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "'axial' of rotary positions is not known"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"rope_parameters": "yarn"}, "must be a group of numbers"),
        ("llama", {"rope_parameters": None, "rope_scaling": "yarn"}, "is no config of LlamaForCausalLM"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lack their factor"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0]}}, "short_factors has 1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
        ("llama", {"num_hidden_layers": 10**9}, "10{9} layers .* 21 tensors"),
        ("llama", {"intermediate_size": 10**12}, "names a size of 10{12}"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be 3 of"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not computed"),
        ("qwen3-moe-plain", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("mixtral", {"num_experts_per_tok": 1}, "one expert a token"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token=9 is more than"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_configs_that_are_not_computed_are_refused(tmp_path, name, changes, words):
    folder = write_folder(tmp_path / "m", name, **changes)
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        huggingface.read_checkpoint(f"hf:{folder}")
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), r"extra \[3\] is not expected"),
        (lambda t: t.update({"lm_head.weight": np.zeros((96, 31), np.float32)}), r"is \[96, 31\], expected \[96, 32\]"),
        (lambda t: t.update({"lm_head.weight": np.zeros((96, 32), np.int8)}), "lm_head.weight is int8"),
    ],
)
def test_tensors_must_be_those_of_the_config(tmp_path, change, words):
    folder = write_folder(tmp_path / "m", "llama")
    rewrite(folder, change)
    with pytest.raises(DataError, match=words):
        load(folder)


def test_a_tied_head_may_be_there_once_more_but_not_another(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3")
    _, _, expected = load(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, _, found = load(folder)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(DataError, match="tie_word_embeddings is true, and lm_head.weight differs"):
        load(folder)


def test_buffers_and_names_without_prefix_are_read(tmp_path):
    """As in the first GPT-2 files: the bare model's names, and masks among the tensors."""
    folder = write_folder(tmp_path / "m", "gpt2")
    _, _, expected = load(folder)

    def strip(content):
        for name in list(content):
            content[name.removeprefix("transformer.")] = content.pop(name)
        content["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)

    rewrite(folder, strip)
    (folder / "config.json").write_text(json.dumps(record("gpt2")["config"] | {"architectures": ["GPT2Model"]}))
    _, _, found = load(folder)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_older_configs_mean_the_same():
    """transformers 4 laid rotary positions and experts out otherwise."""
    for name, old in [
        ("llama-llama3", {"rope_theta": 1000.0, "rope_scaling": None}),
        ("phi3-longrope", {"rope_theta": 1000.0, "partial_rotary_factor": 0.75, "rope_scaling": None}),
        ("gemma3-scaled", {"rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_scaling": None}),
        ("mistral", {"rope_theta": 10000.0}),
    ]:
        tree = record(name)["config"]
        rope = tree["rope_parameters"]
        before = {key: value for key, value in tree.items() if key != "rope_parameters"} | old
        if "rope_scaling" in old:
            rope = dict(rope.get("full_attention", rope))
            rope["type"] = rope.pop("rope_type")
            before["rope_scaling"] = {key: value for key, value in rope.items() if key not in old}
        assert read_config(before, "x")[1] == read_config(tree, "x")[1], name


def test_other_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, words in [
        ("hf:/no/such/folder", "there is no folder /no/such/folder"),
        ("hf:name", "no OWNER/NAME of the hub"),
        ("hf:nobody/nothing-at-all", "neither a folder nor to be had from the hub"),
    ]:
        with pytest.raises(ConfigError, match=words):
            huggingface.read_checkpoint(source)
    with pytest.raises(DataError, match=r"config.json can't be read"):
        huggingface.read_checkpoint(f"hf:{tmp_path}")
    for text, words in [("[1]", "holds no JSON object"), ("{", "can't be read"), ("[" * 10**5, "can't be read")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=words):
            huggingface.read_checkpoint(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(record("llama")["config"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="as pickle"):
        huggingface.read_checkpoint(f"hf:{tmp_path}")


def test_names_of_the_hub_are_found_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--small"
    write_folder(repository / "snapshots" / "0123abcd", "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    for source in ("hf:owner/small", "hf:owner/small@main"):
        assert huggingface.read_checkpoint(source).architecture.name == "LlamaForCausalLM"


def test_a_tokenizer_must_fit(tmp_path):
    from llmos_jax.data.tokenizer import ByteTokenizer

    folder = write_folder(tmp_path / "m", "llama")
    checkpoint = huggingface.read_checkpoint(f"hf:{folder}")
    with pytest.raises(DataError, match="has no tokenizer.json"):
        tokens.read_tokenizer(checkpoint)
    for name, text in ByteTokenizer().to_files().items():
        (folder / name).write_text(text)
    with pytest.raises(DataIdentityMismatch, match="has 257 tokens, and the model 96 embeddings"):
        tokens.read_tokenizer(checkpoint)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_configs_are_read_or_refused(data):
    name = data.draw(st.sampled_from(["llama-yarn", "gemma3-scaled", "phi3-longrope", "qwen3-moe", "qwen2-window", "gpt2"]))
    tree = copy.deepcopy(record(name)["config"])
    for _ in range(data.draw(st.integers(1, 3))):
        node = tree
        if isinstance(tree.get("rope_parameters"), dict) and data.draw(st.booleans()):
            node = tree["rope_parameters"]
        key = data.draw(st.sampled_from(sorted(node) or ["x"]))
        if data.draw(st.booleans()):
            node[key] = data.draw(_VALUES)
        else:
            node.pop(key, None)
    try:
        _, config = read_config(tree, "config.json")
    except ConfigError:
        return
    assert config.layers >= 1 and config.head_size >= 1


def test_exports_are_whole_or_not_there(tmp_path, monkeypatch):
    checkpoint, _, params = load(write_folder(tmp_path / "m", "llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="is there already"):
        huggingface.save_checkpoint(params, checkpoint.config, tmp_path / "full", dtype="float32")

    def fail(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.Writer, "write", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        huggingface.save_checkpoint(params, checkpoint.config, tmp_path / "new", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m"]


def test_what_transformers_can_not_compute_is_not_exported():
    for config in (
        gpt.Config(vocab_size=96, experts=4),
        llama.Config(vocab_size=96, heads=4, width=32, experts=4, shared_experts=1),
        llama.Config(vocab_size=96, heads=4, width=32, is_post_normed=True, logits_softcap=3.0),
    ):
        with pytest.raises(ConfigError, match="no architecture of transformers computes"):
            huggingface.check_target("/no/such/folder", config)


def test_a_share_of_turned_features_goes_out_as_phi_3():
    """transformers' Llama fails on the key that says so."""
    config = read_config(record("phi3-longrope")["config"], "x")[1]
    assert huggingface.check_target("/no/such/folder", config)[0].name == "Phi3ForCausalLM"
    tree = record("llama")["config"] | {"rope_parameters": None, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="LlamaForCausalLM turns all features"):
        read_config(tree, "config.json")
    tree = record("phi3")["config"] | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(ConfigError, match="plain or longrope, not linear"):
        read_config(tree, "config.json")


def test_every_architecture_has_a_recorded_model():
    from tests.interop.reference import NAMES

    assert {record(name)["config"]["architectures"][0] for name in NAMES} == {a.name for a in ARCHITECTURES}


def test_import_leaves_the_source_as_it_is(tmp_path):
    folder = write_folder(tmp_path / "m", "llama-tied-sharded")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)
