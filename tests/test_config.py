"""Settings: strict parsing, overrides, golden experiments."""

import dataclasses
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax import config
from llmos_jax.api import load_prepare_settings, load_settings
from llmos_jax.errors import ConfigError
from llmos_jax.train.settings import Settings

PREPARE = pathlib.Path("experiments/prepare.py")
EXPERIMENTS = sorted(path for path in pathlib.Path("experiments").glob("*.py") if path != PREPARE)
GOLDEN = pathlib.Path("tests/golden")
ARGS = {
    "gpt": ["", "size=nano,tokenizer=byte,data=corpus.txt", "size=124m", "size=175b", "smoke"],
    "llama": ["", "size=7b", "size=8b", "size=70b", "smoke"],
    "moe": ["", "size=8x124m", "size=64x1b,data=corpus.txt", "capacity=1.25,smoke"],
}


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = config.setting(0.5, help="", above=0.0, at_most=1.0)
    names: tuple[str, ...] = config.setting((), help="")
    limit: int | None = config.setting(None, help="", at_least=1)


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int = config.setting(help="needed", at_least=1)
    kind: str = config.setting("red", help="", choices=("red", "green"))
    is_on: bool = config.setting(False, help="")
    inner: Inner = config.setting(Inner(), help="")
    table: dict[str, tuple[str, ...]] = config.setting({}, help="")


def test_values_and_defaults():
    parsed = config.parse(Outer, {"count": 3, "inner": {"rate": 1, "names": ["a"]}, "table": {"x": ["y"]}})
    assert parsed == Outer(3, inner=Inner(rate=1.0, names=("a",)), table={"x": ("y",)})
    assert isinstance(parsed.inner.rate, float)
    assert config.parse(Outer, json.loads(config.to_json(parsed))) == parsed


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, ["count", "required"]),
        ({"count": 0}, ["count=0", "at least 1"]),
        ({"count": -2}, ["count=-2"]),
        ({"count": 1.5}, ["count", "whole number", "1.5"]),
        ({"count": True}, ["count", "whole number"]),
        ({"count": "3"}, ["count", "'3'"]),
        ({"count": 1, "cuont": 2}, ["'cuont'", "did you mean 'count'"]),
        ({"count": 1, "inner": {"rat": 1.0}}, ["'inner.rat'", "did you mean 'rate'"]),
        ({"count": 1, "inner": {"rate": float("nan")}}, ["inner.rate=nan", "finite"]),
        ({"count": 1, "inner": {"rate": float("inf")}}, ["inner.rate=inf"]),
        ({"count": 1, "inner": {"rate": 0.0}}, ["above 0.0"]),
        ({"count": 1, "inner": {"rate": 1.01}}, ["at most 1.0"]),
        ({"count": 1, "inner": {"limit": 0}}, ["inner.limit=0"]),
        ({"count": 1, "inner": {"names": "a"}}, ["inner.names", "list"]),
        ({"count": 1, "inner": 3}, ["inner", "group of settings"]),
        ({"count": 1, "kind": "gren"}, ["'gren'", "did you mean 'green'"]),
        ({"count": 1, "is_on": 1}, ["is_on", "true or false"]),
    ],
)
def test_bad_values_are_named(tree, words):
    with pytest.raises(ConfigError) as error:
        config.parse(Outer, tree)
    for word in words:
        assert word in str(error.value)


def test_overrides_are_typed_by_their_setting():
    overrides = [
        ("count", "1e3"),
        ("inner.rate", "2e-1"),
        ("inner.names", "a,b"),
        ("inner.limit", "none"),
        ("is_on", "true"),
    ]
    parsed = config.parse(Outer, config.apply_overrides({"count": 1, "inner": {"limit": 3}}, overrides))
    assert parsed == Outer(1000, is_on=True, inner=Inner(rate=0.2, names=("a", "b"), limit=None))
    for path, text, word in [
        ("count", "1.5", "whole number"),
        ("inner.rate", "fast", "'fast'"),
        ("inner", "3", "group of settings"),
        ("count.deep", "3", "is a value"),
        ("inner.rat", "3", "did you mean 'rate'"),
    ]:
        with pytest.raises(ConfigError, match=word):
            config.parse(Outer, config.apply_overrides({"count": 1, "inner": {"rate": 1.0}}, [(path, text)]))


@given(st.text(max_size=40))
def test_experiment_args_never_crash(arg):
    try:
        options = config.parse_arg(arg, size="small", smoke=False, count=3)
    except ConfigError as error:
        assert "--config option" in str(error)
    else:
        assert set(options) == {"size", "smoke", "count"}


def test_missing_experiment_is_named():
    with pytest.raises(ConfigError, match="experiments/gtp.py.*experiments/gpt.py"):
        load_settings("experiments/gtp.py")
    with pytest.raises(ConfigError, match="README.md is not a Python file"):
        load_settings("README.md")
    with pytest.raises(ConfigError, match="size='12m' is unknown; known: small"):
        load_settings("experiments/gpt.py:size=12m")


@pytest.mark.parametrize(("path", "arg"), [(path, arg) for path in EXPERIMENTS for arg in ARGS[path.stem]], ids=str)
def test_golden_settings(path, arg, request):
    """A changed default shows up in review: regenerate with `pytest tests/test_config.py --regenerate-golden`."""
    settings, _ = load_settings(f"{path}:{arg}")
    check_golden(settings, path, arg, request)


@pytest.mark.parametrize("arg", ["", "data=corpus+more.jsonl.zst,licence=CC0,chain=web", "chain=code,evaluations=tests.jsonl"])
def test_golden_settings_of_preparation(arg, request):
    settings, _ = load_prepare_settings(f"{PREPARE}:{arg}")
    check_golden(settings, PREPARE, arg, request)


def check_golden(settings, path, arg, request):
    name = f"{path.stem}-{arg or 'default'}".replace("/", "_")
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--regenerate-golden"):
        file.write_text(config.to_json(settings))
    assert config.to_json(settings) == file.read_text()
    assert config.parse(type(settings), json.loads(file.read_text())) == settings
    assert path.read_text().count("\n") <= 120


def test_items_of_lists_are_overridden_by_number_or_name():
    settings, _ = load_prepare_settings(
        f"{PREPARE}:data=corpus",
        [("steps.length.at_least", "7"), ("steps.0.max_blank_lines", "9"), ("sources.corpus.licence", "MIT")],
    )
    assert (settings.steps[-1].at_least, settings.steps[0].max_blank_lines, settings.sources[0].licence) == (7, 9, "MIT")
    with pytest.raises(ConfigError, match="steps.lenght.at_least: there is no item 'lenght'; did you mean 'length'"):
        load_prepare_settings(f"{PREPARE}", [("steps.lenght.at_least", "7")])
    with pytest.raises(ConfigError, match="name a setting of one of its"):
        load_prepare_settings(f"{PREPARE}", [("steps.length", "7")])


def test_every_setting_of_every_experiment_refuses_nonsense():
    """Row F1 in small: each leaf set to a wrong type is refused by its full name."""
    settings, _ = load_settings("experiments/gpt.py")
    tree = config.to_plain(settings)

    def leaves(node, path=()):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, (*path, key))
        else:
            yield path

    checked = 0
    for path in leaves(tree):
        broken = json.loads(json.dumps(tree))
        node = broken
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = {"not": "a value"}
        with pytest.raises(ConfigError) as error:
            config.parse(Settings, broken)
        assert path[-1] in str(error.value)
        checked += 1
    assert checked > 50


def test_differences_name_what_changed():
    assert config.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "c": 2}) == ["a.b: 1 -> 2"]
