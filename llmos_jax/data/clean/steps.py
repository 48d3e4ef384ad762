"""What a step of cleaning is, and the registry that finds steps by name.

A step is a frozen dataclass of settings with methods that are pure: the same documents give the same result, one document's
result does not depend on the others of its shard, and nothing is kept between calls. There are two kinds,

- `Filter`: `annotate` finds attributes, `decide` turns them into reasons for removal;
- `Transform`: `transform` gives new texts;

and either may be `Global`: what it finds depends on all documents (duplicates). It then says what to look at in each shard
(`emit`), what follows from equal hashes (`reduce`) and what follows from all of these (`finish`), and gets the findings for
a shard's documents as the second argument of `annotate` or `transform`.

A module of this package adds steps by defining them:

    @register
    @dataclasses.dataclass(frozen=True)
    class Length(Filter):
        "Documents of at least so many characters."

        step: str = setting("length", help="step", choices=("length",))
        min_characters: int = threshold(200, help="fewest characters", at_least=0)

        def annotate(self, documents):
            return {"characters": np.array([len(text) for text in documents.texts], np.int32)}

        def decide(self, attributes):
            return np.where(attributes["characters"] < self.min_characters, "too short", "")
"""

import abc
import dataclasses
import difflib
import re
import types
import typing

import numpy as np

from llmos_jax.config import Override, fingerprint, import_all, library_versions, parse, setting, to_plain
from llmos_jax.data.clean.documents import check_attributes
from llmos_jax.errors import ConfigError

_PACKAGE = "llmos_jax.data.clean"
_STEPS = {}
_LABEL = re.compile(r"\w([\w .-]*\w)?")


def threshold(default, **words):
    """Returns a `setting` that only `decide` reads: changing it makes nothing be annotated again."""
    field = setting(default, **words)
    field.metadata = types.MappingProxyType(dict(field.metadata) | {"is_threshold": True})
    return field


@dataclasses.dataclass(frozen=True)
class Step:
    """Settings that all steps have.

    version: raised whenever the code of a step changes what it finds; results of other versions are not reused.
    libraries: distributions whose version decides what it finds.
    reads_texts: whether `annotate` looks at the documents; the findings of a global step may be enough. Where it doesn't,
      `emit` is called before earlier steps like it have removed what they remove.
    reads_attributes: whether it looks at the attributes of the steps before it (`Documents.attributes`, `STEP/attribute`), as
      far as the last global one; they are not there otherwise.
    """

    step: str = setting("", help="step")
    label: str = setting("", help="name of this use of the step, where it is used more than once; none: its name")

    version: typing.ClassVar[int] = 1
    libraries: typing.ClassVar[tuple[str, ...]] = ()
    reads_texts: typing.ClassVar[bool] = True
    reads_attributes: typing.ClassVar[bool] = False

    def __post_init__(self):
        """Raises ConfigError on a label that can't stand before attributes and reasons, and when nothing would stay."""
        if self.label and not _LABEL.fullmatch(self.label):
            raise ConfigError(f"label={self.label!r} of step {self.step!r} must be letters, digits, - _ . or blanks within.")
        names = [field.name for field in dataclasses.fields(self)]
        for low in names:
            high = {"at_least": "at_most"}.get(low, low.replace("min_", "max_", 1))
            if high != low and high in names and getattr(self, low) > getattr(self, high):
                values = f"{low}={getattr(self, low):g} is more than {high}={getattr(self, high):g}"
                raise ConfigError(f"{self.name}.{values}: nothing would be kept.")

    @property
    def name(self):
        """The label, or the step's name: it stands before attributes and reasons."""
        return self.label or self.step

    @property
    def is_global(self):
        """Whether what is found depends on all documents."""
        return isinstance(self, Global)

    @property
    def fingerprint(self):
        """16 hex digits of all that decides what the step finds: settings but thresholds and label, version, inputs."""
        names = [f.name for f in dataclasses.fields(self) if not f.metadata.get("is_threshold") and f.name != "label"]
        settings = {name: to_plain(getattr(self, name)) for name in names}
        return fingerprint([settings, self.version, self.inputs(), library_versions(self.libraries)])

    def inputs(self):
        """Returns JSON-able content hashes of what the step reads beside the documents (lists, models, evaluation sets)."""
        return {}

    def notes(self):
        """Returns what the manifest says of what the step reads beside the documents, JSON-able; DataError when it is bad."""
        return {}


class Filter(Step, abc.ABC):
    """A step that removes documents."""

    @abc.abstractmethod
    def annotate(self, documents, findings=None):
        """Returns {attribute: array [n]} for Documents; must not read thresholds. `findings`: of a Global step only."""

    @abc.abstractmethod
    def decide(self, attributes):
        """Returns an array [n] of text: "" to keep a document, else why it goes, a short fixed phrase."""


class Transform(Step, abc.ABC):
    """A step that changes texts. A text that becomes blank is removed for the reason `emptied`."""

    # Or `protect(texts, names=None)`: what of texts, in fields of these names, may be in any file of the dataset, be it
    # removed text or metadata. Steps behind it see protected text alone, and what they make of it is protected again.
    protect = None
    # Whether text goes that says what the text around it is, or parts it: such a step can't stand before one that protects.
    cuts: typing.ClassVar[bool] = True

    @abc.abstractmethod
    def transform(self, documents, findings=None):
        """Returns (texts, {attribute: array [n]}, removed) for Documents.

        texts: the new text of each, the same object where nothing changed. attributes: counts of what was done. removed:
        what was cut out of each, for inspection, text or None.
        """


class Global(abc.ABC):
    """Mixed into a Filter or a Transform whose findings depend on all documents.

    Documents are numbered through all shards, in the order of sources, files and records: the smallest number of a group
    of duplicates is the one of the source named first, whatever the sizes of shards and the number of workers.
    """

    @abc.abstractmethod
    def emit(self, documents):
        """Returns a structured array of records of a shard, any number for each document.

        Fields: `hash` (uint64: equal ones meet in `reduce`), `document` (int64: number within the shard, which the runner
        turns into the number among all), and any others of fixed size.
        """

    @abc.abstractmethod
    def reduce(self, records):
        """Returns a structured array of what follows from the records of a range of hashes, sorted by hash and document.

        All records of a hash are there. It is called for many ranges, each of which fits in memory.
        """

    @abc.abstractmethod
    def finish(self, results, count):
        """Returns the findings, a structured array with a field `document`, at most some bytes for each of `count` documents.

        results: what `reduce` gave for all ranges, concatenated in the order of hashes. Findings are sorted by document.
        """


def register(cls):
    """Makes a step known by the default of its `step` setting; returns the class."""
    name = cls.step
    if not name.isidentifier():
        raise TypeError(f"{cls.__name__} needs a `step` setting whose default is its name")
    kinds = [kind for kind in (Filter, Transform) if issubclass(cls, kind)]
    if len(kinds) != 1 or "__dataclass_params__" not in vars(cls) or not cls.__dataclass_params__.frozen:
        raise TypeError(f"step {name!r} must be a frozen dataclass that is a Filter or a Transform")
    if _STEPS.get(name, cls).__qualname__ != cls.__qualname__:
        raise TypeError(f"there are two steps named {name!r}: {_STEPS[name].__qualname__} and {cls.__qualname__}")
    _STEPS[name] = cls
    return cls


def step_names():
    """Returns the sorted names of all steps."""
    import_all(_PACKAGE)
    return sorted(_STEPS)


def step_class(name, path="step"):
    """Returns the class of the step of a name; ConfigError lists the known ones."""
    known = step_names()
    if name not in _STEPS:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        raise ConfigError(f"{path}={name!r} is no step; {hint}: {', '.join(known)}.")
    return _STEPS[name]


def parse_steps(trees, path="steps"):
    """Returns the steps of a list of settings `{"step": NAME, setting: value, ...}`, a tuple.

    Raises ConfigError on an unknown step or setting, and on two steps of one name (`label` tells them apart).
    """
    if not isinstance(trees, (list, tuple)) or isinstance(trees, Override):
        raise ConfigError(f"{path} must be a list of steps, not {trees!r}.")
    steps, seen = [], {}
    for number, tree in enumerate(trees):
        where = f"{path}[{number}]"
        tree = to_plain(tree)
        if not isinstance(tree, dict) or "step" not in tree:
            raise ConfigError(f'{where} must be a group of settings with the name of a "step", not {tree!r}.')
        step = parse(step_class(tree["step"], f"{where}.step"), tree, where)
        if step.name in seen:
            raise ConfigError(f"{where} has the name {step.name!r} of {path}[{seen[step.name]}]: give one of them a label.")
        seen[step.name] = number
        steps.append(step)
    return tuple(steps)


def check_order(steps, path="steps"):
    """Raises ConfigError where a step cuts texts before one that protects them: the number behind a "phone:" that is gone is
    none to anybody who looks for it."""
    cutting = None
    for step in steps:
        if getattr(step, "protect", None):
            if cutting:
                raise ConfigError(
                    f"{path}: {cutting.name!r} cuts or joins texts before {step.name!r} has looked at them, and what it leaves "
                    f"of personal data may not be known as such any more: put {step.name!r} before it."
                )
        elif isinstance(step, Transform) and step.cuts:
            cutting = cutting or step


def findings_of(findings, start, stop):
    """Returns the findings of documents start..stop of all, numbered from 0; `findings` are sorted by document."""
    first, last = np.searchsorted(findings["document"], (start, stop))
    part = findings[first:last].copy()
    part["document"] -= start
    return part


def sort_records(records):
    """Returns the records of `emit` in the order that `reduce` gets them: by hash, then by document."""
    return records[np.lexsort((records["document"], records["hash"]))]


def apply_step(step, shards):
    """Returns what one step does to a list of Documents, in memory: the plain meaning that runners must agree with.

    For every shard: (attributes, reasons) of a Filter, (texts, attributes, removed) of a Transform.
    """
    results, extra = [], [()] * len(shards)
    if step.is_global:
        starts = np.cumsum([0, *map(len, shards)])
        records = [step.emit(shard) for shard in shards]
        for part, start in zip(records, starts, strict=False):
            part["document"] += start
        reduced = step.reduce(sort_records(np.concatenate(records)))
        findings = step.finish(reduced, int(starts[-1]))
        extra = [(findings_of(findings, start, stop),) for start, stop in zip(starts, starts[1:], strict=False)]
    for shard, more in zip(shards, extra, strict=True):
        if isinstance(step, Filter):
            attributes = check_attributes(step.annotate(shard, *more), len(shard), step.name)
            results.append((attributes, np.asarray(step.decide(attributes))))
        else:
            texts, attributes, removed = step.transform(shard, *more)
            results.append((texts, check_attributes(attributes, len(shard), step.name), removed))
    return results
