"""Figure: a search of a merge's options: the loss of every trial over its number and over each option."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.records import Record, of_kind
from paper_figures.style import COLOURS, caption, plain_log, save

WIDE = 20.0  # an option that was tried over a wider range than this is drawn on a logarithmic axis


def draw(records: Sequence[Record], folder: Path, name: str = "fig_search") -> list[Path]:
    """Validation loss of each trial: in the order of their numbers with the best so far, then over each option.

    Raises ValueError where nothing was tried.
    """
    trials = sorted(of_kind(records, "trial"), key=lambda trial: int(trial["number"]))
    if not trials:
        raise ValueError("no record of a trial: run configs/search.yaml first")
    options = list(trials[0]["params"])
    losses = [trial["nll"] for trial in trials]
    best = min(trials, key=lambda trial: float(trial["nll"]))
    size = (2.6 * (1 + len(options)), 2.6)
    figure, panels = plt.subplots(1, 1 + len(options), figsize=size, sharey=True, layout="constrained")
    panels[0].plot([trial["number"] for trial in trials], losses, "o", color=COLOURS[6], markersize=3.5)
    panels[0].step(
        [trial["number"] for trial in trials], list(accumulate(losses, min)), where="post", color=COLOURS[0]
    )
    panels[0].set_xlabel("trial")
    panels[0].set_ylabel("validation loss (nats)")
    for axes, option in zip(panels[1:], options, strict=True):
        values = [trial["params"][option] for trial in trials]
        axes.plot(values, losses, "o", color=COLOURS[6], markersize=3.5)
        axes.plot([best["params"][option]], [best["nll"]], "*", color=COLOURS[2], markersize=9)
        axes.set_xlabel(option)
        if min(values) > 0 and max(values) / min(values) > WIDE:
            plain_log(axes.xaxis)
    caption(
        figure,
        "dots: a trial each, macro average over the domains' validation examples; line: best so far; star: best of all, chosen on these\n"
        "examples and so better here than elsewhere (its test metrics are in the records)",
    )
    return save(figure, folder, name)
