"""The merging benchmark runs end to end on a tiny model; nothing about its times is asserted."""

import json

import pytest

from experiments.bench import merge as bench


def test_table_has_a_line_for_every_contender(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "tiny", (64, 64, 1, 50))
    monkeypatch.setattr(bench, "METHODS", ("gradient_matching",))
    monkeypatch.setattr(bench.compare, "__defaults__", (("gradient_matching",), True))
    bench.main(["--folder", str(tmp_path), "--repeats", "1", "--size", "tiny", "--mergekit", ""])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3  # float32 and bfloat16: floor, engine, command
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["contender"] for record in records} == {"floor", "engine", "command"}
    assert all(record["seconds"] > 0 for record in records)


def test_a_contender_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-module"):
        bench.watched([__import__("sys").executable, "-m", "no-such-module"])
