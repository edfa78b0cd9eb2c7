"""JSON-line records: written whole, broken lines counted."""

import json

import pytest

from experiments.records import (
    mean_over_seeds,
    models_in_order,
    of_kind,
    read_records,
    write_atomically,
    write_records,
)

RECORDS = [{"kind": "evaluation", "model": name, "seed": seed} for seed in (0, 1) for name in ("base", "GM")]


def test_round_trip(tmp_path):
    write_records(tmp_path / "new" / "a.jsonl", RECORDS)
    assert read_records(tmp_path / "new" / "a.jsonl") == RECORDS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_a_broken_line_is_counted_and_the_rest_is_read(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"kind": "eval\n[1]\n\n' + json.dumps(RECORDS[1]) + "\n")
    assert read_records(path) == RECORDS[:2]
    assert "skipped 2 broken line(s), number 2, 3" in capsys.readouterr().err


def test_no_file_and_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="experiments run"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no readable record"):
        read_records(tmp_path / "empty.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_selecting():
    assert models_in_order(RECORDS) == ["base", "GM"]
    assert of_kind([*RECORDS, {"kind": "comparison"}], "comparison") == [{"kind": "comparison"}]
    assert mean_over_seeds(RECORDS, lambda record: record["seed"]) == (0.5, pytest.approx(0.57735, abs=1e-5))
    assert mean_over_seeds(RECORDS[:1], lambda record: 3.0) == (3.0, 0.0)
    assert mean_over_seeds(RECORDS, lambda record: None) is None
    assert mean_over_seeds([], lambda record: 1.0) is None
