"""Raw text to a clean dataset, with a folder of everything that was removed and why.

    python -m llmos_jax.main prepare --config=experiments/prepare.py:data=corpus --workdir=datasets/corpus
    python -m llmos_jax.main --config=experiments/gpt.py:data=datasets/corpus

Hardware: any number of CPU cores; a worker takes some 0.3 GB at the default shard size, whatever the size of the corpus.
Options (`--config=experiments/prepare.py:data=PATH+PATH`):
    data     what to clean: files, folders or URLs of text, jsonl, csv, parquet, arrow, HTML or WARC, compressed or not;
             tfds:NAME; stdlib. Several as PATH+PATH: of duplicates the one of the source named first stays.
    licence  licence of these sources, kept with every document
Steps are a list; any setting of one is reached by its name: `--config.steps.length.at_least=500`.
"""

from ml_collections import ConfigDict

from llmos_jax.config import parse_arg
from llmos_jax.data.sources import parse_sources


def get_config(arg=""):
    """Returns the choices of this preparation; everything else has its default beside its owner."""
    options = parse_arg(arg, data="stdlib", licence="")
    config = ConfigDict()
    config.name = "text"
    sources = parse_sources(options["data"])
    config.sources = [source | {"repair": True, "licence": options["licence"]} for source in sources]
    config.steps = [
        {"step": "length", "at_least": 200},
    ]
    return config
