"""How far the loss rises on the straight line between two models, and the same beside it without an alignment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.measure.barrier import barrier_height, interpolate
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.views import like

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.task import Model


@dataclass(frozen=True)
class Barrier:
    """Losses along the straight line from one model to another.

    Attributes:
        shares: of the second model, from 0 to 1.
        losses: at these points.

    >>> Barrier((0.0, 0.5, 1.0), (1.0, 4.0, 2.0)).height
    2.5
    """

    shares: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """max_s [l(s) - ((1 - s) l(0) + s l(1))] (Frankle et al. 2020); 0 where the line nowhere rises above its ends."""
        return barrier_height(list(zip(self.shares, self.losses, strict=True)))

    def __float__(self) -> float:
        return self.height

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"height": self.height, "shares": list(self.shares), "losses": list(self.losses)}


def barrier(
    a: Model | Checkpoint,
    b: Model | Checkpoint,
    loss: Callable[[Mapping[str, Tensor]], float],
    points: int = 11,
) -> Barrier:
    """The loss on the straight line from a to b, and the height of its barrier.

    Args:
        a: a model, or an aligned view.
        b: another, with the same tensors.
        loss: a function of weights (name -> tensor) such as `Objective(module, batches).loss`; what is to be done at a point
            before it is judged (BatchNorm statistics measured again) belongs into it.
        points: on the line, its ends among them.

    Returns:
        `.height` (also `float(...)`), `.shares`, `.losses`.

    Raises:
        ValueError: fewer than two points, tensors that one of the two lacks or has in another shape.

    >>> import torch
    >>> one, other = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    >>> barrier(one, other, lambda weights: float(1 - weights["w"] ** 2), points=3).height
    1.0
    """
    if points < 2:
        raise GradmatchError(
            f"points is {points}; a line has two ends, so it must be at least 2", "out_of_range", "points"
        )
    first = open_checkpoint(a)
    second = like(open_checkpoint(b, base=first), first)
    for one, other in ((first, second), (second, first)):
        for name in one:
            if name not in other or other.spec(name).shape != one.spec(name).shape:
                found = f"shape {list(other.spec(name).shape)}" if name in other else "no such tensor"
                raise GradmatchError(
                    f"{name!r} has shape {list(one.spec(name).shape)} in {one.where}, and {other.where} has {found}: there is no line between "
                    "them; give two models of one architecture and head",
                    "shape_mismatch",
                    name,
                )
    start, end = dict(first), dict(second)
    shares = tuple(number / (points - 1) for number in range(points))
    return Barrier(shares, tuple(float(loss(interpolate(start, end, share))) for share in shares))


def figure(
    barriers: Mapping[str, Barrier], file: str | os.PathLike[str], ylabel: str = "loss (nats per example)"
) -> None:
    """Draw lines of losses, one a name, into an image file.

    Args:
        barriers: name, as the legend has it -> losses.
        file: .png, .svg or .pdf.
        ylabel: of the losses.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 3.2), layout="constrained")
    axes = drawn.subplots()
    for name, known in barriers.items():
        axes.plot(
            known.shares, known.losses, marker="o", markersize=3, label=f"{name} (barrier {known.height:.3g})"
        )
    axes.set_xlabel("share of the second model")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    drawn.savefig(file, dpi=150)
