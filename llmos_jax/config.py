"""Typed settings: from an ml_collections experiment file and command-line overrides to strict frozen dataclasses.

`load_experiment` runs `experiments/NAME.py:get_config(arg)`; `parse` turns the result into the dataclasses that live
beside their owners. An unknown key, a wrong type, NaN or a value out of range is a `ConfigError` that names the
setting by its full path. After parsing no ConfigDict exists.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import pkgutil
import types
import typing

from llmos_jax.errors import ConfigError

_MISSING = dataclasses.MISSING


def setting(
    default=_MISSING, *, help, at_least=None, above=None, at_most=None, below=None, choices=None, units=None, parser=None
):
    """Returns a dataclass field that `parse` checks.

    Args:
      default: value when the experiment leaves it out; none means that it must be given.
      help: one line on what it does, with its unit.
      at_least, above, at_most, below: bounds of a number (of every element of a tuple).
      choices: the values allowed.
      units: package (`"llmos_jax.models"`) whose module named by the value's `name` key owns the `Config` class.
      parser: `parser(value, path)` returns the value of a setting whose type its annotation does not tell.
    """
    metadata = dict(help=help, at_least=at_least, above=above, at_most=at_most, below=below, choices=choices, units=units)
    metadata["parser"] = parser
    if isinstance(default, (dict, list)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Override(str):
    """The text of a `--config.path=TEXT` flag, converted by the annotation of the setting that it names."""


def load_experiment(spec):
    """Runs `PATH[:ARG]` and returns (plain nested dict, path, arg): what the file's `get_config(arg)` chose.

    The file is trusted code, by design; it never comes from a checkpoint, a request or a data set.
    Raises ConfigError when the file is missing or has no `get_config`.
    """
    path_text, _, arg = spec.partition(":")
    path = pathlib.Path(path_text)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(known)}" if known else ""
        raise ConfigError(f"--config={spec}: there is no file {path}{hint}.")
    if path.suffix != ".py":
        raise ConfigError(f"--config={spec}: {path} is not a Python file with get_config(arg).")
    module_spec = importlib.util.spec_from_file_location(f"llmos_experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} does not define get_config(arg).")
    return to_plain(module.get_config(arg)), path, arg


def parse_arg(arg, **defaults):
    """Returns the options of `--config=FILE:key=value,flag` as a dict, typed by `defaults`.

    A flag alone sets a boolean default to True. A comma splits options; a value may hold `=` and `:`.
    Raises ConfigError on an unknown option or a value of the wrong type.
    """
    options = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        key, has_value, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(f"--config option {key!r} is unknown; {_known(key, defaults)}")
        default = defaults[key]
        kind = type(default) if default is not None else str
        if not has_value:
            if kind is not bool:
                raise ConfigError(f"--config option {key!r} needs a value: {key}=...")
            options[key] = True
        else:
            options[key] = _from_text(kind, text, f"--config option {key!r}")
    return options


def apply_overrides(tree, overrides):
    """Returns `tree` with every (dotted path, text) of `overrides` set; the text is typed later, by `parse`."""
    tree = to_plain(tree)
    for path, text in overrides:
        node = tree
        *parents, leaf = path.split(".")
        for depth, name in enumerate(parents):
            child = _item(node, name, path) if isinstance(node, list) else node.setdefault(name, {})
            if not isinstance(child, (dict, list)):
                raise ConfigError(f"--config.{path}: {'.'.join(parents[: depth + 1])} is a value, not a group of settings.")
            node = child
        if isinstance(node, list):
            raise ConfigError(f"--config.{path}={text}: name a setting of one of its {len(node)} items, by number or name.")
        if isinstance(node.get(leaf), dict):
            inner = ", ".join(sorted(node[leaf]))
            raise ConfigError(f"--config.{path}={text}: {path} is a group of settings ({inner}); set one of them.")
        node[leaf] = Override(text)
    return tree


def load_function(spec, path):
    """Returns the function that a setting `path` names as MODULE:NAME: code of its user's, as an experiment file is.

    Raises ConfigError when it can't be imported.
    """
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}={spec}: no MODULE:FUNCTION that Python can import ({error}).") from None


def parse(cls, tree, path=""):
    """Returns an instance of the frozen dataclass `cls` from the nested dict `tree`.

    Raises ConfigError naming the full path of an unknown, missing, mistyped or out-of-range setting.
    """
    if dataclasses.is_dataclass(tree) and isinstance(tree, cls):
        return tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or cls.__name__} must be a group of settings, not {tree!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise ConfigError(f"Unknown setting {_join(path, key)!r}; {_known(key, fields)}")
    values = {}
    for name, field in fields.items():
        full = _join(path, name)
        if name in tree:
            values[name] = _convert(hints[name], field.metadata, tree[name], full)
        elif field.metadata.get("units") and field.default_factory is not _MISSING:
            values[name] = _convert(hints[name], field.metadata, field.default_factory(), full)
        elif field.default is _MISSING and field.default_factory is _MISSING:
            raise ConfigError(f"Setting {full!r} is required: {field.metadata.get('help', 'no default')}")
    return cls(**values)


def to_plain(tree):
    """Returns settings (dataclass, ConfigDict or dict) as nested dicts, lists and JSON scalars."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {f.name: to_plain(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    if hasattr(tree, "to_dict"):
        return to_plain(tree.to_dict())
    if isinstance(tree, dict):
        return {key: to_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_plain(value) for value in tree]
    return tree


def to_json(settings):
    """Returns settings as indented JSON text with a final newline, the form that is written and compared."""
    return json.dumps(to_plain(settings), indent=2, sort_keys=True) + "\n"


def fingerprint(tree):
    """Returns 16 hex digits that identify the content of a JSON-able tree."""
    return hashlib.sha256(json.dumps(to_plain(tree), sort_keys=True).encode()).hexdigest()[:16]


def differences(old, new, path=""):
    """Returns one line per setting that differs between two plain trees: `optim.beta2: 0.95 -> 0.99`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            lines += differences(old.get(key), new.get(key), _join(path, key))
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def library_versions(names):
    """Returns {distribution name: version} of installed libraries."""
    return {name: importlib.metadata.version(name) for name in names}


def attribute(module, name):
    """Returns `module.name`, importing the module: how lazily imported names are found."""
    return getattr(importlib.import_module(module), name)


def import_all(package):
    """Imports every module of a package: how registries that modules fill are made complete."""
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        importlib.import_module(f"{package}.{info.name}")


def unit_names(package):
    """Returns the sorted names of the modules of `package` that define a `Config` and a `build`."""
    root = importlib.import_module(package)
    names = [info.name for info in pkgutil.iter_modules(root.__path__)]
    return sorted(name for name in names if _is_unit(importlib.import_module(f"{package}.{name}")))


def unit(package, name, path="name"):
    """Returns the module `package.name` that owns a `Config` and a `build`; ConfigError lists the known ones."""
    full = f"{package}.{name}"
    if name.isidentifier() and importlib.util.find_spec(full) and _is_unit(importlib.import_module(full)):
        return importlib.import_module(full)
    raise ConfigError(f"{path}={name!r} is not a known choice; {_known(name, unit_names(package))}")


def _item(items, name, path):
    """Returns the group of settings of a list that a number or a name (its label, step or path) tells."""
    named = {str(number): item for number, item in enumerate(items)}
    for item in reversed(items):
        if isinstance(item, dict):
            named |= {str(item[key]): item for key in ("path", "step", "label") if item.get(key)}
    if name not in named:
        raise ConfigError(f"--config.{path}: there is no item {name!r}; {_known(name, named)}")
    return named[name]


def _is_unit(module):
    return hasattr(module, "Config") and hasattr(module, "build")


def _join(path, name):
    return f"{path}.{name}" if path else name


def _known(key, names):
    close = difflib.get_close_matches(str(key), [str(name) for name in names], n=1, cutoff=0.5)
    listed = ", ".join(sorted(map(str, names)))
    return f"did you mean {close[0]!r}? Known: {listed}." if close else f"known: {listed}."


def _convert(hint, metadata, value, path):
    if metadata.get("parser"):
        return metadata["parser"](value, path)
    if metadata.get("units"):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a group of settings with a 'name', not {value!r}.")
        name = str(value.get("name", ""))
        return parse(unit(metadata["units"], name, f"{path}.name").Config, value, path)
    value = _typed(hint, value, path)
    for element in value if isinstance(value, tuple) else (value,):
        _check_bounds(element, metadata, path)
    return value


def _typed(hint, value, path):
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, Override) and value.lower() in ("none", "null")):
            return None
        errors = []
        for kind in (kind for kind in inner if kind is not type(None)):
            try:
                return _typed(kind, value, path)
            except ConfigError as error:
                errors.append(error)
        raise errors[-1]
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, path)
    if origin is tuple:
        if isinstance(value, Override):
            value = [Override(part.strip()) for part in value.strip("()[]").split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, not {value!r}.")
        return tuple(_typed(inner[0], element, f"{path}[{index}]") for index, element in enumerate(value))
    if origin is dict:
        if isinstance(value, Override):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise ConfigError(f"{path} must be a JSON object, not {str(value)!r}.") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a group of settings, not {value!r}.")
        return {str(key): _typed(inner[1], element, _join(path, key)) for key, element in value.items()}
    if isinstance(value, Override) and hint is not str:
        return _from_text(hint, value, path)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint or (hint is str and isinstance(value, str)):
        return str(value) if hint is str else value
    raise ConfigError(f"{path} must be {_article(hint)}, not {value!r} ({type(value).__name__}).")


def _from_text(kind, text, path):
    text = str(text)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            number = float(text)
            if not number.is_integer():
                raise ValueError
            return int(text) if text.lstrip("+-").isdigit() else int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{path} must be {_article(kind)}, not {text!r}.") from None


def _article(kind):
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, f"a {kind}")


def _check_bounds(value, metadata, path):
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be a finite number.")
    if metadata.get("choices") and value is not None and value not in metadata["choices"]:
        raise ConfigError(f"{path}={value!r} is not a known choice; {_known(value, metadata['choices'])}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    for name, holds, words in (
        ("at_least", lambda v, b: v >= b, "at least"),
        ("above", lambda v, b: v > b, "above"),
        ("at_most", lambda v, b: v <= b, "at most"),
        ("below", lambda v, b: v < b, "below"),
    ):
        bound = metadata.get(name)
        if bound is not None and not holds(value, bound):
            raise ConfigError(f"{path}={value} must be {words} {bound}.")
