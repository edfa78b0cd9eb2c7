"""The merging benchmark runs end to end on a tiny model; nothing about its times is asserted."""

import json

import pytest

from experiments.bench import merge as bench


def test_table_has_a_line_for_every_contender(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "tiny", (64, 64, 1, 50))
    monkeypatch.setattr(bench, "METHODS", ("gradient_matching",))
    monkeypatch.setattr(bench, "DTYPES", ("bfloat16",))  # every process loads torch
    arguments = ["--folder", str(tmp_path), "--repeats", "1", "--size", "tiny", "--mergekit", ""]
    bench.main([*arguments, "--parts", "warm", "cold"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("| gradient_matching |" in line for line in lines) == 4 + 2  # warm and cold
    assert sum(line.startswith("`gradmatch ") for line in lines) == 2
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    measured = [record for record in records if "contender" in record]
    assert {record["contender"] for record in measured} == {"floor", "engine", "torch", "command"}
    assert {record["cache"] for record in measured} == {"warm", "cold"}
    assert all(record["seconds"] > 0 for record in records)


def test_growth_is_in_size_and_in_models(monkeypatch):
    args = bench.argparse.Namespace(repeats=5)
    groups = [(size, count) for size, _, count, *_ in bench.parts("growth", args)]
    assert groups == [("30M", 3), ("125M", 3), ("500M", 3), ("125M", 2), ("125M", 4), ("125M", 8)]


def test_a_contender_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-module"):
        bench.watched([__import__("sys").executable, "-m", "no-such-module"])
