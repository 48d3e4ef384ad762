"""From sources to records, once: read, split, train the tokenizer, tokenise, pack, write; cached by content."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import time

import numpy as np

from llmos_jax.compute import host
from llmos_jax.config import Override, fingerprint, parse, setting
from llmos_jax.data import sources as sources_lib
from llmos_jax.data.fertility import Fertility, format_fertility
from llmos_jax.data.lineage import Lineage, lineage_file
from llmos_jax.data.sources import SourceConfig
from llmos_jax.data.store import FORMAT, SPLITS, Store, is_store, write_store
from llmos_jax.data.text import DocumentPacker, Packer
from llmos_jax.data.tokenizer import TRAINED, load_tokenizer, make_tokenizer, pieces
from llmos_jax.errors import ConfigError, DataError, DataIdentityMismatch

# BPE merges converge long before this; more text only costs time. The sample is taken in pieces from all over the text.
_TOKENIZER_SAMPLE_CHARACTERS = 16_000_000
_TOKENIZER_PIECE_CHARACTERS = 50_000
TOKENIZER_FILE = "tokenizer.json"
# Names the files of the source that were left out, where there are any.
LEFT_OUT_FILE = "left-out.txt"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """From a step on, other weights of the sources."""

    from_step: int = setting(help="first step", at_least=1)
    weights: tuple[float, ...] = setting(help="weight of each source, in their order; 0: not at all", at_least=0.0)


def parse_stages(value, path):
    """Returns the StageConfigs of a list of groups, or of text, `STEP:WEIGHT:WEIGHT,...`: a weight for each source."""
    if isinstance(value, str):
        parts = [[Override(number) for number in stage.split(":")] for stage in value.strip("()[]").split(",") if stage.strip()]
        value = [{"from_step": step, "weights": weights} for step, *weights in parts]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} must be a list of groups from_step, weights, or STEP:WEIGHT:WEIGHT,..., not {value!r}.")
    return tuple(parse(StageConfig, stage, f"{path}[{number}]") for number, stage in enumerate(value))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer and shape of the records."""

    sources: tuple[SourceConfig, ...] = setting((SourceConfig(),), help="what to train on; several are a mixture")
    stages: tuple[StageConfig, ...] = setting(
        (), help="curriculum: from which step on which weights count", parser=parse_stages
    )
    tokenizer: str = setting("bpe:4096", help="byte, bpe:SIZE or unigram:SIZE (trained on the sources), or a tokenizer.json")
    length: int = setting(256, help="tokens of a record", at_least=2)
    packing: str = setting(
        "stream", help="records are cut from all documents in a row, or hold one document each", choices=("stream", "document")
    )
    validation_fraction: float = setting(
        0.1, help="share of files (of one text file: its end) for validation", above=0, below=1
    )
    cache_dir: str | None = setting(None, help="where prepared records are kept; none: $LLMOS_CACHE or ~/.cache/llmos")
    on_corrupt: str = setting("error", help="damaged records: stop, or skip as padding", choices=("error", "skip"))
    max_corrupt: int = setting(100, help="damaged records that may be skipped", at_least=0)

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one.")
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ConfigError(f"data.stages: from_step must rise from stage to stage, not {steps}.")
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.sources) or not any(stage.weights):
                raise ConfigError(
                    f"data.stages[{number}].weights={list(stage.weights)} must have one number for each of "
                    f"{len(self.sources)} sources, and one above 0."
                )


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Stores with their weights, limits and stages, the tokenizer they share, and the validation text for the yardstick."""

    stores: tuple[tuple[Store, float], ...]
    tokenizer: object
    max_epochs: tuple[float | None, ...]
    stages: tuple[tuple[int, tuple[float, ...]], ...] = ()

    @property
    def validation_bytes(self):
        """Raw bytes of validation text."""
        return sum(store.manifest["validation_bytes"] for store, _ in self.stores)

    @property
    def validation_gzip_bytes(self):
        """The same text compressed by gzip -9."""
        return sum(store.manifest["validation_gzip_bytes"] for store, _ in self.stores)


def prepare(config, *, log=print):
    """Returns the PreparedData of a DataConfig; what was prepared before from the same content is only opened.

    How many files of a source were left out is logged each time, with the file beside the records that names them.
    A source that is already a prepared folder is used as it is; DataIdentityMismatch when its tokenizer or length is
    not the one that is asked for. Raises ConfigError and DataError as `sources` does.
    """
    options = {"on_corrupt": config.on_corrupt, "max_corrupt": config.max_corrupt}
    folders = [_folder(source) for source in config.sources]
    raw = [source for source, folder in zip(config.sources, folders, strict=True) if folder is None]
    prepared = [folder for folder in folders if folder is not None]
    tokenizer = _shared_tokenizer(config, prepared) if prepared else None
    cache = records_directory(config)
    inputs = [_Input(source, cache) for source in raw]
    if tokenizer is None:
        tokenizer = _tokenizer(config, inputs, cache, log)
    made = iter([_prepare_one(config, item, tokenizer, cache, log) for item in inputs])
    stores = [Store(folder if folder is not None else next(made), **options) for folder in folders]
    for source, store in zip(config.sources, stores, strict=True):
        _check(config, store, tokenizer)
        _tell_left_out(source, store, log)
    weights = [source.weight for source in config.sources]
    stages = tuple((stage.from_step, stage.weights) for stage in config.stages)
    limits = tuple(source.max_epochs for source in config.sources)
    return PreparedData(tuple(zip(stores, weights, strict=True)), tokenizer, limits, stages)


class _Input:
    """A raw source with its files and the hash of their content (remembered by path, size and time)."""

    def __init__(self, source, cache):
        self.source = source
        self.files = sources_lib.list_files(source)
        self.bytes = sum(file.size_bytes for file in self.files)
        self.content = self._content(cache)

    def split_of(self, document, fraction):
        digest = hashlib.sha256(os.fsencode(document.key)).digest()
        return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"

    def documents(self, fraction, log, left_out=None):
        """Yields (split, Document): by document, or for one text file by position (its end is validation).

        Of two documents or more no split stays empty: the first document is dealt last, and fills the one that is.
        """
        documents = sources_lib.read_documents(self.source, self.files, log, left_out)
        if sources_lib.is_single_text(self.source, self.files):
            (document,) = documents
            cut = len(document.text) - max(1, round(len(document.text) * fraction))
            yield "train", dataclasses.replace(document, text=document.text[:cut])
            yield "validation", dataclasses.replace(document, text=document.text[cut:])
            return
        seen = set()
        first = next(documents)  # there is one: a source without any is an error
        for document in documents:
            split = self.split_of(document, fraction)
            seen.add(split)
            yield split, document
        empty = [split for split in SPLITS if split not in seen]
        yield empty[0] if len(empty) == 1 else self.split_of(first, fraction), first

    def survey(self, fraction, log, left_out):
        """Returns what the manifest says of the texts: documents, bytes, and what gzip makes of the validation split.

        left_out: a LeftOut, which gets the files that are left out.
        """
        documents, sizes, packed = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), _GzipSize()
        for split, document in self.documents(fraction, log, left_out):
            content = document.text.encode()
            documents[split] += 1
            sizes[split] += len(content)
            if split == "validation":
                packed.add(content)
        for split in SPLITS:
            if not sizes[split]:
                raise DataError(f"data source {self.source.path} is too small: nothing is left for {split}.")
        return {
            "documents": documents,
            "train_bytes": sizes["train"],
            "validation_bytes": sizes["validation"],
            "validation_gzip_bytes": packed.finish(),
            "left_out": {"count": left_out.count, "files": len(self.files)},
        }

    def _content(self, cache):
        note = cache / "hashes" / f"{fingerprint([[f.path, f.key, f.size_bytes, f.stamp] for f in self.files])}.txt"
        if note.is_file():
            return note.read_text()
        content = sources_lib.content_hash(self.files)
        _keep(note, content)
        return content


def records_directory(config):
    """Returns the folder that prepared records are kept in, made if it is missing; ConfigError when it can't be used."""
    if not config.cache_dir:
        return host.cache_directory("data")
    cache = pathlib.Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir={config.cache_dir} can't be used ({error.strerror}): name another.") from None
    return cache


def _keep(file, text):
    """Writes a file of the cache; DataError when there is no room for it."""
    try:
        file.parent.mkdir(exist_ok=True)
        host.write_whole(file, text)
    except OSError as error:
        raise DataError(
            f"{file} could not be written ({error.strerror}): make room, or keep prepared data elsewhere (data.cache_dir, or "
            "$LLMOS_CACHE)."
        ) from None


def _folder(source):
    path = pathlib.Path(source.path).expanduser()
    return path if is_store(path) else None


def _shared_tokenizer(config, folders):
    """Returns the tokenizer that the first prepared folder was made with; DataIdentityMismatch when another is asked for."""
    folder, asked = folders[0], config.tokenizer
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    made_with = Store(folder).manifest.get("tokenizer_setting", tokenizer.name)
    if asked == "byte":
        is_same = tokenizer.name == "byte"
    elif asked.startswith(TRAINED):  # a small text gives fewer tokens than were asked for
        is_same = asked in (made_with, f"{tokenizer.name}:{tokenizer.vocab_size}")
    else:
        is_same = make_tokenizer(asked, ()).fingerprint == tokenizer.fingerprint
    if not is_same:
        mend = "byte" if tokenizer.name == "byte" else folder / TOKENIZER_FILE
        raise DataIdentityMismatch(
            f"data.tokenizer={asked}, but {folder} was prepared with {made_with}: set data.tokenizer={mend}."
        )
    return tokenizer


def _tokenizer(config, inputs, cache, log):
    """Returns the tokenizer of the run: made once per content and setting."""
    if not config.tokenizer.startswith(TRAINED):
        return make_tokenizer(config.tokenizer, ())
    key = fingerprint([[i.content for i in inputs], config.tokenizer, config.validation_fraction, FORMAT])
    file = cache / f"tokenizer-{key}.json"
    if file.is_file():
        return load_tokenizer(file)
    start = time.perf_counter()
    tokenizer = make_tokenizer(config.tokenizer, _tokenizer_texts(config, inputs, log))
    _keep(file, json.dumps(tokenizer.to_json()))
    log(f"tokenizer {config.tokenizer} trained in {time.perf_counter() - start:.1f} s")
    return tokenizer


def _tokenizer_texts(config, inputs, log):
    """Yields pieces of the training texts, evenly spread over every source and no more than the sample's size together."""
    budget = _TOKENIZER_SAMPLE_CHARACTERS // len(inputs)
    for item in inputs:
        share = budget / max(item.bytes, budget)  # compressed files hold more than they take: the budget ends them
        seen = used = 0
        for split, document in item.documents(config.validation_fraction, log=_silent):
            for piece in pieces(document.text, _TOKENIZER_PIECE_CHARACTERS) if split == "train" else ():
                if used <= seen * share and used < budget:
                    used += len(piece)
                    yield piece
                seen += len(piece)


def _prepare_one(config, item, tokenizer, cache, log):
    """Returns the folder of one raw source's records, writing it if it is not there."""
    reading = [item.source.text_key, item.source.format, item.source.repair, item.source.main_content]
    shape = [config.length, config.packing, config.validation_fraction, FORMAT]
    key = fingerprint([item.content, reading, tokenizer.fingerprint, *shape])
    folder = cache / f"records-{key}"
    if is_store(folder):
        return folder
    start = time.perf_counter()
    left_out = sources_lib.LeftOut()
    surveyed = item.survey(config.validation_fraction, log, left_out)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    streams = {split: _Stream(item, split, config, tokenizer, dtype) for split in SPLITS}

    def finish():
        measured = streams["validation"].fertility.report()
        log(f"{item.source.path}: {config.tokenizer} on validation text: {format_fertility(measured)}")
        manifest = surveyed | {
            "content": item.content,
            "source": item.source.path,
            "packing": config.packing,
            "tokenizer": tokenizer.fingerprint,
            "tokenizer_setting": config.tokenizer,
            "tokenizer_report": measured,
            "vocab_size": tokenizer.vocab_size,
            "validation_fraction": config.validation_fraction,
            "tokens": {split: stream.tokens for split, stream in streams.items()},
        }
        files = {lineage_file(split): stream.lineage.finish() for split, stream in streams.items()}
        files[TOKENIZER_FILE] = json.dumps(tokenizer.to_json()).encode()
        if left_out.count:
            files[LEFT_OUT_FILE] = left_out.text().encode("utf-8", "backslashreplace")
        return manifest, files

    splits = {split: stream.records() for split, stream in streams.items()}
    write_store(folder, splits, length=config.length, dtype=dtype, finish=finish)
    counts, sizes = surveyed["documents"], (surveyed["train_bytes"] / 1e6, surveyed["validation_bytes"] / 1e6)
    log(
        f"{item.source.path}: {counts['train']} training documents ({sizes[0]:.1f} MB), {counts['validation']} for validation "
        f"({sizes[1]:.1f} MB), prepared in {time.perf_counter() - start:.1f} s into {folder}"
    )
    if streams["train"].cut_tokens:
        cut = f"{streams['train'].cut_tokens:,}"
        log(f"{cut} tokens behind the first {config.length} of their document were left out (data.packing=document).")
    return folder


class _Stream:
    """One split of a source on its way to records; its documents are read as they are needed, so no text stays in memory."""

    def __init__(self, item, split, config, tokenizer, dtype):
        self._item, self._split, self._config, self._tokenizer, self._dtype = item, split, config, tokenizer, dtype
        self.lineage, self.fertility, self.tokens, self.cut_tokens = Lineage(), Fertility(tokenizer), 0, 0

    def records(self):
        """Yields the records; with one for each document, what is behind its first `length` tokens is left out."""
        is_by_document, length = self._config.packing == "document", self._config.length
        make_packer = DocumentPacker if is_by_document else Packer
        packer = make_packer(length, self._tokenizer.end_id, self._tokenizer.token_byte_lengths, self._dtype)
        for number, tokens in enumerate(self._tokenizer.encode_all(self._texts()), start=1):
            if is_by_document:
                self.cut_tokens += max(0, len(tokens) - length)
                tokens = tokens[:length]
            self.tokens += len(tokens)
            if self._split == "validation":
                self.fertility.add_tokens(tokens)
            # Document number n is record n where each has its own: as if every one filled it.
            self.lineage.place(number * (length - 1) if is_by_document else self.tokens)
            yield from packer.add(tokens)
        yield from packer.finish()

    def _texts(self):
        for split, document in self._item.documents(self._config.validation_fraction, _silent):
            if split == self._split:
                self.lineage.add(document.key)
                if split == "validation":
                    self.fertility.add_text(document.text)
                yield document.text


class _GzipSize:
    """How many bytes `gzip -9` makes of a text that comes in parts."""

    def __init__(self):
        self._sink = io.BytesIO()
        self._file = gzip.GzipFile(fileobj=self._sink, mode="wb", compresslevel=9, mtime=0)

    def add(self, content):
        self._file.write(content)

    def finish(self):
        self._file.close()
        return self._sink.tell()


def _tell_left_out(source, store, log):
    """Says how many files were left out when a source was prepared, and where they are named; older records don't know."""
    left_out = store.manifest.get("left_out")
    if left_out and left_out["count"]:
        file = store.directory / LEFT_OUT_FILE
        log(f"{source.path}: left out {left_out['count']} of {left_out['files']} files; {file} names each and says why.")


def _silent(line):
    """Says nothing: what a source leaves out was told when it was surveyed."""


def _check(config, store, tokenizer):
    identity = store.identity
    for name, asked, there in (
        ("tokenizer", tokenizer.fingerprint, identity["tokenizer"]),
        ("vocabulary size", tokenizer.vocab_size, identity["vocab_size"]),
        ("data.length", config.length, identity["length"]),
        ("data.packing", config.packing, identity["packing"]),
    ):
        if asked != there:
            raise DataIdentityMismatch(
                f"{store.directory} was prepared with {name} {there}, and {asked} is asked for: change the setting, or "
                "prepare it anew."
            )
