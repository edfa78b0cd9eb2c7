"""Texts: read, cleaned, each kept once, split so that no document and no text is on two sides."""

import json
from collections import Counter

import pytest

from experiments.tasks.corpora import prepare
from experiments.tasks.sentiment import (
    SPLITS,
    Example,
    clean,
    fingerprint,
    in_splits,
    read_vader,
    split_of,
    without_duplicates,
)

AMAZON = "1_1\t-0.9\tno picture &amp; no  sound.\n1_2\t-0.15\tneutral\n2_1\t1.5\tGood\tbuy\n"


@pytest.fixture
def vader(tmp_path):
    """A folder as the archive unpacks."""
    (tmp_path / "amazonReviewSnippets_GroundTruth.txt").write_text(AMAZON)
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text("7\t0.5\tfine\n8\t-0.49\tmeh\n")
    return tmp_path


def test_reading_the_rated_texts(vader):
    assert read_vader(vader, "amazon") == [
        Example("no picture & no sound.", 0, "1"),
        Example("Good buy", 1, "2"),
    ]
    assert read_vader(vader, "movies") == [Example("fine", 1, "7")]
    with pytest.raises(ValueError, match="no domain 'films' in this data; there are movies"):
        read_vader(vader, "films")


def test_texts_that_differ_in_case_and_signs_are_one():
    assert clean(" a &lt;b&gt;\n c ") == "a <b> c"
    assert fingerprint("It's GREAT!") == fingerprint("its great")
    assert fingerprint(":)") != fingerprint(":(")


def test_duplicates_are_dropped_over_the_union():
    domains = {
        "a": [Example("One!", 1, "1"), Example("one", 1, "2"), Example("both", 0, "3")],
        "b": [Example("ONE", 1, "9"), Example("Both", 1, "9"), Example("two", 0, "9")],
    }
    assert without_duplicates(domains) == {"a": domains["a"][:1], "b": domains["b"][2:]}


def test_a_document_has_one_split_and_shares_are_as_stated():
    examples = [Example(f"text {i}", i % 2, str(i // 5)) for i in range(5000)]
    splits = in_splits("a", examples, seed=0)
    documents = {split: {example.document for example in members} for split, members in splits.items()}
    assert sum(map(len, splits.values())) == 5000
    for first in SPLITS:
        for second in SPLITS:
            assert first == second or not documents[first] & documents[second]
    assert [len(splits[split]) / 5000 for split in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.04)
    assert in_splits("a", reversed(examples), seed=0) == splits  # the order of the file does not matter
    assert Counter(split_of("a", str(i), 0) == split_of("a", str(i), 1) for i in range(1000))[False] > 200


def test_too_few_examples():
    with pytest.raises(ValueError, match="domain 'a' leaves 0 examples for validation; 10 are needed"):
        in_splits("a", [Example(str(i), 0, "same") for i in range(40)], seed=1)


def test_no_leakage_in_what_is_written(tmp_path, tiny_encoder, tiny_texts):
    from datasets import load_from_disk

    rows = [json.loads(line) for line in (tiny_texts / "films.jsonl").read_text().splitlines()]
    own = tmp_path / "own"
    own.mkdir()
    for domain in ("films", "books"):  # the same texts in both domains, in other letters
        lines = [
            json.dumps({**row, "text": row["text"].upper() if domain == "books" else row["text"]})
            for row in rows
        ]
        extra = [
            json.dumps({"text": f"{domain} {i}", "label": i % 2, "document": f"x{i}"}) for i in range(150)
        ]
        (own / f"{domain}.jsonl").write_text("\n".join(lines + extra))
    out = tmp_path / "out"
    corpora = {domain: {"path": str(own / f"{domain}.jsonl")} for domain in ("films", "books")}
    given = {"encoder": str(tiny_encoder), "max_length": 6, "limits": {"validation": 12}, "split_seed": 0}
    prepare(out, corpora=corpora, **given)
    counts = json.loads((out / "counts.json").read_text())
    assert counts["films/validation"]["n"] == 12
    assert sum(counts[f"books/{split}"]["n"] for split in ("train", "test")) <= 150
    for domain in ("films", "books"):
        documents = {split: set(load_from_disk(str(out / domain / split))["document"]) for split in SPLITS}
        assert not documents["train"] & documents["test"]
        assert not documents["validation"] & (documents["train"] | documents["test"])
    assert max(map(len, load_from_disk(str(out / "films" / "train"))["input_ids"])) == 6
