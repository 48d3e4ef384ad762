"""The report holds every figure, escapes what it shows, and loads nothing."""

from html.parser import HTMLParser

from llmos_jax.evaluate.report import write_report
from llmos_jax.train.metrics import CATEGORIES

HOSTILE = "<script>alert('x')</script> & \"quotes\" \x07"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def report(tmp_path, metrics):
    summary = {
        "step": 1200,
        "evaluation": {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.234},
        "baselines": {"gzip -9 bits per byte": 1.744},
        "throughput": {"throughput/tokens_per_second": 12345.6, "throughput/mfu": 0.42},
        "goodput": 0.87,
        "seconds": dict.fromkeys(CATEGORIES, 20.0 / (len(CATEGORIES) - 1)) | {"step": 80.0},
        "machine": "2 x <chip>",
    }
    write_report(tmp_path / "r.html", title=HOSTILE, settings={"a": HOSTILE}, metrics=metrics, summary=summary)
    page = (tmp_path / "r.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return page, reader


def test_figures_curves_and_samples(tmp_path):
    metrics = [
        {"step": s, "train/loss": 5 - s / 400, "train/learning_rate": 1e-3, "train/gradient_norm": 1.0} for s in range(1, 1200)
    ]
    metrics += [{"step": s, "validation/loss": 5 - s / 500, "validation/bits_per_byte": 2.0} for s in (400, 800, 1200)]
    metrics += [{"step": 5, "train/loss": "nan"}, {"step": 1200, "samples": [{"prompt": "def ", "text": HOSTILE}]}]
    page, reader = report(tmp_path, metrics)
    text = " ".join(reader.text)
    for shown in ("1.234", "12.18", "1.744", "12,346", "42%", "87%", "2 x <chip>", "step 80.0 s (80%)", "after step 1,200"):
        assert shown in text, shown
    for category in CATEGORIES:
        assert f"{category.replace('_', ' ')} " in text and f"title='{category.replace('_', ' ')}'" in page, category
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags and "alert('x')" in text
    assert tags.count("svg") >= 4 and tags.count("polyline") >= 5
    assert not any("src" in attributes or "href" in attributes for _, attributes in reader.tags)
    assert "nan" not in page.split("<style>")[1].split("</style>")[1].split("<h2>Samples")[0].lower().replace("nance", "")


def test_a_run_without_curves(tmp_path):
    _, reader = report(tmp_path, [])
    assert "svg" not in [tag for tag, _ in reader.tags]
