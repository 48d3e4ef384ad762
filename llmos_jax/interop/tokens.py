"""The tokenizer of a checkpoint of transformers, and whether it fits the weights."""

import json

from llmos_jax.data.spm import MODEL_NAME
from llmos_jax.data.tokenizer import load_tokenizer
from llmos_jax.errors import DataError, DataIdentityMismatch

TOKENIZER_FILE = "tokenizer.json"


def tokenizer_file(checkpoint):
    """Returns the path of a Checkpoint's tokenizer.json, or of its SentencePiece model; None where it has neither."""
    files = (checkpoint.folder / name for name in (TOKENIZER_FILE, MODEL_NAME))
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(checkpoint):
    """Returns the tokenizer of a Checkpoint; DataError when there is none that can be read.

    Raises DataIdentityMismatch when it has more tokens than the model has embeddings.
    """
    file = tokenizer_file(checkpoint)
    if file is None:
        raise DataError(f"{checkpoint.folder} has no {TOKENIZER_FILE} and no {MODEL_NAME}.")
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise DataIdentityMismatch(
            f"{file} has {tokenizer.vocab_size} tokens, and the model {checkpoint.config.vocab_size} embeddings (vocab_size of "
            f"config.json): they do not belong together."
        )
    return tokenizer


def check_tokenizer(checkpoint, text):
    """Raises DataIdentityMismatch when a run's tokenizer (its `tokenizer.json`'s text) is not that of a Checkpoint."""
    own = read_tokenizer(checkpoint)
    if text is None or json.loads(text) != own.to_json():
        raise DataIdentityMismatch(
            f"train.init_from={checkpoint.folder} has another tokenizer than this run's data: set data.tokenizer="
            f"{tokenizer_file(checkpoint)}."
        )
