"""Raw text to a clean dataset, with a folder of everything that was removed and why.

    python -m llmos_jax.main prepare --config=experiments/prepare.py:data=corpus --workdir=datasets/corpus
    python -m llmos_jax.main --config=experiments/gpt.py:data=datasets/corpus

Hardware: any number of CPU cores; a worker takes some 0.3 GB at the default shard size, whatever the size of the corpus.
Options (`--config=experiments/prepare.py:data=PATH+PATH`):
    data     what to clean: files, folders or URLs of text, jsonl, csv, parquet, arrow, HTML or WARC, compressed or not;
             tfds:NAME; stdlib. Several as PATH+PATH: of duplicates the one of the source named first stays.
    licence  licence of these sources, kept with every document
    kind     what it is, which decides the steps: text (documents in any language; thresholds that fit manuals and books),
             web (FineWeb's steps and thresholds, for English pages), code (that of The Stack); default: code for stdlib
Steps are a list; any setting of one is reached by its name: `--config.steps.length.at_least=500`.
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.data.sources import parse_sources
from llmos_jax.errors import ConfigError

TEXT = (
    {"step": "normalise"},
    {"step": "length", "at_least": 200},
    {"step": "exact_duplicates"},
    # Says which language a document is in; none is removed.
    {"step": "language"},
    # Gopher's thresholds are for English web pages: manuals have fewer letters, other languages no English stop words, and
    # some no blanks between words.
    {"step": "gopher_quality", "min_words": 30, "max_mean_word_length": 40.0, "min_letter_words": 0.6, "min_stop_words": 0},
    {
        "step": "gopher_repetition",
        "max_top_ngrams": [0.4, 0.36, 0.32],
        "max_duplicate_ngrams": [0.30, 0.28, 0.26, 0.24, 0.22, 0.20],
    },
    {"step": "minhash_duplicates"},
    {"step": "repeated_paragraphs"},
)
WEB = (
    {"step": "normalise"},
    {"step": "url"},
    {"step": "language", "languages": ["en"], "min_score": 0.65},
    {"step": "gopher_repetition"},
    {"step": "gopher_quality"},
    {"step": "c4_lines", "needs_end_mark": False},
    {"step": "c4_quality"},
    {"step": "fineweb_quality"},
    {"step": "minhash_duplicates"},
)
CODE = (
    {"step": "normalise"},
    {"step": "length", "at_least": 200},
    {"step": "code_quality"},
    {"step": "exact_duplicates", "ignore_case_and_blanks": False},
    {"step": "minhash_duplicates"},
)
STEPS = {"text": TEXT, "web": WEB, "code": CODE}


def get_config(arg=""):
    """Returns the choices of this preparation; everything else has its default beside its owner."""
    options = parse_arg(arg, data="stdlib", licence="", kind="")
    kind = options["kind"] or ("code" if options["data"].startswith("stdlib") else "text")
    if kind not in STEPS:
        raise ConfigError(f"kind={kind!r} is unknown; known: {', '.join(STEPS)}.")
    config = ConfigDict()
    config.name = "text"
    sources = parse_sources(options["data"])
    config.sources = [source | {"repair": True, "licence": options["licence"]} for source in sources]
    config.steps = [dict(step) for step in STEPS[kind]]
    return config
