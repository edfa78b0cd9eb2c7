"""The size-accuracy curve: from one merged model to all experts, by the share of layers that are mixed or by the rank of the experts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.merging import merge
from gradmatch.mixture.building import layer_count
from gradmatch.mixture.loading import load
from gradmatch.mixture.mixing import mix
from gradmatch.models.loading import load as load_model
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.structure import structure
from gradmatch.models.task import Task
from gradmatch.models.views import as_module

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.models.task import Model

WAYS = ("layers", "rank")


@dataclass(frozen=True)
class Point:
    """One mixture: `at` layers that are mixed, or the rank of its experts; its size in base models; its score."""

    at: int
    size: float
    score: float


@dataclass(frozen=True)
class SizeCurve:
    """Scores by size; the first point is the merged model alone, of size 1.

    Attributes:
        over: "layers" or "rank".
        points: from the smallest to the largest.
    """

    over: str
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """For people.

        >>> print(SizeCurve("rank", [Point(0, 1.0, 0.8), Point(4, 1.2, 0.9)]).summary())
        rank 0 (merged): size 1.00, score 0.8
        rank 4: size 1.20, score 0.9
        """
        word = {"layers": "layers mixed", "rank": "rank"}[self.over]
        return "\n".join(
            f"{word} {one.at}{'' if one.at else ' (merged)'}: size {one.size:.2f}, score {one.score:.4g}"
            for one in self.points
        )

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw score against size."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axis = figure.subplots()
        axis.plot([one.size for one in self.points], [one.score for one in self.points], "o-")
        for one in self.points:
            axis.annotate(
                str(one.at), (one.size, one.score), textcoords="offset points", xytext=(4, -10), fontsize=8
            )
        axis.set(
            xlabel="size (base models)",
            ylabel="score",
            title={"layers": "by layers that are mixed", "rank": "by rank of the experts"}[self.over],
        )
        figure.savefig(path)


def size_curve(
    base: Model,
    experts: Sequence[Model | Task],
    score: Callable[[nn.Module], float],
    over: str = "layers",
    points: Sequence[int] | None = None,
    *,
    method: str = "averaging",
    **options: Any,
) -> SizeCurve:
    """Score mixtures of growing size: 0 to all layers mixed (the last ones first), or experts of growing rank.

    Args:
        base: as for `mix`.
        experts: as for `mix`.
        score: of a loaded module, higher is better.
        over: "layers", or "rank" (of `router="spectral"` at the ffn or block level).
        points: numbers of layers that are mixed, or ranks; None: quarters of the layers, or 4, 16, 64.
        method: of what is merged.
        **options: of `mix`.

    Raises:
        GradmatchError: points that the models do not have, or what `mix` refuses.

    >>> size_curve("base", ["a", "b"], accuracy, "rank", router="spectral", level="block").figure("curve.svg")   # doctest: +SKIP
    """
    choose("over", over, WAYS)
    theta0 = as_module(open_checkpoint(base))
    known = structure(theta0)
    if known is None or known.module is None:
        raise GradmatchError(
            f"{theta0.where}: its config names no architecture of transformers", "bad_model", theta0.where
        )
    layers = layer_count(known.module, theta0.where)
    if points is None:
        points = sorted({-(-layers * n // 4) for n in (1, 2, 3, 4)}) if over == "layers" else (4, 16, 64)
    wrong = [one for one in points if one < 1 or (over == "layers" and one > layers)]
    if wrong:
        raise GradmatchError(
            f"points has {wrong[0]}, and there are {layers} layers; give numbers of at least 1",
            "out_of_range",
            "points",
        )
    tasks = [one if isinstance(one, Task) else Task(one) for one in experts]
    found = []
    with tempfile.TemporaryDirectory(prefix="gradmatch-") as folder:
        even = [Task(one.model, one.curvature, 1 / len(tasks), one.name) for one in tasks]
        merged = merge(theta0, even, method=method, out=Path(folder) / "merged")
        found.append(Point(0, 1.0, float(score(load_model(open_checkpoint(Path(folder) / "merged")).eval()))))
        del merged
        for at in sorted(set(points)):
            own = {"dense_layers": layers - at} if over == "layers" else {"rank": at}
            made = mix(
                base,
                experts,
                out=Path(folder) / "mixture",
                overwrite=True,
                method=method,
                **{**options, **own},
            ).report
            size = made.weights["output"] / made.weights["base"]
            found.append(Point(at, size, float(score(load(Path(folder) / "mixture")))))
    return SizeCurve(over, found)


def accuracy_on(batches: Any) -> Callable[[nn.Module], float]:
    """A score: the share of right answers of a classifier on labelled batches, or minus the mean loss a batch of a model of text."""
    import torch

    from gradmatch.mixture.scoring import loss_of

    def score(module: Any) -> float:
        right, count, losses = 0, 0, []
        with torch.no_grad():
            for batch in batches:
                logits = module(**{key: value for key, value in batch.items() if key != "labels"}).logits
                if logits.dim() == 2 and "labels" in batch:
                    right += int((logits.argmax(-1) == batch["labels"]).sum())
                    count += len(logits)
                else:
                    losses.append(float(loss_of(module, batch)))
        return right / count if count else -sum(losses) / len(losses)

    return score
