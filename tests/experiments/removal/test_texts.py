"""Texts: sources, cleaning, and splits that leak nothing."""

import json

import pytest

from experiments import assets
from experiments.tasks import texts
from experiments.tasks.texts import Source, Text, prepare, read


def test_files_of_every_kind(files):
    assert len(read(Source(source=str(files / "nice.txt")))) == 60
    rude = read(Source(source=str(files / "rude.jsonl"), column="body.text", document="page"))
    assert rude[3] == Text("go away silly ass number 3", "1")
    assert read(Source(source=str(files / "table.tsv"), column="toxic"))[0].text == '"quoted'
    assert read(Source(source=str(files / "table.csv"), column="toxic", context="neutral"))[0] == Text(
        "a, b", "0", "plain"
    )


def test_rows_are_kept_by_a_column(files):
    kept = read(Source(source=str(files / "rude.jsonl"), column="body.text", where="score", minimum=0.5))
    assert len(kept) == 30
    kept = read(Source(source=str(files / "rude.jsonl"), column="body.text", where="page", equals="3"))
    assert [text.text[-1] for text in kept] == ["6", "7"]


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """The two assets with texts, a few rows of each, in a temporary cache."""
    folders = {"texts": tmp_path / "texts", "prompts": tmp_path / "prompts"}
    rows = {
        "Toxicity/test.jsonl": [{"text": "what a  fool &amp; pig"}],
        "BoolQ/combined.jsonl": [
            {"passage": "Cat -- A cat is an animal."},
            {"passage": "Cat -- Cats purr."},
            {"passage": "no title"},
        ],
        "wikiDataset/test.jsonl": [
            {"text": "Too short."},
            {"text": "one two three four five six seven eight nine"},
        ],
        "Factual-Summary-Pairs/test.jsonl": [
            {"article_sent": "a b c", "correct_sent": "a b", "incorrect_sent": "a c"},
            {"article_sent": "d e f", "correct_sent": "d e.", "incorrect_sent": "d e"},
        ],
    }
    for name, lines in rows.items():
        path = folders["texts"] / name
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(json.dumps(line) for line in lines))
    folders["prompts"].mkdir()
    for kind in texts.PROMPT_KINDS:
        (folders["prompts"] / f"rtp_{kind}.txt").write_text(f"a prompt about {kind}\n\n")
    monkeypatch.setattr(assets, "folder", folders.__getitem__)


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("toxic", 1, "what a fool & pig"),
        ("encyclopedic", 1, "A cat is an animal."),
        ("harmless prompts", 1, "one two three four five six seven eight"),
        ("toxic prompts", 7, "a prompt about profanity"),
        ("correct summaries", 1, "a b"),
        ("incorrect summaries", 1, "a c"),
    ],
)
def test_lists_from_packages(archives, name, count, first):
    found = read(Source(source=name))
    assert (len(found), found[0].text) == (count, first)


def test_summaries_continue_their_article(archives):
    (text,) = read(Source(source="correct summaries"))
    assert text.context == "a b c\nSummary:"
    assert text.document == "a b c"


def test_prepare_leaks_nothing(tmp_path, files):
    (tmp_path / "prompts.txt").write_text("you fool of a rat number 0\nWhat a stupid pig, number\nsay more")
    rude = {"source": str(files / "rude.jsonl"), "column": "body.text", "document": "page"}
    keep = {"source": str(files / "nice.txt"), "limit": 50}
    prompts = {"mine": {"source": str(tmp_path / "prompts.txt"), "limit": 2}}
    shared = {"limits": {"train": 20}, "split_seed": 0}
    prepare(tmp_path / "out", remove=rude, keep=keep, prompts=prompts, **shared)
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["prompts/mine"] == 2
    assert counts["remove/train"] == 20
    names = ("train", "validation", "test")
    splits = [texts.load(tmp_path / "out" / "remove" / f"{name}.jsonl") for name in names]
    pages = [{text.document for text in members} for members in splits]
    assert sum(map(len, pages)) == len(set().union(*pages))
    held = {text.text for members in splits for text in members}
    assert not any(text.startswith("what a stupid pig") for text in held)  # a prompt begins them
    assert "you fool of a rat number 0" not in held


def test_one_file_as_texts_and_prompts_is_told_by_what_is_left(tmp_path, files):
    nice = {"source": str(files / "nice.txt")}
    with pytest.raises(
        ValueError, match=r"nothing is left to remove .*60 texts were read, and 0 are left without"
    ):
        prepare(tmp_path, remove=nice, keep=nice, prompts={"mine": nice}, limits={}, split_seed=0)


def test_a_text_counts_once_whatever_its_case():
    twice = [Text("Hello there", "1"), Text("hello, THERE!", "2"), Text("hello there", "3", context="x")]
    assert texts.without(twice, ()) == [twice[0], twice[2]]


def test_drawn_does_not_depend_on_the_given_order():
    many = [Text(str(i), str(i)) for i in range(20)]
    assert texts.drawn(many, 5, 1) == texts.drawn(many[::-1], 5, 1)
    assert texts.drawn(many, 5, 1) != texts.drawn(many, 5, 2)


def test_bad_sources(files, tmp_path):
    said = r"no data file .*absent.txt.*lists from PyPI need no file: toxic"
    with pytest.raises(FileNotFoundError, match=said):
        read(Source(source=str(tmp_path / "absent.txt")))
    with pytest.raises(ValueError, match=r"has no column 'text'; it has body, page, score"):
        read(Source(source=str(files / "rude.jsonl")))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no texts in column 'text'"):
        read(Source(source=str(tmp_path / "empty.txt")))
    with pytest.raises(FileNotFoundError, match="no hub set of that name"):
        read(Source(source="no-such/data-set"))


def test_the_key_of_a_source_that_the_hub_does_not_give_is_named(files, tmp_path):
    nice, absent = {"source": str(files / "nice.txt")}, {"source": str(tmp_path / "no-such-data-set")}
    shared = {"remove": nice, "limits": {}, "split_seed": 0}
    with pytest.raises(ValueError, match=r"^prompts\.mine: .*no data file"):
        prepare(tmp_path / "out", keep=nice, prompts={"mine": absent}, **shared)
    with pytest.raises(ValueError, match=r"^keep: .*no data file"):
        prepare(tmp_path / "out", keep=absent, prompts={}, **shared)


def test_a_split_without_texts_is_an_error(files, tmp_path):
    (tmp_path / "one.txt").write_text("just one")
    remove, keep = ({"source": str(path)} for path in (tmp_path / "one.txt", files / "nice.txt"))
    with pytest.raises(ValueError, match="nothing is left to remove in the"):
        prepare(tmp_path / "out", remove=remove, keep=keep, prompts={}, limits={}, split_seed=0)
