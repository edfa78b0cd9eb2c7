"""Corpora in the forms that people have: read into texts, classes and documents; what is not understood is refused by name."""

import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from experiments.config import ConfigError, load, study
from experiments.studies.sentiment import Data
from experiments.tasks.classes import Texts, classes_of
from experiments.tasks.corpora import STANDING_IN, Corpus, Example, prepare, read_corpus
from experiments.tasks.views import view

ROOT = Path(__file__).parents[2]
ROWS = [
    {"review": "fine, but long", "stars": "good", "user": "u1"},
    {"review": "poor", "stars": "bad", "user": "u2"},
    {"review": "dull", "stars": "bad", "user": "u1"},
    {"review": "grand", "stars": "good", "user": "u3"},
]


def written(path, rows):
    """A table of rows, by the ending of its name."""
    table = Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="," if path.suffix == ".csv" else "\t", index=False)
    else:
        table.save_to_disk(path)
    return str(path)


def read(path, domain="shop", **given):
    return read_corpus(domain, Corpus(path=str(path), **given))


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_folders_of_text_files(tmp_path):
    imdb, shop, lines = (tmp_path / name for name in ("imdb", "shop", "lines"))
    for folder in (imdb, shop, lines):
        folder.mkdir()
    zipped(imdb / "movies.zip", {"r/neg/a.txt": "so\nbad", "r/pos/b.txt": "good", "r/README": "no text"})
    assert read(imdb).examples == [Example("so bad", "0", "r/neg/a.txt"), Example("good", "1", "r/pos/b.txt")]
    text = "* notes\n[t]title\nsize[+2], weight[-1]##small , but heavy\n##no opinion\n[t]\nprice[-3][u]##dear\nlens[+1], cap[-1]##both\n"
    zipped(shop / "products.zip", {"p/Camera.txt": text})
    expected = [Example("small , but heavy", "1", "p/Camera.txt/1"), Example("dear", "0", "p/Camera.txt/2")]
    assert read(shop).examples == expected
    (lines / "x.neg").write_text("bad &amp; worse\n\n")
    (lines / "x.pos").write_text("good\n")
    (lines / "SOURCE.txt").write_text("where it is from")
    assert read(lines).examples == [Example("bad & worse", "0", "x.neg/0"), Example("good", "1", "x.pos/0")]
    with pytest.raises(
        ValueError, match=r"data\.corpora\.shop\.test: .* is a folder of text files, which has none"
    ):
        read(lines, test="test")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "folder"])
def test_tables_by_column(tmp_path, name):
    path = written(tmp_path / name, ROWS)
    found = read(path, text="review", label="stars", group_column="user")
    assert found.examples == [Example(row["review"], row["stars"], row["user"]) for row in ROWS]
    assert (
        "text column 'review', label column 'stars'; not used: 'user'; kept together by 'user'"
        in found.notes[0]
    )
    assert classes_of({"shop": found}) == ["bad", "good"]  # by the alphabet
    assert classes_of({"shop": found}, ["good", "bad", "none"]) == ["good", "bad", "none"]
    stated = read(path, label="stars", labels={"good": 1, "bad": "0"})  # `review` is a usual name
    assert [example.label for example in stated.examples] == ["1", "0", "0", "1"]
    left = read(path, label="stars", labels={"good": "x", "bad": None})
    assert [example.label for example in left.examples] == ["x", "x"]
    assert "2 rows are left out by data.corpora.shop.labels" in left.notes[1]
    half = read(path, label="stars", train="train[:50%]")
    assert [example.text for example in half.examples] == ["fine, but long", "poor"]
    assert len(read(path, label="stars", train="train[1:3]").examples) == 2


def test_a_table_is_read_without_torch(tmp_path):
    code = "import sys; from gradmatch.measure.tables import Table; list(Table(sys.argv[1])); print('torch' in sys.modules)"
    for name in ("a.csv", "a.jsonl"):
        where = written(tmp_path / name, ROWS)
        done = subprocess.run([sys.executable, "-c", code, where], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"  # it would take longer than the rest of a dry run


def test_a_path_alone_is_a_corpus(tmp_path):
    own = {"films": "a.csv", "books": {"path": "b.csv"}}
    read = Data(corpora=own, base="films", tasks=("books",)).read
    assert [corpus.path for corpus in read.values()] == ["a.csv", "b.csv"]


def test_split_files_of_their_own(tmp_path):
    train, test = written(tmp_path / "a.csv", ROWS), written(tmp_path / "b.jsonl", ROWS[:1])
    found = read(train, label="stars", test=test, validation=test).examples
    assert [example.split for example in found] == ["train"] * 4 + ["validation", "test"]
    with pytest.raises(FileNotFoundError, match=r"no data file .*c\.csv"):
        read(train, label="stars", test=str(tmp_path / "c.csv"))
    for given in ({"test": "test"}, {"train": "tran[:50%]"}):
        with pytest.raises(ValueError, match="is one file, and one split"):
            read(train, label="stars", **given)


def test_numbers_are_classes_in_the_order_of_their_size(tmp_path):
    rows = [{"text": f"t{i}", "label": (0, 1, 2, 10)[i % 4]} for i in range(40)]
    assert classes_of({"a": read(written(tmp_path / "a.csv", rows))}) == ["0", "1", "2", "10"]
    found = read(written(tmp_path / "a.parquet", rows), positive_from=2)
    assert [example.label for example in found.examples][:4] == ["0", "0", "1", "1"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg", "mid"])})
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 1]}, features).save_to_disk(tmp_path / "d")
    named = read(tmp_path / "d")
    assert [example.label for example in named.examples] == ["mid", "pos", "neg"]
    assert classes_of({"a": named}) == ["pos", "neg", "mid"]  # as the source numbers them


def test_pairs_of_texts(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": 0}, {"premise": "c", "hypothesis": "", "label": 1}]
    found = read(written(tmp_path / "a.jsonl", rows))
    assert found.examples == [Example("a", "0", "train/0", "b")]
    assert "1 rows without text are left out" in found.notes[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x", "label": 1}\n\n{"text": \n', r"a\.jsonl cannot be read: JSON parse error"),
        (
            b'{"text": "x"}\n',
            r"which column is the label\? there are: text: name it by data\.corpora\.shop\.label",
        ),
        (b'{"body": "x", "label": 1}\n', r"which column is the text\?.*data\.corpora\.shop\.text"),
        (b'{"text": "x", "label": null}\n', "row 1: column 'label' holds no label, and so it is in 1 rows"),
        (b'{"text": "x", "label": ["a"]}\n', r"row 1: column 'label' holds \['a'\].*labels of tokens"),
        (b'{"text": 5, "label": 1}\n', r"row 1: holds no text but 5 \(data\.corpora\.shop\.text\)"),
        (b'{"text": "x", "label": 0.5}\n', r"measured values \(regression\) are not supported"),
        (b'{"text": "caf\xe9", "label": 1}\n', r"a\.jsonl is no UTF-8 text"),
        (b"\n", r"a\.jsonl holds no rows"),
        (b'{"text": " ", "label": 1}\n', r"a\.jsonl holds no text with a label"),
    ],
)
def test_a_broken_row_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "star"}, r"no column 'star' \(did you mean 'stars'.*data\.corpora\.shop\.label"),
        ({"label": "review", "text": "user"}, None),
        ({"label": "stars", "group_column": "usr"}, r"no column 'usr'; .*data\.corpora\.shop\.group_column"),
        ({"label": "stars", "labels": {"good": 1}}, r"the label 'bad' .* is not among `labels` \(good\)"),
        (
            {"label": "stars", "positive_from": 1},
            "is 'good', which is no number: `positive_from` takes numbers",
        ),
        ({"label": "stars", "train": "train[4:]"}, r"the slice 'train\[4:\]' holds no rows"),
    ],
)
def test_what_a_config_says_of_a_table_is_checked(tmp_path, given, message):
    path = written(tmp_path / "a.csv", ROWS)
    if message is None:  # few different values are classes, whatever they look like
        assert len(read(path, **given).examples) == 4
        return
    with pytest.raises(ValueError, match=message):
        read(path, **given)


def texts(*labels):
    return Texts([Example(f"t{i}", label, str(i)) for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("labels", "stated", "message"),
    [
        ([("a", "a")], (), "d0: all its rows are of one class, 'a'"),
        (
            [("0", "1"), ("neg", "pos")],
            (),
            r"d0 has the labels 0, 1, and d1 has neg, pos: .*data\.corpora\.d1\.labels",
        ),
        (
            [("a", "b"), ("b", "c")],
            ("a", "b"),
            r"d1 has the label 'c', but data\.labels are a, b: .*\{c: a\}",
        ),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels, stated, message):
    with pytest.raises(ValueError, match=message):
        classes_of({f"d{i}": texts(*own) for i, own in enumerate(labels)}, stated)
    with pytest.raises(ValueError, match="give either `labels` or"):
        Corpus(path="x", labels={"a": "b"}, positive_from=1)


def test_a_file_that_is_absent_names_its_neighbours(tiny_texts):
    with pytest.raises(FileNotFoundError, match=r"no data file .*film\.jsonl \(did you mean 'films\.jsonl'"):
        read(tiny_texts / "film.jsonl")


def test_the_hub_through_its_library(monkeypatch):
    import datasets

    splits = {"train[:5%]": [{"text": "a", "label": 1}], "test": [{"text": "b", "label": 0}]}
    given = []

    def load_dataset(name, subset, split, revision):
        given.append((name, subset))
        return Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("some/name", subset="full", train="train[:5%]", test="test")
    assert given == [("some/name", "full")] * 2
    assert [(e.text, e.label, e.split) for e in found.examples] == [("a", "1", "train"), ("b", "0", "test")]


def test_faults_of_sources(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file no/such-texts here, .*vader.*PyPI, stand in for them"
    ):
        read("no/such-texts")
    with pytest.raises(FileNotFoundError, match=r"doesn't contain any data files; .* stand in for them"):
        read(tmp_path)
    with pytest.raises(ValueError, match="vader has no domain 'imdb'; it has movies"):
        read("vader", "imdb")


def test_prepared_and_viewed(tmp_path, tiny_encoder, tiny_texts):
    """Tokens, classes and counts; no text of one split, and no document of one, is in another."""
    from datasets import load_from_disk

    corpora = {domain: {"path": str(tiny_texts / f"{domain}.jsonl")} for domain in ("films", "books")}
    given = {"tokenizer": str(tiny_encoder), "max_length": 8, "labels": [], "split_seed": 0}
    prepare(tmp_path / "data", corpora=corpora, **given)
    sizes = {"train": 50, "validation": 30, "test": 41}
    documents = []
    for split, size in sizes.items():
        out = tmp_path / split
        view(out, data=tmp_path / "data", split=split, sizes=dict.fromkeys(corpora, sizes), seed=0)
        card = json.loads((out / "data.json").read_text())
        assert card["domains"]["films"]["classes"] == ["0", "1"]
        assert sum(card["domains"]["books"]["counts"].values()) == size
        table = load_from_disk(str(out / "films" / split))
        assert max(map(len, table["input_ids"])) == 8
        documents.append(set(table["document"]))
    assert sum(map(len, documents)) == len(set().union(*documents))
    assert any("texts have 8 tokens or more, and are cut" in note for note in card["notes"])


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
    for size in ("0", "1.5", "-3"):
        with pytest.raises(ConfigError, match=r"data\.test: is a number of rows .* or a share below 1"):
            load(tiny_config, [f"data.test={size}"])
