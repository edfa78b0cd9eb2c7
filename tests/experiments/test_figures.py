"""Figures and tables: drawn from records alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.records import read_records, write_records
from paper_figures import (
    fig_adding,
    fig_alpha,
    fig_assumption,
    fig_barriers,
    fig_cosines,
    fig_curvature,
    fig_forecast,
    fig_mismatch,
    fig_proof,
    fig_redundancy,
    fig_removal,
    fig_search,
    style,
    table_claims,
    table_sentiment,
)
from paper_figures.__main__ import main, newest

ROOT = Path(__file__).parents[2]


def record(model, role, seed=0, accuracy=0.8, mismatch=None):
    """An evaluation record as the sentiment experiment writes it."""
    part = {"accuracy": accuracy, "nll": 0.5, "ece": 0.1, "n": 100}
    found = {"experiment": "sentiment", "kind": "evaluation", "model": model, "role": role, "seed": seed}
    found |= {"domains": ["films", "books"]}
    found["metrics"] = dict.fromkeys(("films", "books", "macro", "per_example", "tasks"), part)
    return found | (
        {} if mismatch is None else {"mismatch": {"per_example": mismatch, "total": 100 * mismatch}}
    )


RECORDS = [
    record("base", "base", accuracy=0.7),
    record("books", "task", accuracy=0.95),
    record("joint", "joint", accuracy=0.9, mismatch=0.01),
    record("TA", "merge", accuracy=0.801, mismatch=0.4),
    record("GM", "merge", accuracy=0.85, mismatch=0.1),
]


def test_every_figure_is_drawn_from_the_file_alone(tmp_path, capsys):
    path = tmp_path / "demo.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in RECORDS))
    assert main([str(path), "--out", str(tmp_path / "figures")]) == 0
    drawn = sorted(file.name for file in (tmp_path / "figures" / "demo").iterdir())
    kinds = [f"{stem}.{kind}" for stem in ("fig_mismatch", "table_sentiment") for kind in ("png", "svg")]
    assert drawn == sorted([*kinds, "table_sentiment.md"])
    assert str(tmp_path / "figures" / "demo" / "fig_mismatch.png") in capsys.readouterr().out
    assert "<text" in (tmp_path / "figures" / "demo" / "table_sentiment.svg").read_text()


def test_the_best_merge_is_bold_and_the_joint_model_does_not_compete(tmp_path):
    table_sentiment.draw(RECORDS, tmp_path)
    rows = (tmp_path / "table_sentiment.md").read_text().splitlines()
    assert rows[0].startswith("| model | films | books | macro |")
    assert rows[-1].startswith("| GM | **85.0** |")
    assert rows[-1].endswith("| **0.100** |")
    assert "**" not in rows[2] + rows[3] + rows[4]


def test_several_seeds_show_their_spread(tmp_path):
    table_sentiment.draw([*RECORDS, record("GM", "merge", 1, 0.87, 0.1)], tmp_path)
    assert "86.0 ± 1.4" in (tmp_path / "table_sentiment.md").read_text()


def test_a_sweep_is_drawn_where_there_is_one(tmp_path):
    points = [{"alpha": a, "metrics": {"tasks": {"accuracy": 1 - a / 4}}} for a in (0.5, 1.0)]
    sweeps = [
        {"kind": "sweep", "model": model, "seed": s, "points": points}
        for model in ("TA", "GM")
        for s in (0, 1)
    ]
    assert [path.name for path in fig_alpha.draw(sweeps, tmp_path)] == ["fig_alpha.png", "fig_alpha.svg"]
    assert "nats" not in (tmp_path / "fig_alpha.svg").read_text()
    for point in points:  # shared by the sweeps
        point["metrics"]["tasks"]["nll"] = point["alpha"]
        point["forecast"] = {"mean": 2 * point["alpha"]}
    fig_alpha.draw(sweeps, tmp_path)
    assert "loss on the tasks (nats)" in (tmp_path / "fig_alpha.svg").read_text()


COMMITTED = {  # figure -> the committed records that it is drawn from
    fig_adding: "adding",
    fig_alpha: "alpha",
    fig_assumption: "assumption",
    fig_barriers: "rebasin-barriers",
    fig_cosines: "redundancy-texts",
    fig_curvature: "curvature",
    fig_forecast: "forecast",
    fig_mismatch: "sentiment",
    fig_proof: "removal-proof",
    fig_redundancy: "redundancy-images",
    fig_removal: "removal-toxicity",
    fig_search: "search",
    table_claims: "claims",
    table_sentiment: "vision",
}


@pytest.mark.parametrize("module", COMMITTED, ids=lambda module: module.__name__)
def test_every_figure_is_drawn_from_committed_records_and_is_the_same_again(module, tmp_path):
    records = read_records(ROOT / "experiments" / "results" / f"{COMMITTED[module]}.jsonl")
    first, again = (module.draw(records, tmp_path / name) for name in ("a", "b"))
    assert first
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.parametrize("module", COMMITTED, ids=lambda module: module.__name__)
def test_records_without_what_is_drawn(module, tmp_path):
    if module is fig_alpha:  # a sentiment study need not sweep
        assert module.draw([{"kind": "comparison"}], tmp_path) == []
        return
    with pytest.raises(ValueError, match=r"run .* first"):
        module.draw([{"kind": "comparison"}], tmp_path)


def test_points_far_off_are_drawn_at_the_edge_with_their_number(tmp_path):
    points = [
        {"kind": "point", "label": label, "seed": 0, "alpha": alpha, "intervals": {}}
        | {"metrics": {"scorer": "proxy", "perplexity_keep": keep, "perplexity_remove": 6.0}}
        for label, alpha, keep in (("base", 0.0, 5.0), ("GM", 1.0, 9.0), ("EWR", 0.5, 6685.0))
    ]
    fig_removal.draw(points, tmp_path)
    proof = {"kind": "proof", "problem": "network", "seed": 0, "alpha": 1.0, "kl": 0.1}
    fig_proof.draw(
        [{**proof, "edit": edit, "distance": far} for edit, far in (("GM", 0.5), ("TA", 22.2))], tmp_path
    )
    assert "outside, at 6685" in (tmp_path / "fig_removal.svg").read_text()
    assert "outside, at 22.2" in (tmp_path / "fig_proof.svg").read_text()


@pytest.mark.parametrize("ends", [(10, 11), (10, 19), (0.8, 2.2), (33, 66), (0.6, 11), (4, 150), (1, 9000)])
def test_a_logarithmic_axis_has_several_plain_numbers(ends):
    figure, axes = style.plt.subplots()
    axes.set_xlim(*ends)
    style.plain_log(axes.xaxis)
    figure.canvas.draw()
    shown = [
        label.get_text() for label in axes.get_xticklabels() if ends[0] <= label.get_position()[0] <= ends[1]
    ]
    style.plt.close(figure)
    assert 3 <= len(shown) <= 10
    assert all(float(number) for number in shown)


def test_more_than_eight_names_still_look_different():
    looks = style.look([f"model {i}" for i in range(12)])
    assert len({tuple(sorted(look.items())) for look in looks.values()}) == 12


def test_the_newest_file_of_a_name_is_drawn(tmp_path):
    for age, folder in enumerate(("results", "committed")):
        (tmp_path / folder).mkdir()
        for name in ("a", folder):
            file = tmp_path / folder / f"{name}.jsonl"
            file.touch()
            os.utime(file, (100 - age, 100 - age))
    found = newest(tmp_path / "results", tmp_path / "committed")
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "results/a.jsonl",
        "committed/committed.jsonl",
        "results/results.jsonl",
    ]


def test_a_broken_line_is_skipped_with_a_count(tmp_path, capsys):
    path = tmp_path / "demo.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in RECORDS) + "{half\n")
    assert main([str(path), "--out", str(tmp_path / "figures")]) == 0
    assert "skipped 1 broken line(s), number 6" in capsys.readouterr().err


def test_faults_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "experiments demo" in capsys.readouterr().err
    assert main(["none.jsonl"]) == 2
    assert "no records at none.jsonl" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"experiment": "other"}\n')
    assert main(["other.jsonl"]) == 0
    assert "no figure for these records" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"experiment": "sentiment"}\n')
    assert main(["bad.jsonl", "other.jsonl"]) == 2
    captured = capsys.readouterr()
    assert "error: bad.jsonl: no record of an evaluation" in captured.err
    assert "other.jsonl: no figure" in captured.out  # a bad file loses only itself


def test_the_commands_start_without_heavy_libraries():
    code = (
        "import sys, experiments.__main__, experiments.config, experiments.pipeline, paper_figures.__main__;"
        "from experiments.config import study; study('sentiment');"
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_record_that_lacks_something_costs_its_own_figures_alone(tmp_path, capsys):
    write_records(tmp_path / "half.jsonl", [{"experiment": "sentiment", "kind": "evaluation"}])
    write_records(tmp_path / "whole.jsonl", RECORDS)
    files = [str(tmp_path / name) for name in ("half.jsonl", "whole.jsonl")]
    assert main([*files, "--out", str(tmp_path / "figures")]) == 2
    assert "half.jsonl: a record lacks 'domains', or holds something else there" in capsys.readouterr().err
    assert (tmp_path / "figures" / "whole" / "table_sentiment.md").is_file()
