"""Fine-tuning the shipped model on real pages learns, well above chance, on pages it has not seen."""

import json
from pathlib import Path

import pytest

from examples import fine_tune_on_books as books
from gptfast.training import SUMMARY_FILE, read_texts, split_held_out

BOOKS = Path(__file__).parent.parent.parent / "shared" / "data" / "books"
# without ftfy and spaCy the shipped tokenizer says so, once; what is learnt is much the same
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot be imported .pip install"),
    pytest.mark.skipif(not BOOKS.exists(), reason="no books beside the repository"),
]


@pytest.fixture(scope="module")
def texts():
    """Of each book the first part, and its held-out end."""
    whole = read_texts([BOOKS / f"{book}.txt" for book in books.BOOKS])
    return zip(*(split_held_out(text, books.HELD_OUT) for text in whole), strict=True)


def test_authorship(texts, tmp_path):
    seen, unseen = texts
    rows, held_out = books.authorship(seen, 240, seed=0, words=30), books.authorship(unseen, 120, seed=1, words=30)
    settings = ["--learning-rate", "1e-3", "--epochs", "2", "--dropout", "0", "--attention-dropout", "0", "--json"]
    figures = books.fine_tune("classification", rows, held_out, tmp_path, settings)
    assert figures["chance"] == 0.25
    assert figures["held_out_accuracy"] >= 0.5  # of 120: 6 standard deviations
    assert json.loads((tmp_path / "model" / SUMMARY_FILE).read_text())["examples"] == 240


def test_the_examples_data_is_what_it_says():
    """Pages do not overlap, the right line follows its context, and both choices are drawn."""
    text = "\n".join(f"line {i} has words {i * i} and more" for i in range(200))
    pages = books.authorship([text] * 4, 40, seed=0, words=20)
    for book in books.BOOKS:
        assert len({page["text"] for page in pages if page["label"] == book}) == 10
    rows = books.next_line([text] * 4, 40, seed=0)
    for row in rows:
        right = row[f"choice_{row['label']}"]
        numbers = [int(word) for word in row["context"].split() if word.isdecimal()]
        assert int(right.split()[1]) == numbers[-2] + 1
    assert {row["label"] for row in rows} == {"0", "1"}
