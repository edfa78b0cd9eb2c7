"""Drawings: each on axes of its own or on those given, with what the result says."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from gradmatch import Task, diagnose, estimate, evaluate, forecast, merge, plots
from tests.gradmatch.tiny import tuned


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    models = {name: tuned(base, seed, 0.3) for seed, name in enumerate("ab", start=1)}
    tasks = [Task(model, estimate(model, batches), name=name) for name, model in models.items()]
    data = {"a": batches, "b": batches}
    merged = merge(base, tasks, base_curvature=1.0)
    found = diagnose(base, tasks, merged, base_curvature=1.0, data=data)
    return {
        "losses": found,
        "cosines": found,
        "forecast": forecast(base, tasks, data=data),
        "evaluation": evaluate({"base": base, **models}, data),
        "moved": merged.report,
        "curvature": tasks[0].curvature,
    }


@pytest.mark.parametrize("kind", [name.removeprefix("plot_") for name in plots.__all__])
def test_a_drawing(results, kind, tmp_path):
    draw = getattr(plots, f"plot_{kind}")
    ax = draw(results[kind])
    assert ax.has_data()
    ax.figure.savefig(tmp_path / "drawing.png")
    given = Figure().subplots()
    assert draw(results[kind], given) is given
    texts = [text.get_text() for text in (*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts)]
    texts += [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    assert any(text in ("a", "b", "base", "0", "2") for text in texts)


def test_bars_are_the_losses(results):
    losses = results["losses"].evidence.losses
    heights = [bar.get_height() for bar in plots.plot_losses(results["losses"]).patches]
    expected = [losses[model][task].mean() for model, task in
                (("base", "a"), ("base", "b"), ("a", "a"), ("b", "b"), ("merged", "a"), ("merged", "b"))]  # fmt: skip
    assert heights == pytest.approx([float(value) for value in expected])


def test_without_data_there_is_nothing_to_draw_but_axes():
    base = {"w": torch.ones(3, 3)}
    found = diagnose(base, [Task({"w": torch.zeros(3, 3)}, name="a")], base)
    assert plots.plot_losses(found).get_ylabel() == "nats per example"
