"""Who answers what: the share of tokens (or samples) that each expert takes of each file, at every place of a mixture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.loading import load
from gradmatch.mixture.routers import mixed
from gradmatch.mixture.scoring import listening
from gradmatch.mixture.training import read_for
from gradmatch.output.publishing import place

DEAD = 0.01  # share of all choices, below which an expert is named


@dataclass
class Routing:
    """Shares of choices.

    Attributes:
        experts: names, in the order of the shares.
        shares: file -> place -> share of each expert; they sum to 1.
    """

    experts: list[str]
    shares: dict[str, dict[str, list[float]]]

    def of(self, file: str) -> list[float]:
        """Each expert's share of a file, mean over the places."""
        rows = list(self.shares[file].values())
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    @property
    def dead(self) -> list[str]:
        """Experts that next to nothing of any file goes to, at any place."""
        largest = [
            max(row[n] for places in self.shares.values() for row in places.values())
            for n in range(len(self.experts))
        ]
        return [name for name, share in zip(self.experts, largest, strict=True) if share < DEAD]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "dead": self.dead}

    def summary(self) -> str:
        """For people.

        >>> print(Routing(["a", "b"], {"x": {"model": [0.75, 0.25]}}).summary())
        x: a 75%, b 25%
        """
        lines = [
            f"{file}: "
            + ", ".join(
                f"{name} {share:.0%}" for name, share in zip(self.experts, self.of(file), strict=True)
            )
            for file in self.shares
        ]
        return "\n".join(
            [
                *lines,
                *(
                    f"{name} is never chosen: its place is wasted, or the router has to be trained"
                    for name in self.dead
                ),
            ]
        )

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the shares: a panel a file, a row a place, a colour an expert."""
        from matplotlib.figure import Figure

        figure = Figure(
            figsize=(3.2 * len(self.shares) + 1.2, 0.8 + 0.3 * max(map(len, self.shares.values()))),
            layout="constrained",
        )
        axes = figure.subplots(1, len(self.shares), squeeze=False, sharey=True)[0]
        for axis, (file, places) in zip(axes, self.shares.items(), strict=True):
            left = [0.0] * len(places)
            for number, name in enumerate(self.experts):
                values = [row[number] for row in places.values()]
                axis.barh(range(len(places)), values, left=left, label=name)
                left = [a + b for a, b in zip(left, values, strict=True)]
            axis.set(title=file, xlim=(0, 1), xlabel="share of choices")
            axis.set_yticks(range(len(places)), list(places))
            axis.invert_yaxis()
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(self.experts)
        )
        figure.savefig(path)


@torch.no_grad()
def routing(
    folder: str | os.PathLike[str], data: Mapping[str, Iterable[Mapping[str, Any]] | str], **options: Any
) -> Routing:
    """Count the choices of a mixture's routers on some files; padding does not count.

    Args:
        folder: of `mix`.
        data: name -> batches, or a file of examples that the folder's tokenizer reads.
        **options: of `gradmatch.measure.data.read`, for files.

    Raises:
        GradmatchError: no mixture, or no data.

    >>> routing("mixture", {"maths": "maths.txt", "prose": "prose.txt"}).summary()            # doctest: +SKIP
    """
    out, module = place(folder), load(folder)
    if not data:
        raise GradmatchError("no data to route; give at least one file", "bad_data", "data")
    shares: dict[str, dict[str, list[float]]] = {}
    count = 0
    for name, source in data.items():
        batches = (
            read_for(out, module, source, **options) if isinstance(source, (str, os.PathLike)) else source
        )
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            with listening(module) as scores:
                module(**{key: value for key, value in batch.items() if key != "labels"})
            for where, one, mask in scores:
                chosen = (mixed(one, top_k_of(module, where)) > 0).float().flatten(0, -2)
                kept = torch.ones(len(chosen)) if mask is None else mask.flatten().float()
                sums[where] = sums.get(where, torch.zeros(chosen.shape[-1])) + kept @ chosen
            scores.clear()
        if not sums:
            raise GradmatchError(
                f"{out} has no router that could be looked at, or {name} has no examples", "bad_model", out
            )
        shares[name] = {where: (total / total.sum()).tolist() for where, total in sums.items()}
        count = len(next(iter(shares[name].values())))
    return Routing(names_of(out, count), shares)


def top_k_of(module: Any, where: str) -> int:
    """Experts that take part at a place."""
    one = module.gate if where == "model" else module.get_submodule(where)
    return int(one.top_k)


def names_of(out: Path, count: int) -> list[str]:
    """The experts' names, as the card of the folder tells them; numbers where it has none."""
    from gradmatch.estimators.files import read_json
    from gradmatch.output.card import CARD

    card = read_json(out / CARD) if (out / CARD).is_file() else {}
    told = (card.get("mixture") or {}).get("experts") or []
    return [str(name) for name in told] if len(told) == count else [f"expert {n}" for n in range(count)]
