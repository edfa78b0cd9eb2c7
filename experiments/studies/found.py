"""What a study on classifiers says before it runs, and its records and report afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.assets import ASSETS
from experiments.files import CARD
from experiments.keys import NAMED
from experiments.pipeline import Stage, card, is_done, origin, recorded, result
from experiments.preconditioned import norm
from experiments.records import Record
from experiments.report import data_table
from experiments.statistics import detectable, holm
from experiments.studies.cells import Cells
from experiments.studies.classifiers import Config
from gradmatch.estimators.names import nearest
from gradmatch.measure.tables import HUB_SET


def preview(config: Config, store: Path, *, reads: bool) -> str:
    """What is known before anything runs: rows by split and class (`reads`: read now, where they are not cached), what could be seen.

    Raises:
        FileNotFoundError, ValueError: data or an encoder that cannot be read.
    """
    cells = Cells(config)
    found = data_records(cells.data, store)
    for key, source in {
        "encoder": config.encoder,
        **{f"models.{n}": own for n, own in config.models.items()},
    }.items():
        check_model(key, source)
    if not found and reads:
        found = config.rows()
    if not found:
        return ""
    trained = {domain: sum(splits["train"].values()) for domain, splits in found[0]["rows"].items()}
    few = [f"{domain} {count}" for domain, count in trained.items() if count < config.fisher.examples]
    counts = [sum(splits["test"].values()) for splits in found[0]["rows"].values()]
    pairs = len(config.compare)
    told = data_table(found[0]) if reads else ""
    if pairs:
        least = 100 * detectable(counts, pairs)
        told += (
            f"\nA paired difference of macro accuracy of {least:.1f} points or more would be found in four of five studies of one seed "
            f"({sum(counts)} test rows, {pairs} comparisons; two models that differ on a tenth of the rows; seeds add their own spread)."
        )
    if few and "examples" in config.fisher.model_fields_set:
        told += (
            f"\nfisher.examples is {config.fisher.examples}, and there are fewer training rows ({', '.join(few)}): curvature "
            "is estimated on all of them."
        )
    return told.strip()


def check_model(key: str, encoder: str) -> None:
    """Refuse a model that is no asset, no folder with a model, no function, and cannot be a hub's name.

    Raises:
        FileNotFoundError: with the nearest folder beside it.
    """
    place = Path(encoder).expanduser()
    if encoder in ASSETS or NAMED.fullmatch(encoder):
        return
    if place.is_dir():
        if not any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{key}: {encoder} is a folder without config.json, so it holds no model")
    elif (
        not HUB_SET.fullmatch(encoder)
        or encoder.startswith((".", "/", "~"))
        or (place.parent.name and place.parent.is_dir())
    ):
        beside = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
        raise FileNotFoundError(f"{key}: no folder {encoder}{nearest(place.name, beside)}")


def records(config: Config, store: Path) -> list[Record]:
    """The data, one record per evaluated model and seed, per comparison, per sweep; stages that failed are left out."""
    cells = Cells(config)
    found = data_records(cells.data, store)
    found += [row for cell in cells.evaluations for row in _evaluation(cells, cell, store)]
    compared = []
    for pair, stage in cells.comparisons.items():
        ours, theirs = pair
        for row in recorded(stage, store, "comparison", "comparison.json", ours=ours, theirs=theirs):
            if is_done(cells.on_tasks[pair], store):
                row["tasks"] = result(cells.on_tasks[pair], store, "comparison.json")
            compared.append(row)
    for parts in (compared, [row["tasks"] for row in compared if "tasks" in row]):
        for part, p in zip(parts, holm([part["p"] for part in parts]), strict=True):
            part["p_holm"] = p
    found += compared
    for seed, name in dict.fromkeys((seed, name) for seed, name, _ in cells.sweeps):
        own = [stage for cell, stage in cells.sweeps.items() if cell[:2] == (seed, name)]
        if all(is_done(stage, store) for stage in own):
            points = [result(stage, store, "point.json") for stage in own]
            chosen = points[0]["chosen"]
            for point in points:
                del point["chosen"]
                point["metrics"] = _with_tasks(point["metrics"], config.data.tasks)
            told = {"kind": "sweep", "seed": seed, "model": name, "chosen": chosen, "points": points}
            found.append({**told, **origin(own[-1], store)})
    return found


def data_records(data: Mapping[str, Stage], store: Path) -> list[Record]:
    """Rows of each domain by split and class, and what was noticed in reading; none where a split is not there."""
    if not all(is_done(stage, store) for stage in data.values()):
        return []
    cards = {split: result(stage, store, CARD) for split, stage in data.items()}
    domains = next(iter(cards.values()))["domains"]
    rows = {d: {s: own["domains"][d]["counts"] for s, own in cards.items()} for d in domains}
    classes = {domain: own["classes"] for domain, own in domains.items()}
    notes = cards["train"]["notes"]
    return [
        {"kind": "data", "rows": rows, "classes": classes, "notes": notes, **origin(data["train"], store)}
    ]


def _evaluation(cells: Cells, cell: tuple[int, str], store: Path) -> Iterator[Record]:
    config, (seed, name) = cells.config, cell
    if not is_done(cells.evaluations[cell], store):
        return
    role = "merge" if name in config.merges else name if name in ("base", "joint") else "task"
    row: Record = {"kind": "evaluation", "seed": seed, "model": name, "role": role}
    row["metrics"] = _with_tasks(result(cells.evaluations[cell], store, "metrics.json"), config.data.tasks)
    if config.experiment == "language":
        row["language"] = True
    row |= {"domains": config.data.domains, **origin(cells.evaluations[cell], store)}
    model = cells.merged[cell] if role == "merge" else cells.trained[cell]
    if role == "merge":
        row["merge"] = config.merges[name].told(config.delta0)
    else:
        if is_done(model, store):  # it may be pruned
            row["training_seconds"] = card(model, store)["seconds"]
        row["precision"] = result(model, store, "training.json")["precision"]
    row["folder"] = str(model.folder(store) / "model")
    if config.evaluation:
        row["own"] = result(cells.evaluations[cell], store, "own.json")
    if cell in cells.choices:
        row["choice"] = result(cells.choices[cell], store, "choice.json")
    if cell in cells.mismatches and is_done(cells.mismatches[cell], store):
        row["mismatch"] = mismatch_of(cells.mismatches[cell], store, config.delta0)
    if cell in cells.distances and is_done(cells.distances[cell], store):
        row["distance_to_joint"] = result(cells.distances[cell], store, "distance.json")["relative"]
    yield row


def mismatch_of(stage: Stage, store: Path, delta0: float) -> dict[str, Any]:
    """The norms that a stage measured, and the preconditioned one at the study's floor."""
    found: dict[str, Any] = result(stage, store, "mismatch.json")
    return {**found, "preconditioned": norm(stage.folder(store), delta0)}


def _with_tasks(metrics: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Add the average over the tasks, without the base's own domain."""
    parts = [metrics[task] for task in tasks]
    averages = {key: fmean(part[key] for part in parts) for key in ("accuracy", "nll", "ece")}
    return {**metrics, "tasks": {**averages, "n": sum(part["n"] for part in parts)}}


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, what it means in two sentences, where the merged model lies."""
    from experiments.report import sentiment_report

    return sentiment_report(found)
