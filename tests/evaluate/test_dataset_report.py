"""The page of a clean dataset: what it shows, what it escapes, that it loads nothing."""

import errno
import html.parser
import json
import re

import pytest

from llmos_jax.api import run_preparation
from llmos_jax.config import parse
from llmos_jax.data.clean.dataset import open_dataset
from llmos_jax.data.clean.pipeline import PrepareConfig
from llmos_jax.errors import DataError
from llmos_jax.evaluate import page as page_lib
from llmos_jax.evaluate.dataset_report import REPORT_FILE, write_dataset_report
from llmos_jax.evaluate.page import bar_chart, table


class Reader(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.links = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def version(tmp_path):
    lines = [
        {"text": f"<script>alert({number})</script> and some words of document {number} " * (number % 5)}
        for number in range(1, 88)
    ]
    lines += lines[3:4] * 2
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    steps = [{"step": "exact_duplicates"}, {"step": "length", "at_least": 100}]
    tree = {"sources": [{"path": str(tmp_path / "web.jsonl"), "licence": "CC0"}], "workers": 1, "steps": steps}
    return run_preparation(parse(PrepareConfig, tree), tmp_path / "dataset")


def test_the_page_shows_the_funnel_and_samples_and_escapes_all_text(version):
    page = (version.directory / REPORT_FILE).read_text()
    reader = Reader(page)
    text = " ".join(reader.words)
    for words in ("What each step left", "too short", "CC0", "Samples of what was kept", "Samples of what was removed",
                  "Characters of a document", "is damaged near line 90", "length/characters"):  # fmt: skip
        assert words in text, words
    assert "script" not in reader.tags and not reader.links
    assert "<script>alert(" in text  # as text
    last = version.manifest["funnel"][-1]
    assert f"{last['documents']:,} documents" in text


def bars(page, title):
    """The (label, count) of the bars of a chart, kept and removed in turn."""
    (chart,) = [part for part in page.split("<svg")[1:] if f"<text class='title' x='58' y='20'>{title}" in part]
    found = re.findall(r"<title>([^<]*): ([\d,]+)</title>", chart)
    return [(float(label), int(count.replace(",", ""))) for label, count in found]


def test_charts_count_every_document_once_and_groups_are_named(version):
    page = (version.directory / REPORT_FILE).read_text()
    funnel = {entry["step"]: entry for entry in version.manifest["funnel"]}
    lengths = bars(page, "length/characters")
    assert sum(count for _, count in lengths[::2]) == funnel["length"]["documents"]
    assert sum(count for _, count in lengths[1::2]) == funnel["length"]["documents_in"] - funnel["length"]["documents"] > 0
    assert all(count == 0 for label, count in lengths[::2] if label + 6 < 100)  # none is kept below the threshold
    assert sum(count for _, count in bars(page, "Characters of a document")) == funnel["read"]["documents"]
    assert bars(page, "exact_duplicates/group") == [(3.0, 1)]
    assert "<td class='right'>3</td><td class='left'>exact_duplicates</td><td class='left'>web.jsonl/web.jsonl:4</td>" in page


def test_the_same_dataset_gives_the_same_page(version, tmp_path):
    write_dataset_report(tmp_path / "again.html", open_dataset(tmp_path / "dataset"))
    assert (tmp_path / "again.html").read_text() == (version.directory / REPORT_FILE).read_text()


def test_a_report_that_finds_no_room_is_written_by_the_next_run(version, tmp_path, monkeypatch):
    page = (version.directory / REPORT_FILE).read_text()
    (version.directory / REPORT_FILE).unlink()
    (version.directory / f".{REPORT_FILE}.0123").write_text("half of it")
    settings = parse(PrepareConfig, version.manifest["settings"])

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(page_lib, "write_whole", full)
        with pytest.raises(DataError, match="report.html could not be written .No space left on device.: make room"):
            run_preparation(settings, tmp_path / "dataset")
    again = run_preparation(settings, tmp_path / "dataset")
    assert again.directory == version.directory and (again.directory / REPORT_FILE).read_text() == page
    assert not list(again.directory.glob(".*"))


def test_pieces():
    chart = bar_chart("a <title>", [("x", 3), ("y", 0)])
    assert "&lt;title&gt;" in chart and chart.count("<rect") == 2 and "<title>x: 3</title>" in chart
    assert bar_chart("none", []) == ""
    rows = table(("name", "count"), [("<b>", 12345), ("c", 2)])
    assert "&lt;b&gt;" in rows and "<td class='right'>12,345</td>" in rows
