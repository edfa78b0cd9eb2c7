"""Corpora in their own forms: each is read into texts, labels and documents, and split without leakage."""

import json
import shlex
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset

from experiments.config import ConfigError, load, study
from experiments.tasks.corpora import STANDING_IN, Example, prepare, read_corpus, split_corpus

ROOT = Path(__file__).parents[2]


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_reviews_in_folders_of_their_class(tmp_path):
    zipped(tmp_path / "movies.zip", {"r/neg/a.txt": "so\nbad", "r/pos/b.txt": "good", "r/README": "no text"})
    assert read_corpus("imdb", str(tmp_path)) == [
        Example("so bad", 0, "r/neg/a.txt"),
        Example("good", 1, "r/pos/b.txt"),
    ]


def test_rated_sentences_of_a_products_reviews(tmp_path):
    text = "* notes\n[t]title\nsize[+2], weight[-1]##small , but heavy\n##no opinion\n[t]\nprice[-3][u]##dear\nlens[+1], cap[-1]##both\n"
    zipped(tmp_path / "products.zip", {"p/Camera.txt": text})
    expected = [Example("small , but heavy", 1, "p/Camera.txt/1"), Example("dear", 0, "p/Camera.txt/2")]
    assert read_corpus("amazon", str(tmp_path)) == expected


@pytest.mark.parametrize(("negative", "positive"), [("x.neg", "x.pos"), ("s.0", "s.1")])
def test_files_with_a_text_a_line(tmp_path, negative, positive):
    (tmp_path / negative).write_text("bad &amp; worse\n\n")
    (tmp_path / positive).write_text("good\n")
    (tmp_path / "SOURCE.txt").write_text("where it is from")
    found = read_corpus("rt", str(tmp_path))
    assert found == [Example("bad & worse", 0, f"{negative}/0"), Example("good", 1, f"{positive}/0")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_tables_by_column(tmp_path, kind):
    rows = [{"review": "fine, but long", "stars": 4}, {"review": "poor", "stars": 2}]
    path = tmp_path / f"stars.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    found = read_corpus("shop", str(path), text="review", label="stars", positive_from=4)
    assert found == [Example("fine, but long", 1, "1"), Example("poor", 0, "2")]
    told = (
        rf"stars\.{kind}, row 1: no column 'text' and no 'label'; it has review, stars: name yours by "
        r"data\.corpora\.shop\.text and data\.corpora\.shop\.label"
    )
    with pytest.raises(ValueError, match=told):
        read_corpus("shop", str(path))
    for given in ({"train": "train[:50%]"}, {"test": "test"}):  # a file is one split: nothing is ignored
        with pytest.raises(ValueError, match="is one file, and one split"):
            read_corpus("shop", str(path), text="review", label="stars", **given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x", "label": 1}\n\n{"text": \n', r"a\.jsonl cannot be read: JSON parse error"),
        (b"[1, 2]\n", r"a\.jsonl, row 1: no column 'label'"),
        (b'{"text": "x", "label": "good"}\n', r"row 1: .*\(column 'label'\) is 'good', which is no number"),
        (
            b'{"text": "x", "label": null}\n',
            "row 1: .* is None, which is no number; labels from 1 are positive",
        ),
        (b'{"text": "x", "label": "nan"}\n', "row 1: .* is 'nan', which is no number"),
        (b'{"text": "caf\xe9", "label": 1}\n', r"a\.jsonl is no UTF-8 text"),
        (b"\n", r"a\.jsonl holds no rows"),
        (b'{"text": " ", "label": 1}\n', r"a\.jsonl holds no text that can be read"),
    ],
)
def test_a_broken_row_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus("shop", str(tmp_path / "a.jsonl"))


def test_a_text_with_a_separator_of_its_own_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two", "label": 1}\n', encoding="utf-8")
    assert [example.text for example in read_corpus("shop", str(tmp_path / "a.jsonl"))] == ["one two"]


def test_a_file_that_is_absent_names_its_neighbours(tiny_texts):
    with pytest.raises(FileNotFoundError, match=r"no data file .*film\.jsonl \(did you mean 'films\.jsonl'"):
        read_corpus("film", str(tiny_texts / "film.jsonl"))


def test_the_hub_through_its_library(monkeypatch):
    import datasets

    splits = {"train[:5%]": [{"text": "a", "label": 1}], "test": [{"text": "b", "label": 0}]}
    given = []

    def load(name, subset, split, revision):
        given.append((name, subset))
        return Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_corpus("imdb", "some/name", subset="full", train="train[:5%]", test="test")
    assert given == [("some/name", "full")] * 2
    assert found == [Example("b", 0, "test/test/0"), Example("a", 1, "train[:5%]/0")]


def test_without_network_it_says_what_stands_in():
    with pytest.raises(
        FileNotFoundError,
        match=r"no file no/such-texts here, .*vader.*PyPI, stand in for them: ~data.corpora",
    ):
        read_corpus("imdb", "no/such-texts")


def test_faults_of_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"doesn't contain any data files; .* stand in for them"):
        read_corpus("imdb", str(tmp_path))
    with pytest.raises(ValueError, match="vader has no domain 'imdb'; it has movies"):
        read_corpus("imdb", "vader")


def test_a_given_test_split_stays_one():
    given = [Example(f"t{i}", i % 2, f"test/test/{i}") for i in range(12)]
    train = [Example(f"x{i}", i % 2, f"train/{i}") for i in range(200)]
    splits = split_corpus("imdb", given + train, 0)
    assert splits["test"] == given
    assert len(splits["train"]) + len(splits["validation"]) == 200
    assert len(splits["validation"]) >= 10
    with pytest.raises(ValueError, match="has 3 examples in its test split; 10 are needed"):
        split_corpus("imdb", given[:3] + train, 0)
    assert set(split_corpus("imdb", train, 0)) == {"train", "validation", "test"}


def test_prepared_as_the_other_source(tmp_path, tiny_encoder, tiny_texts):
    corpora = {domain: {"path": str(tiny_texts / f"{domain}.jsonl")} for domain in ("films", "books")}
    prepare(
        tmp_path / "out",
        corpora=corpora,
        encoder=str(tiny_encoder),
        max_length=8,
        limits={"train": 50, "test": 20},
        split_seed=0,
    )
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["films/train"]["n"] == 50
    assert counts["books/test"]["n"] == 20
    assert counts["films/validation"]["n"] >= 10


def test_too_few_texts_say_of_what_and_what_to_do(tmp_path, tiny_encoder):
    rows = [{"text": f"t{i % 40}", "label": (i % 40) % 2, "document": "one"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = (
        r"a\.jsonl: domain 'films' leaves \d+ examples for \w+; 10 are needed, of 40 that differ \(50 were read\) in 1 documents, "
        r"each in one split; add texts or documents, or try another data\.split_seed"
    )
    with pytest.raises(ValueError, match=told):
        prepare(
            tmp_path / "out",
            corpora={"films": {"path": str(tmp_path / "a.jsonl")}},
            encoder=str(tiny_encoder),
            max_length=8,
            limits={},
            split_seed=0,
        )


def test_what_stands_in_for_the_hub_is_a_plan():
    given = [*shlex.split(STANDING_IN.partition(", and ")[0]), "~task_steps"]
    config = load(ROOT / "configs" / "sentiment-roberta.yaml", given)
    assert config.data.corpora == {}
    assert study(config.experiment).stages(config)
    load(ROOT / "configs" / "sentiment-five.yaml", given[:-1])


def test_a_folder_is_a_corpus_a_domain(tiny_config, tiny_texts):
    data = load(tiny_config).data
    assert data.corpora["books"].path == f"{tiny_texts}/books.jsonl"
    files = tuple(f"{tiny_texts}/{domain}.jsonl" for domain in ("films", "books", "songs"))
    assert load(tiny_config).prepare().reads[:3] == files
    assert load(ROOT / "configs" / "demo.yaml").prepare().reads == ()
    assert "vader" not in load(ROOT / "configs" / "sentiment-five.yaml").prepare().reads


def test_config_faults(tiny_config, tiny_texts):
    films = f"data.corpora={{films: {{path: {tiny_texts}/films.jsonl}}}}"
    with pytest.raises(ConfigError, match="`corpora` has no 'books'; it has films"):
        load(tiny_config, ["~data.source", films])
    with pytest.raises(ConfigError, match="`task_steps` names 'boks', but the tasks are books, songs"):
        load(tiny_config, ["task_steps={boks: 3}"])
