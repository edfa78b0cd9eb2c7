"""Reading data: every kind of file, columns, padding, labels, and everything that can be wrong with them."""

import json
import sys

import pytest
import torch

from gradmatch.measure.tables import TextBatches, find_columns, longest_input, read_table, rows_with_text
from tests.gradmatch.tiny import tokenizer

ROWS = [
    {"text": "good film", "label": 1},
    {"text": "the plot was bad", "label": 0},
    {"text": "fine", "label": 1},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        path.write_text(
            "\n".join([f"text{mark}label", *(f"{row['text']}{mark}{row['label']}" for row in ROWS)]) + "\n"
        )
    elif kind == "parquet":
        import datasets

        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "txt":
        path.write_text("good film\n\nthe plot was bad\nfine\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_kinds_of_files(tmp_path, kind):
    table = read_table(write(tmp_path, kind))
    assert [dict(row) for row in table] == ROWS


def test_a_text_file_has_one_example_a_line_without_the_empty_ones(tmp_path):
    table = read_table(write(tmp_path, "txt"))
    kept = table.select(rows_with_text(table, "text"))
    assert [row["text"] for row in kept] == [row["text"] for row in ROWS]


def batches(rows=ROWS, task="classification", columns=None, **options):
    columns = columns or find_columns(list(rows[0]))
    return TextBatches(rows, options.pop("tokenizer", tokenizer()), task=task, columns=columns, **options)


def test_batches_are_padded_and_labelled_and_can_be_read_again():
    found = batches(batch_size=2)
    assert len(found) == 2
    first, second = list(found)
    assert first["input_ids"].shape == (2, 4)
    assert first["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert first["labels"].tolist() == [1, 0]
    assert second["input_ids"].shape == (1, 1)
    assert [b["labels"].tolist() for b in found] == [[1, 0], [1]]


def test_causal_language_model_labels_ignore_padding_even_without_a_padding_token():
    batch = next(iter(batches(task="causal_lm", batch_size=3, tokenizer=tokenizer(padding=False))))
    assert (batch["labels"] == -100).tolist() == (batch["attention_mask"] == 0).tolist()
    assert batch["labels"][1].tolist() == batch["input_ids"][1].tolist()


def test_long_rows_are_cut_and_counted():
    found = batches(batch_size=3, max_length=2)
    assert next(iter(found))["input_ids"].shape == (3, 2)
    assert found.cut == 2


def test_labels_may_be_words_or_numbers_with_fractions():
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    assert next(iter(batches(rows, label_ids={"no": 0, "yes": 1})))["labels"].tolist() == [1, 0]
    rows = [{"text": "good", "label": 0.5}, {"text": "bad", "label": 2.0}]
    assert next(iter(batches(rows)))["labels"].dtype == torch.float32


def test_pairs_of_texts():
    rows = [{"premise": "good film", "hypothesis": "fine plot", "label": 1}]
    columns = find_columns(list(rows[0]), pair="hypothesis")
    assert columns.text == "premise"
    assert next(iter(batches(rows, columns=columns)))["input_ids"].shape == (1, 4)


def test_longest_input():
    class Config:
        model_type, max_position_embeddings = "roberta", 514

    class Tokenizer:
        model_max_length = 10**30

    assert longest_input(Tokenizer, Config) == 512
    assert longest_input(Tokenizer, Config, 128) == 128
    with pytest.raises(ValueError, match="--max-length 513 is more than the model takes: 512"):
        longest_input(Tokenizer, Config, 513)


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file at .*missing\.csv"):
        read_table(tmp_path / "missing.csv")
    with pytest.raises(FileNotFoundError, match="cannot be had"):
        read_table("a-set-that-no-hub-has")
    odd = tmp_path / "rows.xyz"
    odd.write_text("x")
    with pytest.raises(ValueError, match=r"unknown kind of file '.xyz'"):
        read_table(odd)
    empty = tmp_path / "rows.csv"
    empty.write_text("text,label\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_table(empty)
    for kind in ("txt", "csv", "jsonl"):
        nothing = tmp_path / f"nothing.{kind}"
        nothing.touch()
        with pytest.raises(ValueError, match=rf"nothing\.{kind} holds no rows: the file is empty"):
            read_table(nothing)
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"text": "good"}\n{"text": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read"):
        read_table(broken)
    blank = tmp_path / "blank.csv"
    blank.write_text('text,label\n" ",1\n')
    with pytest.raises(ValueError, match="holds no text at all"):
        rows_with_text(read_table(blank), "text")


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install"):
        read_table("x.csv")


def test_errors_of_columns():
    with pytest.raises(ValueError, match=r"no column 'txt' \(did you mean 'text'"):
        find_columns(["text", "label"], text="txt")
    with pytest.raises(ValueError, match="there are: a, b"):
        find_columns(["a", "b"], label="zzz")
    with pytest.raises(ValueError, match="which column is the text"):
        find_columns(["a", "b"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": None, "label": 1}], "row 0: column 'text' holds no text but None"),
        ([{"text": "good", "label": "yess"}], r"row 0: unknown label 'yess' \(did you mean 'yes'"),
        ([{"text": "good", "label": None}], "row 0: column 'label' holds no label but None"),
    ],
)
def test_errors_of_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        list(batches(rows, columns=find_columns(["text", "label"]), label_ids={"yes": 1}))


def test_error_of_the_batch_size():
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        batches(batch_size=0)
