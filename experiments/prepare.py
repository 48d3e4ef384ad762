"""Raw text to a clean dataset, with everything that was removed, and why, beside it.

    python -m llmos_jax.main prepare --config=experiments/prepare.py:data=corpus --workdir=datasets/corpus
    python -m llmos_jax.main --config=experiments/gpt.py:data=datasets/corpus

Hardware: any number of CPU cores; a worker takes some 0.3 GB at the default size of shards, whatever the corpus takes.
Options (`--config=experiments/prepare.py:data=PATH+PATH,chain=web`):
    data         what to clean: files, folders or URLs of text, jsonl, csv, parquet, arrow, HTML or WARC, compressed or not;
                 tfds:NAME; stdlib. Several as PATH+PATH: of duplicates the one of the source named first stays.
    chain        text (default: books, manuals, documentation, in any language), web (English pages by the rules and
                 thresholds of FineWeb: Penedo et al. 2024), code, or none (documents as they are read)
    evaluations  files or folders of evaluation texts: documents that hold 13 words in a row of one are removed
    pii          personal data: label ([EMAIL] in its place) or none; web: label, all others: none. The step comes before the
                 first that cuts texts, as it needs what stands around a datum; what is cut is looked at again, and no text
                 of the dataset holds what was found (needs 'llmos-jax[privacy]')
    sample       share of the documents that are taken, chosen by their keys (1: all)
    licence      licence of these sources, kept with every document
    smoke        a small part of the standard library: proves that everything works, in seconds
Steps are a list; any setting of one is reached by its name: `--config.steps.gopher_quality.min_words=20`.
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.data.sources import parse_sources, split_paths
from llmos_jax.errors import ConfigError

DUPLICATES = [{"step": "exact_duplicates"}, {"step": "minhash_duplicates"}]
CHAINS = {
    "none": [{"step": "pii"}],
    # Gopher's words (Rae et al. 2021) with room for other languages (some write without blanks), tables and symbols.
    "text": [
        {"step": "normalise"},
        {"step": "language"},
        {"step": "gopher_repetition"},
        {"step": "gopher_quality", "min_letter_words": 0.5, "min_stop_words": 0, "max_mean_word_length": 40.0},
        *DUPLICATES,
        {"step": "pii"},
        {"step": "repeated_paragraphs"},
        {"step": "length", "at_least": 200},
    ],
    "web": [
        {"step": "url"},
        {"step": "language", "languages": ["en"], "min_score": 0.65},
        {"step": "normalise"},
        {"step": "gopher_repetition"},
        {"step": "gopher_quality"},
        {"step": "pii"},
        {"step": "c4_lines", "needs_end_mark": False},
        {"step": "c4_quality"},
        {"step": "fineweb_quality"},
        {"step": "minhash_duplicates"},
    ],
    "code": [
        {"step": "normalise", "form": "none", "max_blank_lines": 3},
        {"step": "length", "at_least": 50},
        {"step": "code_quality"},
        *DUPLICATES,
        {"step": "pii"},
    ],
}


def get_config(arg=""):
    """Returns the choices of this preparation; everything else has its default beside its owner."""
    options = parse_arg(arg, data="", chain="text", evaluations="", pii="", licence="", sample=1.0, smoke=False)
    if options["chain"] not in CHAINS:
        raise ConfigError(f"chain={options['chain']!r} is unknown; known: {', '.join(CHAINS)}.")
    config = ConfigDict()
    config.name = "text"
    sources = parse_sources(options["data"] or ("stdlib:asyncio" if options["smoke"] else "stdlib"))
    config.sources = [source | {"repair": True, "licence": options["licence"]} for source in sources]
    steps = [{"step": "sample", "share": options["sample"]}] if options["sample"] < 1 else []
    steps += CHAINS[options["chain"]]
    pii = options["pii"] or ("label" if options["chain"] == "web" else "none")
    if pii not in ("label", "none"):
        raise ConfigError(f"pii={pii!r} is unknown; known: label, none (pseudonyms: --config.steps.pii.replacement=pseudonym).")
    place = steps.index({"step": "pii"})
    if pii == "none":
        steps.pop(place)
        place = len(steps)
    if options["evaluations"]:  # whose texts have no labels
        steps.insert(place, {"step": "decontaminate", "paths": split_paths(options["evaluations"])})
    config.steps = steps
    return config
