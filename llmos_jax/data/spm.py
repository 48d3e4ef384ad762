"""SentencePiece's `tokenizer.model` as a `tokenizer.json` (extra `sentencepiece`): Llama 2, Mistral, Gemma and the like.

Pieces, scores and normalisation are read from the file; the result is compared with SentencePiece itself before it is used.
"""

import json
import pathlib
import re

from llmos_jax.data.encoder import run
from llmos_jax.data.pretrained import SETTINGS_FILE, TOKENIZER_FILE, files_beside
from llmos_jax.errors import ConfigError, DataError

MODEL_NAME = "tokenizer.model"
_LARGEST_FILE_BYTES = 2**27
# trainer_spec.model_type, and the types of pieces (sentencepiece_model.proto).
_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_SPACE = "\u2581"
_PROBES = (
    *("", " ", "a", " a  b ", "Hello, world! It's 12345.67 or 1,000", "def f(x):\n\treturn  x + 1\n\n", "\u2581x \u2581"),
    *(
        "na\u00efve caf\u00e9 \ufb01ne",
        "\u4f60\u597d\uff0c\u4e16\u754c",
        "\u0417\u0434\u0440\u0430\u0432",
        "\U0001f600 \u00e9\u0301",
    ),
    "the quick brown fox jumps over the lazy dog " * 3,
)


def to_files(path):
    """Returns {name: text} of what `PretrainedTokenizer` takes: `tokenizer.json`, and the files beside the `tokenizer.model`.

    Raises ConfigError without the sentencepiece package, DataError when the file is damaged, of a kind that is not known, or
    when SentencePiece makes other tokens of the same texts.
    """
    path = pathlib.Path(path)
    content, proto = _read(path)
    files = files_beside(path)
    settings = _settings(files, path)
    model = _build(proto, path)
    _add_tokens(model, proto, settings, path)
    _compare(model, content, path)
    if settings.get("add_bos_token", True) and proto.trainer_spec.bos_id >= 0:
        from tokenizers import processors

        spelling, number = proto.pieces[proto.trainer_spec.bos_id].piece, proto.trainer_spec.bos_id
        model.post_processor = processors.TemplateProcessing(f"{spelling} $A", special_tokens=[(spelling, number)])
    named = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}
    settings = {name: proto.pieces[number].piece for name, number in named.items() if number >= 0} | settings
    return files | {TOKENIZER_FILE: model.to_str(), SETTINGS_FILE: json.dumps(settings)}


def _read(path):
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConfigError(f"{path} needs SentencePiece: pip install 'llmos-jax[sentencepiece]'.") from None
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes, and {_LARGEST_FILE_BYTES} are the most.")
        content = path.read_bytes()
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    except (OSError, DecodeError) as error:
        raise DataError(f"{path} can't be read as a model of SentencePiece: {error}.") from None
    spec, count = proto.trainer_spec, len(proto.pieces)
    if not count or spec.model_type not in (_UNIGRAM, _BPE) or not max(spec.unk_id, spec.bos_id, spec.eos_id) < count:
        raise DataError(f"{path} is no BPE or Unigram model of SentencePiece: it has {count} pieces, type {spec.model_type}.")
    return content, proto


def _settings(files, path):
    try:
        settings = json.loads(files.get(SETTINGS_FILE, "{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{SETTINGS_FILE} beside {path} is not JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise DataError(f"{SETTINGS_FILE} beside {path} holds no JSON object.")
    return settings


def _build(proto, path):
    """Returns the `tokenizers.Tokenizer` that does what the file says, without its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec, normal = proto.trainer_spec, proto.normalizer_spec
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    fallback = dict(byte_fallback=spec.byte_fallback)
    if spec.model_type == _BPE:
        vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        unknown = dict(unk_token=proto.pieces[spec.unk_id].piece, fuse_unk=True)
        model = models.BPE(vocab, _merges(proto), ignore_merges=bool(user_defined), **unknown, **fallback)
    else:
        model = models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], spec.unk_id, **fallback)
    tokenizer = Tokenizer(model)
    steps = []
    if normal.precompiled_charsmap:
        steps.append(run(path, normalizers.Precompiled, normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if normal.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    splits = [re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True)]
    if spec.model_type == _UNIGRAM:  # BPE has no merges that lead to them
        splits += [_apart(piece.piece) for piece in proto.pieces if piece.type not in (_NORMAL, _USER_DEFINED, _BYTE)]
        splits += ["<(?=0x[0-9A-F]{2}>)"] if spec.byte_fallback else []
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(splits)), behavior="isolated")
    fused = [decoders.Fuse(), decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else [decoders.Fuse()]
    bytes_ = [decoders.ByteFallback()] if spec.byte_fallback else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), *bytes_, *fused])
    return tokenizer


def _apart(piece):
    """Returns a pattern that cuts a text within what spells a special piece: it is just text there."""
    return f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" if len(piece) > 1 else re.escape(piece)


def _merges(proto):
    """Returns the pairs of pieces in the order in which SentencePiece joins them: what they make has the highest score."""
    scores = {piece.piece: (-piece.score, number) for number, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    found = []
    for piece, rank in scores.items():
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(rank, pair) for pair in pairs if pair[0] in scores and pair[1] in scores]
    return [pair for _, pair in sorted(found)]


def _add_tokens(tokenizer, proto, settings, path):
    """Makes the special pieces known, and the tokens that tokenizer_config.json adds behind them."""
    from tokenizers import AddedToken

    special = {n: p.piece for n, p in enumerate(proto.pieces) if p.type not in (_NORMAL, _USER_DEFINED, _BYTE)}
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special.values()])
    added = settings.get("added_tokens_decoder", {})
    try:
        added = sorted(((int(number), token) for number, token in added.items() if token["content"]), key=lambda pair: pair[0])
    except (AttributeError, TypeError, ValueError, KeyError):
        raise DataError(f"{SETTINGS_FILE} beside {path}: added_tokens_decoder is no table of tokens by number.") from None
    for number, token in added:
        if number < len(proto.pieces):
            continue
        kind = AddedToken(token["content"], normalized=False, special=bool(token.get("special")))
        (tokenizer.add_special_tokens if kind.special else tokenizer.add_tokens)([kind])
        if tokenizer.token_to_id(token["content"]) != number:
            raise DataError(f"{SETTINGS_FILE} beside {path}: token {number} is not the one after those before it.")


def _compare(tokenizer, content, path):
    from sentencepiece import SentencePieceProcessor

    try:
        library = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}.") from None
    tokenizer.encode_special_tokens = True
    for text in _PROBES:
        found, expected = run(path, tokenizer.encode, text, add_special_tokens=False).ids, library.encode(text)
        if found != expected:
            raise DataError(
                f"{path} can't be taken over: it makes other tokens of {text[:20]!r} ({found[:8]}) than SentencePiece "
                f"({expected[:8]}). Save it as a fast tokenizer with transformers."
            )
