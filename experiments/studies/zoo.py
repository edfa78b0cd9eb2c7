"""A zoo made on purpose, fine-tunes of one base that go together and four that do harm: which way to choose among them is worth its price?

Claims: 17, no model is lost and the families are right; 18, a plan within a few evaluations comes as far as a greedy search that tries everything, and
leaves out what does harm; 19, Model-GLUE's findings on its strategies and on where CMA-ES starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from experiments.config import Count, Seeds, Study, Training
from experiments.pipeline import Stage, recorded
from experiments.records import Record, of_kind
from experiments.studies.cells import EVALUATED, TRAINED
from experiments.studies.classifiers import local_model, views_of
from experiments.studies.sentiment import Data, texts_stage
from experiments.tasks.splits import SPLITS
from experiments.verdicts import HOLDS, NOT_SHOWN, REFUTED, Part, Row, as_records

HARMFUL = ("shuffled", "elsewhere", "exploded", "noise")
WAYS = (
    "best single",
    "plan",
    "average",
    "coefficient",
    "most_similar",
    "least_similar",
    "exhaustive",
    "cma-es from average",
    "cma-es from random",
)
STRANGER = "elsewhere"  # the one model that descends from another base
POINTS = 0.003  # of accuracy: within .3 points


class Config(Study):
    """Keys of a zoo's config.

    copies: fine-tunes a task, of seeds of their own; `long` times the steps make one more that is over-trained. exploded: learning
    rate of the harmful one; noise: in standard deviations of each tensor. ways: of choosing, see WAYS. budget: evaluations of the plan; trials: of CMA-ES.
    """

    experiment: Literal["zoo"]
    seeds: Seeds = Field(default=(0,), min_length=1)
    encoder: str = "encoder"
    data: Data = Data()
    base_training: Training
    task_training: Training
    copies: Count = 3
    long: Count = 3
    exploded: float = Field(default=1e-3, gt=0)
    noise: float = Field(default=0.5, gt=0)
    ways: tuple[Literal[WAYS], ...] = Field(default=WAYS, min_length=1)  # type: ignore[valid-type]
    budget: Count = 5
    trials: Count = 40
    threshold: float = Field(default=0.95, ge=-1, le=1)


def models(config: Config, seed: int) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """Name -> stage of every model of one zoo, "base" beside them; and the splits of the data."""
    data = config.data
    corpora = {domain: own.model_dump(exclude_defaults=True) for domain, own in data.read.items()}
    words = data.tokenizer or config.encoder
    prepared = texts_stage("zoo/data", corpora, words, data.max_length, data.split_seed, data.labels)
    sizes = {s: {d: data.sizes(d, s) for d in data.domains} for s in SPLITS}
    views = views_of(prepared, sizes, data.split_seed)
    found: dict[str, Stage] = {}

    def tuned(name: str, domain: str, own: int, training: Training, **inputs: Any) -> None:
        settings = {"domains": [domain], "seed": 1000 * seed + own, "precision": "float32"}
        settings |= training.model_dump(exclude_none=True)
        reads: tuple[str, ...] = ()
        if not inputs.get("start"):
            settings["start"], reads = config.encoder, local_model(config.encoder)
        inputs = {"data": {"train": views["train"]}, **inputs}
        seconds = 2 + training.steps * training.batch_size / TRAINED
        found[name] = Stage(
            f"zoo/seed{seed}/{name}", "experiments.finetune:finetune", settings, inputs, seconds, reads
        )

    def spoilt(name: str, function: str, settings: dict[str, Any], **inputs: Stage) -> Stage:
        return Stage(f"zoo/seed{seed}/{name}", f"experiments.zoo.making:{function}", settings, inputs)

    tuned("base", data.base, 0, config.base_training)
    base, training = found["base"], config.task_training
    longer = training.model_copy(update={"steps": config.long * training.steps})
    for place, task in enumerate(data.tasks):
        for number in range(config.copies):
            tuned(f"{task}-{number}", task, 10 * place + number + 1, training, start=base)
        tuned(f"{task}-long", task, 10 * place + config.copies + 1, longer, start=base)
    first = data.tasks[0]
    wrong = spoilt("labels", "shuffled", {"seed": seed}, data=views["train"])
    tuned("shuffled", first, 101, longer, start=base, data={"train": wrong})
    other = spoilt("other", "reinitialised", {"seed": 1000 * seed + 102}, model=base)
    tuned("elsewhere", first, 103, training, start=other)
    wild = training.model_copy(update={"learning_rate": config.exploded})
    tuned("exploded", data.tasks[-1], 104, wild, start=base)
    found["noise"] = spoilt(
        "noise",
        "noisy",
        {"scale": config.noise, "seed": 1000 * seed + 105},
        model=found[f"{data.tasks[min(1, len(data.tasks) - 1)]}-0"],
    )
    return found, views


def cells(config: Config) -> dict[tuple[int, str], Stage]:
    """(seed, way or "families") -> its stage; the models it reads come with it."""
    made: dict[tuple[int, str], Stage] = {}
    tasks = config.data.tasks
    for seed in config.seeds:
        found, views = models(config, seed)
        base = found.pop("base")
        inputs: Mapping[str, Any] = {"base": base, "models": found}
        made[seed, "families"] = Stage(
            f"zoo/seed{seed}/families",
            "experiments.zoo.choosing:families",
            {"threshold": config.threshold},
            inputs,
            20,
        )
        once = len(tasks) * config.data.rows("validation", 500) / EVALUATED
        n = len(found)
        counts = {
            "best single": n,
            "plan": config.budget,
            "exhaustive": n * (n + 1) // 2,
            "coefficient": 10 * n,
        }
        for way in config.ways:
            settings = {
                "way": way, "domains": list(tasks), "budget": config.budget, "trials": config.trials, "threshold": config.threshold, "seed": seed,
            }  # fmt: skip
            seconds = 10 + once * counts.get(way, 2 * n + (config.trials if "cma" in way else 0))
            data = {split: views[split] for split in ("validation", "test")}
            title = f"zoo/seed{seed}/choose-{way.replace(' ', '-')}"
            made[seed, way] = Stage(
                title, "experiments.zoo.choosing:choose", settings, {"data": data, **inputs}, seconds
            )
    return made


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config."""
    return list(cells(config).values())


def records(config: Config, store: Path) -> list[Record]:
    """A record a seed of the families, one a way of choosing, and the verdicts."""
    found: list[Record] = []
    for (seed, way), stage in cells(config).items():
        if way == "families":
            found += recorded(
                stage, store, "families", "families.json", seed=seed, harmful=list(HARMFUL), stranger=STRANGER
            )
        else:
            found += recorded(stage, store, "choice", "choice.json", seed=seed, way=way)
    return [*found, *as_records(verdicts(found))] if of_kind(found, "families") else found


def adjusted_rand(families: Sequence[Sequence[str]], stranger: str) -> float:
    """Adjusted Rand index of families against the truth: all models but one descend from one base (Hubert & Arabie 1985)."""
    from sklearn.metrics import adjusted_rand_score

    names = [name for family in families for name in family]
    labels = [number for number, family in enumerate(families) for _ in family]
    return float(adjusted_rand_score([name == stranger for name in names], labels))


def verdicts(found: Sequence[Record]) -> list[Row]:
    """Claims 17, 18 and 19 from the records."""
    rows = []
    known = of_kind(found, "families")
    seeds = len(known)
    index = [adjusted_rand(one["families"], one["stranger"]) for one in known]
    part = Part(
        17, "", "no model is lost, and the families are those of the bases", "adjusted Rand 1.0", "zoo"
    )
    rows.append(
        part.row(
            ", ".join(f"{value:.3f}" for value in index), "", seeds, HOLDS if min(index) == 1.0 else REFUTED
        )
    )
    choices = {(one["seed"], one["way"]): one for one in of_kind(found, "choice")}

    def both(first: str, second: str) -> list[tuple[Record, Record]]:
        return [
            (choices[seed, first], choices[seed, second])
            for seed, way in choices
            if way == first and (seed, second) in choices
        ]

    def accuracy(one: Record) -> float:
        return float(one["test"]["macro"]["accuracy"])

    part = Part(
        18,
        "a",
        "the plan comes within .3 points of the exhaustive greedy search on test examples",
        ">= -.3 points",
        "zoo",
    )
    if pairs := both("plan", "exhaustive"):
        gap = fmean(accuracy(a) - accuracy(b) for a, b in pairs)
        spent = "; ".join(f"{a['evaluations']} against {b['evaluations']} evaluations" for a, b in pairs)
        rows.append(
            part.row(
                f"{100 * gap:+.2f} points ({spent})", "", len(pairs), HOLDS if gap >= -POINTS else REFUTED
            )
        )
    else:
        rows.append(part.missing())
    part = Part(18, "b", "the plan leaves out all four harmful models", "4 of 4", "zoo")
    plans = [one for (_, way), one in choices.items() if way == "plan"]
    out = [sum(name in one["left_out"] for name in HARMFUL) for one in plans]
    kept = [len(one["weights"]) for one in plans]
    told = ", ".join(f"{n} of 4 ({k} models merged)" for n, k in zip(out, kept, strict=True))
    rows.append(
        part.row(told, "", len(plans), HOLDS if out and min(out) == len(HARMFUL) else REFUTED)
        if plans
        else part.missing()
    )
    part = Part(19, "a", "coefficient is at least as good as average, on validation examples", ">= 0", "zoo")
    if pairs := both("coefficient", "average"):
        gap = fmean(a["score"] - b["score"] for a, b in pairs)
        rows.append(part.row(f"{100 * gap:+.2f} points", "", len(pairs), HOLDS if gap >= 0 else REFUTED))
    else:
        rows.append(part.missing())
    part = Part(
        19,
        "b",
        "CMA-ES from the heuristic's answer reaches the best of the search from random in fewer trials",
        "fewer",
        "zoo",
    )
    if pairs := both("cma-es from average", "cma-es from random"):
        trials = [
            (reached(a["curve"], best(b["curve"])), reached(b["curve"], best(b["curve"]))) for a, b in pairs
        ]
        verdict = HOLDS if all(a is not None and b is not None and a < b for a, b in trials) else REFUTED
        rows.append(part.row("; ".join(f"{a} against {b}" for a, b in trials), "", len(pairs), verdict))
    else:
        rows.append(part.missing())
    return [
        one if one.seeds >= 3 or one.verdict != HOLDS else Row(**{**vars(one), "verdict": NOT_SHOWN})
        for one in rows
    ]


def best(curve: Sequence[float | None]) -> float:
    """The best score of a search."""
    return max((value for value in curve if value is not None), default=0.0)


def reached(curve: Sequence[float | None], goal: float) -> int | None:
    """After how many trials a search has a score; None where it never has."""
    return next((n for n, value in enumerate(curve, 1) if value is not None and value >= goal), None)


def report(found: list[Record]) -> str:
    """The table as Model-GLUE has it, and the verdicts."""
    from experiments.report import format_table
    from experiments.verdicts import COLUMNS
    from experiments.verdicts import cells as as_cells

    choices = of_kind(found, "choice")
    if not choices:
        return "nothing was chosen yet"
    tasks = [name for name in choices[0]["test"] if name not in ("macro", "per_example")]
    rows = []
    for way in dict.fromkeys(one["way"] for one in choices):
        own = [one for one in choices if one["way"] == way]
        cells_ = [f"{100 * fmean(one['test'][task]['accuracy'] for one in own):.1f}" for task in tasks]
        macro = f"{100 * fmean(one['test']['macro']['accuracy'] for one in own):.1f}"
        kept = fmean(len(one["weights"]) for one in own)
        harm = fmean(sum(name in one["weights"] for name in HARMFUL) for one in own)
        price = f"{fmean(one['evaluations'] for one in own):.0f}"
        rows.append(
            [
                way,
                *cells_,
                macro,
                f"{kept:.0f}",
                f"{harm:.0f}",
                price,
                f"{fmean(one['search_seconds'] for one in own):.0f}",
            ]
        )
    table = format_table(["way", *tasks, "macro", "models", "harmful", "evaluations", "seconds"], rows)
    told = of_kind(found, "verdict")
    judged = format_table(list(COLUMNS), [as_cells(row) for row in told]) if told else ""
    return f"Test accuracy, in per cent:\n\n{table}\n\n{judged}".strip()
