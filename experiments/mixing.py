"""Stage: fine-tunes side by side with a router (`gradmatch.mixture`), measured; its folder is not kept."""

from __future__ import annotations

import shutil
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experiments.evaluate import write_metrics
from experiments.files import write_json
from experiments.models import load_classifier
from experiments.rows import Views, load_split
from gradmatch.mixture import load, mix, routing, train_router

TIMED, ROUTED, AGAIN = 16, 64, 3  # rows that are timed, rows whose choices are counted, repetitions
BATCH = 16


def mix_and_measure(
    out: Path,
    *,
    base: Path,
    tasks: Mapping[str, Path],
    data: Views,
    mixture: Mapping[str, Any],
    prompts: int,
    steps: int,
    near: float | None,
    seed: int,
) -> None:
    """`out/metrics.json` and `out/<task>.npz` on the test examples of the tasks, `out/mixture.json`: size, seconds, choices.

    mixture: arguments of `gradmatch.mixture.mix`. prompts: training examples of each task that the router is made of. steps: of its
    training, on batches of the tasks in turn. near: the experts are moved so close to their mean, theta_mean + near (theta_t - theta_mean).
    """
    folder, experts = out / "mixture", {task: path / "model" for task, path in tasks.items()}
    if near is not None:
        experts = _nearer(out / "near", experts, near)
    rows = {task: load_split(data, task, "train") for task in tasks}
    given = None
    if prompts:
        given = [
            [
                {key: value for key, value in batch.items() if key != "labels"}
                for batch in own.subset(prompts, seed).given(BATCH)
            ]
            for own in rows.values()
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = mix(
            str(base / "model"),
            list(map(str, experts.values())),
            prompts=given,
            seed=seed,
            out=folder,
            **mixture,
        ).report
    trained = None
    if steps:
        batches = [
            own.subset(max(BATCH, steps * BATCH // len(rows)), seed).given(BATCH) for own in rows.values()
        ]
        turns = [batch for turn in zip(*batches, strict=False) for batch in turn]
        trained = train_router(folder, turns, steps).to_dict()
    model = load(folder)
    write_metrics(out, model, data, list(tasks), "test")
    some = {task: load_split(data, task, "test").subset(ROUTED, seed).given(BATCH) for task in tasks}
    one = [
        batch for task in tasks for batch in load_split(data, task, "test").subset(TIMED, seed).given(TIMED)
    ]
    shares = {} if mixture.get("rank") else routing(folder, some).shares
    card = {
        "weights": report.weights,
        "lost": report.lost,
        "trained": trained,
        "shares": {
            task: [sum(c) / len(own) for c in zip(*own.values(), strict=True)] for task, own in shares.items()
        },
        "seconds": seconds_of(model, one),
        "seconds_of_base": seconds_of(load_classifier(base / "model"), one),
    }
    write_json(out / "mixture.json", card)
    for made in (folder, out / "near"):
        shutil.rmtree(made, ignore_errors=True)


def _nearer(out: Path, experts: Mapping[str, Path], near: float) -> dict[str, Path]:
    """Copies of models, moved towards their mean."""
    weights = {task: load_file(path / "model.safetensors") for task, path in experts.items()}
    mean = {
        name: sum(w[name] for w in weights.values()) / len(weights) for name in next(iter(weights.values()))
    }
    found = {}
    for task, path in experts.items():
        found[task] = out / task
        shutil.copytree(path, found[task])
        moved = {
            name: (mean[name] + near * (value - mean[name])).to(value.dtype).contiguous()
            if value.is_floating_point()
            else value
            for name, value in weights[task].items()
        }
        save_file(moved, found[task] / "model.safetensors", metadata={"format": "pt"})
    return found


@torch.inference_mode()
def seconds_of(model: Any, batches: Any) -> float:
    """Median seconds of a pass over some batches; what else the machine does is in it."""
    given = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    found = []
    for _ in range(AGAIN):
        start = time.perf_counter()
        for batch in given:
            model(**batch)
        found.append(time.perf_counter() - start)
    return statistics.median(found)
