"""How results show themselves: one line in a terminal, a few in a notebook; a card is written once, with what was known before."""

import json

import torch

from gradmatch import Task, merge, subtract
from gradmatch.estimators import Curvature


def models(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"a<b>.weight": torch.randn(4, 6, generator=generator)} for _ in range(count)]


def test_a_merge_in_memory_is_one_line_and_a_summary():
    base, *tasks = models()
    merged = merge(base, [Task(theta) for theta in tasks], method="averaging")
    assert repr(merged) == "Merged(averaging, 1 tensors, 24 weights; see .report)"
    shown = merged._repr_html_()
    assert merged.report.summary().splitlines()[1] in shown
    assert "<b>.weight" not in shown


def test_the_card_of_a_soup_and_of_a_removal_say_what_the_report_says(tmp_path):
    base, *tasks = models()
    given = [Task(theta, name=name) for theta, name in zip(tasks, "ab", strict=True)]
    score = lambda w: -float(w["a<b>.weight"].norm())  # noqa: E731
    soup = merge(base, given, method="greedy_soup", score=score, out=tmp_path / "soup")
    means = [{n: torch.rand_like(v) + low for n, v in base.items()} for low in (5.0, 0.0)]
    h0, h = (Curvature.from_dict(mean, 5) for mean in means)
    less = subtract(base, Task(tasks[0], h), base_curvature=h0, weight=0.1, out=tmp_path / "less")
    for result, folder in ((soup, "soup"), (less, "less")):
        told = json.loads((tmp_path / folder / "gradmatch.json").read_text())["report"]
        assert told["method"] == result.report.method
        assert told["largest_alpha"] == {str(k): alpha for k, alpha in result.report.largest_alpha.items()}
    assert soup.report.method == "greedy_soup"
    assert set(less.report.largest_alpha) == {0.001, 0.01, 0.1}
