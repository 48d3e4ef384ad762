"""Decisions of the published rules against datatrove 0.10.1's, recorded by `scripts/agreement.py record`.

The documents are pages of Python's documentation and library, of SQLite's documentation, the King James Bible and the jargon
file, and some that were made to break one rule each.
"""

import json
import pathlib

from scripts.agreement import decisions

ROWS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "agreement.jsonl").read_text().splitlines()]
SAME_REASON = {
    "gopher_short_doc": "too few words",
    "gopher_below_avg_threshold": "short words",
    "gopher_above_avg_threshold": "long words",
    "gopher_too_many_hashes": "too many hashes",
    "gopher_too_many_bullets": "too many bullets",
    "gopher_too_many_end_ellipsis": "too many lines end with an ellipsis",
    "gopher_below_alpha_threshold": "too few words with letters",
    "gopher_enough_stop_words": "too few stop words",
    "dup_para_frac": "repeats paragraphs",
    "dup_line_frac": "repeats lines",
    "dup_line_char_frac": "repeats characters in lines",
    "line_punct_ratio": "few lines end a sentence",
    "short_line_ratio": "many short lines",
    "char_dup_ratio": "repeats lines",
    "curly_bracket": "has a brace",
    "lorem_ipsum": "lorem ipsum",
    "too_few_sentences": "too few sentences",
    "": "",
}
SAME_REASON |= {f"top_{n}_gram": f"one {n}-gram is much of the text" for n in (2, 3, 4)}
SAME_REASON |= {f"duplicated_{n}_n_grams": f"repeats {n}-grams" for n in range(5, 11)}


def test_decisions_and_reasons_are_those_of_datatrove():
    ours = decisions([row["text"] for row in ROWS])
    assert set(ours) == set(ROWS[0]["datatrove"])
    for name, reasons in ours.items():
        theirs = [row["datatrove"][name] for row in ROWS]
        differ = [row["id"] for row, their, our in zip(ROWS, theirs, reasons, strict=True) if bool(their) != bool(our)]
        assert len(differ) <= 0.01 * len(ROWS), (name, differ)
        other = [
            (row["id"], their, our)
            for row, their, our in zip(ROWS, theirs, reasons, strict=True)
            if our != "emptied" and SAME_REASON[their] != our
        ]
        assert len(other) <= 0.03 * len(ROWS), (name, other)
        # The documents try the rule: some are kept, some are not.
        assert 5 < sum(map(bool, theirs)) < len(ROWS) - 5
