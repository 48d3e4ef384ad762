"""What differential privacy hides: the exposure of canaries, and how well members of the training data are told from others.

    python scripts/measure_privacy.py --epsilon 8

trains one small model twice on the same documents (first sentences of the standard library's docstrings), plainly and with
DP-SGD, each document its own record. Among the documents stand canaries, "the code of NAME is 48213", once each. Printed is
one JSON line per training:

    exposure_bits    log2(candidates) - log2(rank of the canary's code among all candidates by the model's loss) (Carlini et
                     al. 2019): a guess at random has 1.4 on average, the most is log2(candidates)
    membership_auc   how well the loss tells training documents from validation documents: 0.5 is a guess
    bits_per_byte    of validation documents
    step_seconds, cost   of a step, and over that of the plain one
"""

import argparse
import ast
import json
import pathlib
import random
import sysconfig
import tempfile

import numpy as np

from llmos_jax import api

EXPERIMENT = pathlib.Path(__file__).parent.parent / "experiments" / "gpt.py"
LENGTH = 48
NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kay Leo Mia Ned Ola Pia".split()  # noqa: SIM905


def sentences(count, seed):
    """Returns `count` different first sentences of docstrings, that fit a record."""
    found = {}
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    packages = ("asyncio", "concurrent/futures", "email", "http", "importlib", "logging", "multiprocessing", "unittest")
    for file in sorted(file for name in (".", *packages) for file in (library / name).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                line = text.strip().splitlines()[0]
                if 20 <= len(line.encode()) < LENGTH:
                    found[line] = None
    return random.Random(seed).sample(list(found), count)


def write_corpus(file, texts, canaries):
    """Writes the documents in a random order, as jsonl."""
    texts = [*texts, *canaries]
    random.Random(1).shuffle(texts)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def settings_of(data, args, privacy):
    """Returns the Settings of a training."""
    overrides = {
        "data.tokenizer": "byte", "data.length": LENGTH, "data.packing": "document", "data.validation_fraction": 0.25,
        "model.context": LENGTH, "model.width": args.width, "model.layers": 2, "model.heads": 4,
        "optim.name": "adamw", "optim.learning_rate": args.learning_rate, "optim.weight_decay": 0, "optim.clip_norm": "none",
        "train.steps": args.steps, "train.batch_size": args.batch_size, "train.max_seconds": "none",
        "train.evaluate_every_steps": "none", "train.sample_every_steps": "none", "train.log_every_steps": 100,
        "task.evaluation_batches": "none", "checkpoint.every_steps": "none",
    } | {f"train.privacy.{name}": value for name, value in privacy.items()}  # fmt: skip
    pairs = [(name, str(value)) for name, value in overrides.items()]
    return api.load_settings(f"{EXPERIMENT}:size=nano,data={data}", pairs)[0]


def loss_function(directory):
    """Returns `losses(texts) -> nats [n]` of the model of a run directory, each text a document of its own."""
    import jax

    from llmos_jax.data.text import DocumentPacker, expand
    from llmos_jax.data.tokenizer import load_tokenizer
    from llmos_jax.tasks import language

    loaded, tokenizer = api.load(directory), load_tokenizer(directory / "tokenizer.json")

    @jax.jit
    def nll(params, rows):
        def one(row):
            return language.measure(loaded.generator.handle.merge(params), jax.tree.map(lambda x: x[None], row))["nll"]

        return jax.vmap(one)(rows)

    def losses(texts):
        packer = DocumentPacker(LENGTH, tokenizer.end_id, tokenizer.token_byte_lengths, np.int32)
        records = [next(packer.add(tokens)) for tokens in tokenizer.encode_all(texts)]
        found = []
        for start in range(0, len(records), 1024):
            part = records[start : start + 1024]
            rows = expand({name: np.stack([record[name] for record in part]) for name in part[0]})
            found.append(np.asarray(nll(loaded.params, rows)))
        return np.concatenate(found)

    return losses


def exposures(losses, canaries, candidates):
    """Returns the exposure of every (name, code), bits."""
    bits = []
    for name, code in canaries:
        others = [c for c in candidates if c != code]
        of_all = losses([canary(name, c) for c in [code, *others]])
        rank = 1 + int((of_all[1:] < of_all[0]).sum())
        bits.append(float(np.log2(len(of_all)) - np.log2(rank)))
    return bits


def canary(name, code):
    """Returns the document that holds a canary."""
    return f"the code of {name} is {code}"


def area_under_curve(members, others):
    """Returns the chance that a member's loss is below another's."""
    ranks = np.argsort(np.argsort(np.concatenate([members, others])))
    below = ranks[len(members) :].sum() - len(others) * (len(others) - 1) / 2
    return float(below / (len(members) * len(others)))


def split_texts(settings):
    """Returns ([training texts], [validation texts]) as the run dealt them."""
    from llmos_jax.data.prepare import prepare

    prepared = prepare(settings.data, log=lambda line: None)
    (store, _), found = prepared.stores[0], []
    for split in ("train", "validation"):
        records = store.records(split, range(store.count(split)))["tokens"]
        found.append([prepared.tokenizer.decode([t for t in row if t != prepared.tokenizer.end_id]) for row in records])
    return found


def main():
    """Trains, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--rows_at_once", type=int, default=80, help="gradients held at once; nearly all draws fit")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--candidates", type=int, default=4096)
    args = parser.parse_args()
    draw = random.Random(0)
    candidates = [f"{code:05d}" for code in draw.sample(range(100_000), args.candidates)]
    planted = [(name, draw.choice(candidates)) for name in NAMES]
    with tempfile.TemporaryDirectory(prefix="llmos-privacy-") as folder:
        data = pathlib.Path(folder) / "documents.jsonl"
        write_corpus(data, sentences(args.documents, 0), [canary(*item) for item in planted])
        private = {"epsilon": args.epsilon, "delta": 1e-5, "rows_at_once": args.rows_at_once}
        plain_seconds = None
        for name, privacy in (("plain", {}), ("private", private)):
            settings, directory = settings_of(data, args, privacy), pathlib.Path(folder) / name
            summary = api.run_training(settings, directory)
            losses = loss_function(directory)
            members, others = split_texts(settings)
            seen = [item for item in planted if canary(*item) in set(members)]
            bits = exposures(losses, seen, candidates)
            seconds = summary["seconds"]["step"] / args.steps
            plain_seconds = plain_seconds or seconds
            print(json.dumps({
                "training": name,
                "privacy": summary.get("privacy"),
                "canaries": len(seen),
                "exposure_bits": {"mean": round(float(np.mean(bits)), 2), "median": round(float(np.median(bits)), 2),
                                  "largest": round(max(bits), 2), "most": round(float(np.log2(len(candidates))), 2)},
                "membership_auc": round(area_under_curve(losses(members), losses(others)), 3),
                "bits_per_byte": round(summary["evaluation"]["bits_per_byte"], 3),
                "step_seconds": round(seconds, 4),
                "cost": round(seconds / plain_seconds, 2),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
