"""The script that trains a quality classifier, from files to a step that scores."""

import numpy as np

from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.steps import apply_step, parse_steps
from scripts import train_classifier


def test_from_files_to_scores(tmp_path, capsys):
    random = np.random.default_rng(0)
    words = {"good": ["river", "mill", "house", "the"], "pool": ["click", "offer", "now", "the"]}
    for name, vocabulary in words.items():
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(" ".join(random.choice(vocabulary, 40)))
    arguments = [f"--{name}={tmp_path / name}" for name in words]
    for output in ("one.json", "two.json"):
        train_classifier.main([str(tmp_path / output), *arguments, "--documents=20", "--bits=12"])
    said = capsys.readouterr().out
    assert "18 good texts and 18 of the pool" in said and "100.0% are told apart" in said
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    (step,) = parse_steps([{"step": "quality_classifier", "path": str(tmp_path / "one.json"), "min_score": 0.5}])
    _, reasons = apply_step(step, [Documents.of(["the mill by the river", "click now, an offer"])])[0]
    assert reasons.tolist() == ["", "low quality"]


def test_area_under_the_curve():
    good, pool = np.array([0.5, 0.9, 0.4]), np.array([0.5, 0.1])
    pairs = [1.0 if one > two else 0.5 if one == two else 0.0 for one in good for two in pool]
    assert train_classifier.area_under_curve(good, pool) == np.mean(pairs)
