"""Reading data: every kind of file, columns, padding, labels, and everything that can be wrong with them."""

import gzip
import json
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.measure.batches import longest_input
from gradmatch.measure.columns import Labels, find_columns
from gradmatch.measure.data import Examples, read
from gradmatch.measure.tables import Table
from tests.gradmatch.tiny import save_classifier, save_language_model, tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder / "classifier")
    save_language_model(folder / "lm")
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


TWO = [("w1", "0"), ("w2", "1")]
FILES = {  # name of the file -> its content, and the texts and labels in it
    "plain.csv": ("text,label\nw1,0\nw2,1\n", TWO),
    "plain.tsv": ("text\tlabel\nw1\t0\nw2\t1\n", TWO),
    "rows.jsonl": (lines({"text": "w1", "label": 0}, {"text": "w2", "label": 1}), [("w1", 0), ("w2", 1)]),
    "lines.json": (lines({"text": "w1", "label": 0}, {"text": "w2", "label": 1}), [("w1", 0), ("w2", 1)]),
    "list.json": (json.dumps([{"text": "w1", "label": 0}, {"text": "w2", "label": 1}]), [("w1", 0), ("w2", 1)]),
    "upper.csv": ("Text,Label\nw1,0\nw2,1\n", TWO),
    "bom.csv": ("\ufefftext,label\nw1,0\nw2,1\n", TWO),
    "bom.jsonl": ("\ufeff" + lines({"text": "w1", "label": 0}), [("w1", 0)]),
    "dos.csv": ("text,label\r\nw1,0\r\nw2,1\r\n", TWO),
    "newline.csv": ('text,label\n"w1\nw2",0\nw3,1\n', [("w1\nw2", "0"), ("w3", "1")]),
    "words.csv": ("text,label\nNA,neg\nnull,pos\n12,neg\n", [("NA", "neg"), ("null", "pos"), ("12", "neg")]),
    "null.jsonl": (lines({"text": None, "label": 0}, {"text": "w2", "label": 1}), [("w2", 1)]),
    "empty.csv": ("text,label\n,0\nw2,1\n", [("w2", "1")]),
    "short.csv": ("label,text\n0,w1\n1\n1,w3\n", [("w1", "0"), ("w3", "1")]),
    "unicode.jsonl": (lines({"text": "a \u2028 \x85 b"}).encode().decode("unicode_escape"), [("a \u2028 \x85 b", None)]),
    "lines.txt": ("w1\x0cw2\n\nw3 \u2028 \x85 w4\r\nw5\n", [("w1\x0cw2", None), ("w3 \u2028 \x85 w4", None), ("w5", None)]),
    "quotes.tsv": ('text\tlabel\n"so it\t0\nis "\t1\n', [('"so it', "0"), ('is "', "1")]),
    "quoted.tsv": ('text\tlabel\n"a ""b"""\t0\n"c\td"\t1\n', [('a "b"', "0"), ("c\td", "1")]),
    "long.csv": (f"text,label\n{'w ' * 200_000},0\n", [("w " * 200_000, "0")]),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_what_a_file_holds_is_read_as_it_stands_there(tmp_path, name, packed):
    content, expected = FILES[name]
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    table = Table(path)
    found = Examples(table, find_columns(table.columns)).draw(None, 0)
    assert [(*texts, label) for _, texts, label in found] == expected


@pytest.mark.parametrize("kind", ["parquet", "folder", "splits", "files"])
def test_what_datasets_keeps(tmp_path, kind):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["class1", "class0"])}
    )
    held = datasets.Dataset.from_dict({"text": ["w1", "w2"], "label": [0, 1]}, features=features)
    path = tmp_path / "held"
    if kind == "parquet":
        path = path.with_suffix(".parquet")
        held.to_parquet(path)
    elif kind == "folder":
        held.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict(train=held).save_to_disk(path)
        with pytest.raises(GradmatchError, match="has no split 'test'; it has train"):
            Table(path, split="test")
    else:
        path.mkdir()
        held.to_parquet(path / "train-0.parquet")
    table = Table(path)
    assert list(table) == [{"text": "w1", "label": 0}, {"text": "w2", "label": 1}]
    assert table.classes == {"label": ["class1", "class0"]}


def test_classes_that_the_data_number_otherwise_than_the_model(tmp_path, models):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["class1", "class0"])}
    )
    path = tmp_path / "held.parquet"
    datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features).to_parquet(path)
    assert read(path, models / "classifier").labels.tolist() == [1, 0]


def test_batches_are_padded_on_the_right_and_labelled_and_can_be_read_again(tmp_path, models):
    path = tmp_path / "d.jsonl"
    path.write_text(lines(*({"text": t, "label": f"class{n}"} for t, n in (("good film", 1), ("the plot was bad", 0), ("fine", 1)))))  # fmt: skip
    left = tokenizer()
    left.padding_side = "left"
    found = read(path, models / "classifier", batch_size=2, tokenizer=left)
    assert len(found) == 2
    first, second = list(found)
    assert first["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert second["input_ids"].shape == (1, 1)
    assert [batch["labels"].tolist() for batch in found] == [[1, 0], [1]]
    assert "3 of 3 examples" in repr(found)


def test_a_language_models_labels_are_its_tokens_and_pairs_are_one_text(tmp_path, models):
    path = tmp_path / "d.jsonl"
    path.write_text(
        lines({"question": "good film", "answer": "fine"}, {"question": "bad", "answer": "dull plot was"})
    )
    (batch,) = read(path, models / "lm", batch_size=3)
    assert (batch["labels"] == -100).tolist() == (batch["attention_mask"] == 0).tolist()
    assert batch["attention_mask"].sum(1).tolist() == [3, 4]
    assert batch["labels"][1].tolist() == batch["input_ids"][1].tolist()
    (pair,) = read(path, models / "classifier")
    assert pair["input_ids"].shape == (2, 4)
    assert read(path, models / "lm", text="answer").notes == (
        f"{path}: text column 'answer'; not used: 'question'",
    )


def test_texts_are_cut_to_what_the_model_takes_and_counted(tmp_path, models):
    path = tmp_path / "d.txt"
    path.write_text("good\n" + "bad " * 40 + "\nfine plot\n")
    batches = read(path, models / "lm", batch_size=2, by_length=True)
    with pytest.warns(UserWarning, match="1 of 3 texts were as long as 12 tokens or longer, and cut"):
        assert [batch["input_ids"].shape for batch in batches] == [(2, 2), (1, 12)]


def test_a_sample_is_drawn_over_the_whole_source_and_by_the_seed(tmp_path, models):
    path = tmp_path / "sorted.csv"
    path.write_text("text,label\n" + "".join(f"good,{n // 500}\n" for n in range(1000)))
    draws = [read(path, models / "classifier", limit=50, seed=seed).labels.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert 10 < sum(draws[0]) < 40
    assert read(path, models / "classifier", limit=50).rows == 1000


def test_tensors_that_are_ready(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "d.safetensors"
    save_file({"input_ids": torch.arange(15).view(5, 3), "labels": torch.arange(5)}, path)
    found = read(path, None, limit=3, batch_size=2)
    assert [len(batch["labels"]) for batch in found] == [2, 1]
    assert all((batch["input_ids"][:, 0] == 3 * batch["labels"]).all() for batch in found)
    for tensors, message in (({"x": torch.ones(2)}, r"no tensor named labels \(it has x\)"), ({"labels": torch.ones(2), "x": torch.ones(3)}, "differ in their rows")):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(GradmatchError, match=message):
            read(path, None)


def test_longest_input():
    config = SimpleNamespace(model_type="roberta", max_position_embeddings=514)
    assert [longest_input(SimpleNamespace(model_max_length=10**30), config, asked) for asked in (None, 128, 600)] == [512, 128, 512]  # fmt: skip


COLUMNS = [  # names, given texts, what is found
    ("id premise hypothesis label", (), ("premise", "hypothesis"), "label"),
    ("question context answers", (), ("question", "context"), None),
    ("Sentence1 sentence2 Label", (), ("Sentence1", "sentence2"), "Label"),
    ("text prompt completion", (), ("text",), None),
    ("review stars sentiment", (), ("review",), "sentiment"),
    ("premise other hypothesis", ("", "other"), ("premise", "other"), None),
]


@pytest.mark.parametrize(("names", "given", "texts", "label"), COLUMNS)
def test_columns(names, given, texts, label):
    found = find_columns(names.split(), given)
    assert (found.texts, found.label) == (texts, label)


CONFIG = SimpleNamespace(label2id={"no": 0, "Yes": 1}, num_labels=2, problem_type=None)
VALUES = SimpleNamespace(label2id={"LABEL_0": 0}, num_labels=1, problem_type=None)
LABELS = [  # config, labels, numbers
    (CONFIG, ["yes", "no", "1", 0, 1.0, True, "0.0"], [1, 0, 1, 0, 1, 1, 0]),
    (SimpleNamespace(label2id={"1": 0, "2": 1}, num_labels=2, problem_type=None), [1, "2"], [0, 1]),
    (VALUES, ["0.5", 2, -1.0], [0.5, 2.0, -1.0]),
    (None, [7, "3"], [7, 3]),
]


@pytest.mark.parametrize(("config", "labels", "numbers"), LABELS)
def test_labels(config, labels, numbers):
    found = Labels(config, "label", "d").numbers(list(enumerate(labels)))
    assert found.tolist() == numbers
    assert found.dtype == (torch.float32 if config is VALUES else torch.long)


BAD_LABELS = [
    (None, "row 0: column 'label' holds no label, and so it is in 1 of 1 rows"),
    ("", "holds no label, and so"),
    ("Yess", r"unknown label 'Yess' \(did you mean 'Yes'\?\); the model knows: no, Yes"),
    (0.5, "holds the label 0.5, which is no class's number"),
    ("nan", "holds the label 'nan', which is no class's number"),
    (2, "holds the label 2; the model has the classes 0 to 1"),
    (-1, "holds the label -1; the model has the classes 0 to 1"),
    ([1, 0], r"holds no label but \[1, 0\]"),
]


@pytest.mark.parametrize(("label", "message"), BAD_LABELS)
def test_labels_that_the_model_does_not_know(label, message):
    with pytest.raises(GradmatchError, match=message) as refused:
        Labels(CONFIG, "label", "d").numbers([(0, label)])
    assert (refused.value.code, refused.value.where) == ("bad_label", "row 0")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file a-set-of-no-hub@v1 here, and no hub set") as error:
        Table("a-set-of-no-hub@v1")
    assert len(str(error.value)) < 400
    (tmp_path / "d.txt").write_text("x\n")
    with pytest.raises(GradmatchError, match="has no tokenizer to read data with"):
        read(tmp_path / "d.txt", tmp_path)


def test_without_the_datasets_package(tmp_path, monkeypatch):
    (tmp_path / "d.txt").write_text("x\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gradmatch\[data\]'"):
        Table(tmp_path / "d.txt")


def test_numbers_do_not_depend_on_the_batch_where_ones_own_batches_are_padded_on_the_left(tmp_path, models):
    from transformers import GPT2LMHeadModel

    from gradmatch.estimators import estimate

    model = GPT2LMHeadModel.from_pretrained(models / "lm")
    texts = ["good film", "the plot was bad", "not a very great plot"]
    words = tokenizer()
    words.padding_side = "left"
    encoded = words(texts, padding=True, return_tensors="pt")
    together = {**encoded, "labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}
    alone = [words(text, return_tensors="pt") for text in texts]
    settings = {"method": "empirical_fisher", "progress": False}
    one = estimate(model, [{**each, "labels": each["input_ids"]} for each in alone], **settings)
    other = estimate(model, [together], **settings)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-9)


def test_conversations_are_written_by_the_chat_template_without_a_second_start(models, tmp_path):
    words = tokenizer()
    words.chat_template = "[EOS] {% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [["good", "bad"], ["fine"]]
    chats = [[{"role": "user", "content": text} for text in texts] for texts in rows]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"messages": chat, "id": 1}) + "\n" for chat in chats)
    )
    found = read(tmp_path / "c.jsonl", models / "lm", tokenizer=words)
    assert found.texts == [("[EOS] good bad ",), ("[EOS] fine ",)]
    assert "conversations, written by the chat template" in repr(found)
    assert found.marked
    calls = []
    found.tokenizer = lambda *texts, **options: calls.append(options) or words(*texts, **options)
    next(iter(found))
    assert calls[0]["add_special_tokens"] is False
