"""The tutorial's commands, in its order, on a tiny encoder; and what it promises of them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from experiments import keeping, rerun
from experiments.__main__ import _records_file, main
from experiments.records import of_kind, read_records, write_records
from paper_figures.__main__ import main as draw

ROOT = Path(__file__).parents[2]


def commands():
    """Every command line of the tutorial that starts one of our programs."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "first-experiment.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m")]


def test_the_tutorial(tmp_path, tiny_encoder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load((ROOT / "configs" / "first.yaml").read_text())
    content |= {
        "encoder": str(tiny_encoder),
        "seeds": [0],
        "fisher": {"examples": 16},
        "mismatch_examples": 16,
    }
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(content))
    places = {"configs/first.yaml": str(tmp_path / "first.yaml"), "results": str(tmp_path / "results")}
    said = {}
    for program, *words in commands():
        for place, own in places.items():
            words = [word.replace(place, own, 1) if word.startswith(place) else word for word in words]
        if words[0] in ("run", "prune"):
            words[2:2] = ["--results", places["results"]]  # before overrides
        code = (main if program == "experiments" else draw)(words)
        out = capsys.readouterr()
        said[" ".join([program, *words[:1], *([w for w in words if w.startswith("--")][-1:])])] = out.out
        assert code == 0, (words, out.err)
    dry = said["experiments run --dry-run"]
    assert re.search(r"books, test +40 +bad \d+, good \d+", dry)
    assert "text column 'review', label column 'stars'; not used: 'user'; kept together by 'user'" in dry
    assert "A paired difference of macro accuracy of" in dry
    assert re.search(r"GM - TA, tasks +[+-]\d", said["experiments show"])
    assert "the same bytes  model/model.safetensors" in said["experiments rerun --stage"]
    assert "code, libraries and data are as they were" in said["experiments rerun --results"]
    assert re.search(
        r"\d{3,} figures compared: all are the same to the last digit", said["experiments rerun --results"]
    )
    assert "data.test: 40 | 30" in said["experiments diff"]
    assert re.search(r"\d+ stages, \d+\.\d MB would go", said["experiments prune --dry-run"])
    header, *rows = (tmp_path / "results" / "first.csv").read_text().splitlines()
    assert {"experiment", "kind", "seed", "model", "metric", "value"} <= set(header.split(","))
    assert len(rows) > 100
    assert list((tmp_path / "results" / "figures" / "first").glob("fig_mismatch.png"))
    records = read_records(tmp_path / "results" / "first.jsonl")
    (study,) = of_kind(records, "study")
    assert study["content"]["data"]["labels"] == ["bad", "good"]
    assert study["data"]["docs/first/films.csv"]
    # what is pruned is not missed, and made again where it is needed
    before = {path.name for path in (tmp_path / "results" / "stages").rglob("merge-gm-*")}
    keeping.prune(tmp_path / "results", weights=True, dry_run=False)
    assert before
    assert not list((tmp_path / "results" / "stages").rglob("merge-gm-*"))
    assert main(["run", places["configs/first.yaml"], "--results", places["results"]]) == 0
    captured = capsys.readouterr()
    assert " s\n" not in captured.err
    assert not rerun.compare(records, read_records(tmp_path / "results" / "first.jsonl")).differing
    with pytest.raises(ValueError, match="is not there: it was not run, it was pruned"):
        rerun.run_stage(study, "texts/seed0/merge-gm", tmp_path / "results" / "stages")
    with pytest.raises(
        ValueError, match=r"no stage 'texts/seed0/merge-gn' \(did you mean 'texts/seed0/merge-gm'"
    ):
        rerun.run_stage(study, "texts/seed0/merge-gn", tmp_path / "results" / "stages")


ABOUT = {
    "kind": "study",
    "content": {"a": 1, "b": [2]},
    "data": {"x.csv": "1"},
    "versions": {"torch": "1"},
    "stages": {},
}
FOUND = [
    {
        "kind": "evaluation",
        "model": "GM",
        "seed": 0,
        "metrics": {"macro": {"nll": 0.5}},
        "seconds": 3,
        "key": "k",
    },
    {"kind": "comparison", "ours": "GM", "theirs": "TA", "difference": 0.1},
]


def test_records_of_changed_data_have_a_name_of_their_own(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    assert _records_file(file, ABOUT) == file
    write_records(file, [ABOUT, *FOUND])
    assert _records_file(file, ABOUT) == file
    assert _records_file(file, {**ABOUT, "content": {"a": 2}}) == file
    other = _records_file(file, {**ABOUT, "data": {"x.csv": "2"}})
    assert re.fullmatch(r"a-data[0-9a-f]{8}\.jsonl", other.name)
    assert "the data have changed since" in capsys.readouterr().err


def test_two_lots_of_records_are_compared_figure_by_figure():
    changed = [{**FOUND[0], "metrics": {"macro": {"nll": 0.51}}, "seconds": 9, "key": "other"}, FOUND[1]]
    assert str(rerun.compare(FOUND, FOUND)) == "8 figures compared: all are the same to the last digit"
    found = rerun.compare(FOUND, changed)
    assert found.differing == [("evaluation GM 0.metrics.macro.nll", 0.5, 0.51)]
    assert "1 differ, most of all evaluation GM 0.metrics.macro.nll (0.5 then, 0.51 now)" in str(found)
    assert ("comparison GM TA.difference", 0.1, "absent") in rerun.compare(FOUND, FOUND[:1]).differing
    text = rerun.diff(
        [ABOUT, *FOUND], [{**ABOUT, "content": {"a": 1, "b": [3], "c": 4}}, *changed], ("x", "y")
    )
    assert "config (x | y)\n  b.0: 2 | 3\n  c: absent | 4" in text
    assert "(0.5 x, 0.51 y)" in text


def test_a_table_of_figures_and_faults(tmp_path, capsys):
    write_records(tmp_path / "a.jsonl", [{"experiment": "texts", "name": "a", **record} for record in FOUND])
    table = keeping.frame([tmp_path / "a.jsonl"])
    assert table[["kind", "model", "seed", "metric", "value"]].iloc[0].tolist() == [
        "evaluation",
        "GM",
        0,
        "metrics.macro.nll",
        0.5,
    ]
    assert len(table) == 2
    for command, message in (
        (["rerun", str(tmp_path / "a.jsonl")], "does not hold the config of its study"),
        (["prune", "--results", str(tmp_path)], "does not say which stages are its own"),
        (["frame", str(tmp_path / "none")], "no records at"),
        (["show", str(tmp_path / "none.jsonl")], "no records at"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
