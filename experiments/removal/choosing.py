"""An option of a removal method, chosen where no test looks: validation texts, and prompts beyond those that are evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from experiments.files import write_json
from experiments.removal import language, scorers, stages
from experiments.removal.tradeoff import GRID, envelope
from experiments.tasks import texts


def choose(
    out: Path,
    *,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    grid: Mapping[str, Sequence[float]],
    prompts: Mapping[str, Any],
    count: int,
    nats: float,
    data: Path,
    generation: Mapping[str, Any],
    scorer: str,
    split_seed: int,
    seed: int,
    max_length: int,
    batch_size: int,
    precision: str,
    **folders: Path,
) -> None:
    """Try each value of the grid's one option along alphas; `out/choice.json` keeps all paths and the best value.

    Best: the lowest mean toxicity over budgets from 0 to `nats` nats a token on the validation texts that must stay, along
    the lower envelope of the path; a path that ends early keeps its last value. `prompts` is the source that the evaluation
    draws from; what it left is used, at most `count`.

    Raises:
        ValueError: a source of prompts of which the evaluation leaves none.
    """
    ((option, values),) = grid.items()
    chosen = spare_prompts(prompts, count, split_seed)
    kept = texts.load(data / "keep" / "validation.jsonl")
    shared = {"max_length": max_length, "batch_size": batch_size, "precision": precision}

    def measured(alpha: float, value: Any) -> tuple[float, float]:
        """(nats a token of what must stay, mean toxicity) of the model edited with one value."""
        model, tokenizer = language.load(folders["base"] / "model")
        if alpha:
            stages.edit(model, method, alpha, {**options, option: value}, **folders)
        table = language.losses(model, tokenizer, kept, **shared)
        found = language.continuations(model, tokenizer, chosen, seed=seed, precision=precision, **generation)
        return float(table[:, 0].sum() / table[:, 1].sum()), float(np.nanmean(scorers.score(scorer, found)))

    start = measured(0.0, None)
    tried = []
    for value in tqdm(values, desc=f"choosing {option}"):
        path = [start, *(measured(alpha, value) for alpha in alphas)]
        tried.append({"value": value, "path": path, "toxicity": mean_toxicity(np.asarray(path), nats)})
    best = min(tried, key=lambda cell: cell["toxicity"])
    card = {"option": option, "chosen": best["value"], "prompts": len(chosen), "nats": nats, "tried": tried}
    write_json(out / stages.CHOICE, card)


def mean_toxicity(path: NDArray[np.float64], nats: float) -> float:
    """Mean over budgets b in [0, nats] of the least toxicity that the path offers at a rise of at most b.

    path: (A, 2), nats a token and toxicity, the unchanged model first; points that are not finite are left out.
    """
    known = path[np.isfinite(path).all(1)]
    at = np.linspace(known[0, 0], known[0, 0] + nats, GRID)
    return float(envelope(known[:, 0], known[:, 1], at).mean())


def spare_prompts(source: Mapping[str, Any], count: int, seed: int) -> list[str]:
    """At most `count` prompts of a source that its `limit` leaves to none of the evaluated ones."""
    asked = texts.Source.model_validate(source)
    pool = texts.drawn(texts.without(texts.read(asked), ()), None, seed)
    spare = [] if asked.limit is None else pool[asked.limit : asked.limit + count]
    if not spare:
        raise ValueError(
            f"{asked.source}: no prompts are left to choose options on, {len(pool)} in all and limit {asked.limit}; "
            "lower the limit"
        )
    return [prompt.text for prompt in spare]
