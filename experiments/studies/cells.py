"""A study on classifiers as stages (which model is trained, estimated, merged, evaluated and measured from what), and their records.

The base is an encoder fine-tuned on one domain, the tasks are fine-tuned from it, the joint model (the target of every merge)
is fine-tuned from it on all tasks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.config import Training
from experiments.files import CARD
from experiments.pipeline import Stage, card, is_done, origin, recorded, result
from experiments.records import Record
from experiments.statistics import holm
from experiments.studies.classifiers import Config, Merge, Sweep, local_model
from gradmatch.rules import find_rule

# Examples a second on two cores without bfloat16, of MiniLM on texts of up to 64 tokens: for the plan of a run.
TRAINED, EVALUATED, DIFFERENTIATED, SQUARED, GRAMS = 45, 150, 45, 25, 100
TESTED, VALIDATED = 1000, 500  # rows of a domain where nothing limits them, about

READ = {  # which splits a stage's function reads; all of them where it is not here
    "finetune:finetune": ("train",),
    "evaluate:evaluate": ("test",),
    "estimates:estimate_stage": ("train",),
    "mismatch:task_gradient": ("train",),
    "mismatch:mismatch": ("train",),
    "merging:choose": ("validation",),
    "comparing:compare": ("test",),
    "penalised:finetune_penalised": ("train",),
    "redundancy:drop": ("test",),
    "redundancy:compare_analogy": ("test",),
    "search:take_part": ("validation", "test"),
}

Sources = dict[str, Any]  # what a merge reads: base, tasks, base_curvature, curvatures


class Cells:
    """The stages of one config, by what they are of: one object, so that each is made once and read by name."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = config.views()
        self.trained: dict[tuple[int, str], Stage] = {}
        self.curvatures: dict[tuple[int, str], Stage] = {}
        self.gradients: dict[tuple[int, str], Stage] = {}
        self.choices: dict[tuple[int, str], Stage] = {}
        self.merged: dict[tuple[int, str], Stage] = {}
        self.evaluations: dict[tuple[int, str], Stage] = {}
        self.mismatches: dict[tuple[int, str], Stage] = {}
        self.sweeps: dict[tuple[int, str], Stage] = {}
        self.distances: dict[tuple[int, str], Stage] = {}
        self.tested = config.data.rows("test", TESTED)
        for seed in config.seeds:
            self._train(seed)
            self._estimate(seed)
            for name, spec in config.merges.items():
                self._merge(seed, name, spec)
        pairs, tasks = config.compare, list(config.data.tasks)
        self.comparisons = {pair: self._compare("compare", pair, config.data.domains) for pair in pairs}
        self.on_tasks = {pair: self._compare("compare-tasks", pair, tasks) for pair in pairs}

    def all(self) -> list[Stage]:
        """Every stage; what they need comes with them."""
        first = (self.evaluations, self.mismatches, self.distances, self.sweeps)
        last = (self.comparisons, self.on_tasks)
        return [stage for group in (*first, *last) for stage in group.values()]

    def title(self, seed: int) -> str:
        """How the names of a seed's stages begin."""
        return f"{self.config.experiment}/seed{seed}"

    def stage(
        self,
        name: str,
        function: str,
        settings: dict[str, Any],
        seconds: float,
        reads: tuple[str, ...] = (),
        **inputs: Any,
    ) -> Stage:
        """A stage on these data. seconds: on texts."""
        data = {split: self.data[split] for split in READ.get(function, self.data)}
        inputs, seconds = {"data": data, **inputs}, seconds * self.config.pace
        return Stage(name, f"experiments.{function}", settings, inputs, seconds, reads)

    def _train(self, seed: int) -> None:
        config, data = self.config, self.config.data
        base = self._finetune(seed, "base", [data.base], config.base_training)
        for task in data.tasks:
            self._finetune(seed, task, [task], config.training_of(task), start=base)
        self._finetune(seed, "joint", list(data.tasks), config.joint_training, start=base)

    def _finetune(
        self, seed: int, name: str, domains: list[str], training: Training, **start: Stage
    ) -> Stage:
        settings = {
            "domains": domains,
            "precision": self.config.precision,
            "seed": seed,
            **training.model_dump(),
        }
        seconds, reads = 2 + training.steps * training.batch_size / TRAINED, ()
        if not start:
            settings, reads = {**settings, **self.config.start()}, local_model(self.config.encoder)
        tuned = self.stage(
            f"{self.title(seed)}/{name}", "finetune:finetune", settings, seconds, reads, **start
        )
        self.trained[seed, name] = tuned
        self._evaluate(seed, name, tuned)
        return tuned

    def _evaluate(self, seed: int, name: str, model: Stage) -> None:
        domains = self.config.data.domains
        settings = {"domains": domains, "split": "test"}
        seconds = self.tested * len(domains) / EVALUATED
        title = f"{self.title(seed)}/evaluate-{slug(name)}"
        self.evaluations[seed, name] = self.stage(title, "evaluate:evaluate", settings, seconds, model=model)

    def _estimate(self, seed: int) -> None:
        config = self.config
        for name, domain in [("base", config.data.base), *((task, task) for task in config.data.tasks)]:
            self.curvatures[seed, name] = self.fisher(
                f"{self.title(seed)}/curvature-{name}", seed, domain, self.trained[seed, name]
            )
        for task in config.data.tasks:
            settings = {"domain": task, "seed": seed, "examples": config.mismatch_examples}
            seconds = config.mismatch_examples / DIFFERENTIATED
            title, tuned = f"{self.title(seed)}/gradient-{task}", self.trained[seed, task]
            gradient = self.stage(title, "mismatch:task_gradient", settings, seconds, model=tuned)
            self.gradients[seed, task] = gradient
        self._mismatch(seed, "joint", self.trained[seed, "joint"])

    def fisher(self, title: str, seed: int, domain: str, model: Stage) -> Stage:
        """The curvature of a model on a domain."""
        fisher = self.config.fisher
        settings = {"kind": "fisher and gradient", "domain": domain, "seed": seed, **fisher.model_dump()}
        seconds = fisher.examples * fisher.samples / SQUARED
        return self.stage(title, "estimates:estimate_stage", settings, seconds, model=model)

    def _merge(self, seed: int, name: str, spec: Merge) -> None:
        config, tasks, title = self.config, self.config.data.tasks, slug(name)
        sources = self.sources(seed, tasks)
        if "gram" in find_rule(spec.method).needs:
            sources["curvatures"] = {task: self._gram(seed, task) for task in tasks}
        settings, inputs = {**spec.settings, "delta0": config.delta0}, dict(sources)
        if spec.choose:
            choice = self.choice(f"{self.title(seed)}/choose-{title}", spec, settings, sources)
            inputs["choice"] = self.choices[seed, name] = choice
        name_ = f"{self.title(seed)}/merge-{title}"
        merged = Stage(name_, "experiments.merging:merge_stage", settings, inputs, seconds=2)
        self.merged[seed, name] = merged
        self._evaluate(seed, name, merged)
        self._mismatch(seed, name, merged)
        ends = {"base": self.trained[seed, "base"], "joint": self.trained[seed, "joint"]}
        name_ = f"{self.title(seed)}/distance-{title}"
        self.distances[seed, name] = Stage(
            name_, "experiments.comparing:distance", {}, {"model": merged, **ends}
        )
        if config.sweep and name in config.sweep.merges:
            self._sweep(seed, name, config.sweep, settings, inputs)

    def _gram(self, seed: int, task: str) -> Stage:
        """Gram matrices of a task's inputs, from as many examples as its Fisher."""
        fisher, model = self.config.fisher, self.trained[seed, task]
        settings = {"kind": "gram", "domain": task, "seed": seed, **fisher.model_dump(), "samples": 1}
        seconds, title = fisher.examples / GRAMS, f"{self.title(seed)}/gram-{task}"
        return self.stage(title, "estimates:estimate_stage", settings, seconds, model=model)

    def sources(self, seed: int, tasks: Sequence[str]) -> Sources:
        """What a merge of these tasks reads: `merging.merged_model`'s arguments."""
        return {
            "base": self.trained[seed, "base"],
            "tasks": {task: self.trained[seed, task] for task in tasks},
            "base_curvature": self.curvatures[seed, "base"],
            "curvatures": {task: self.curvatures[seed, task] for task in tasks},
        }

    def choice(self, title: str, spec: Merge, settings: Mapping[str, Any], sources: Sources) -> Stage:
        """The stage that chooses a merge's option on validation examples of the base's domain and of the tasks."""
        grid = {option: list(values) for option, values in spec.choose.items()}
        domains = [self.config.data.base, *sources["tasks"]]
        rows = self.config.data.rows("validation", VALIDATED) * len(domains)
        seconds = len(next(iter(grid.values()))) * rows / EVALUATED
        return self.stage(
            title, "merging:choose", {**settings, "grid": grid, "domains": domains}, seconds, **sources
        )

    def measured(
        self,
        title: str,
        seed: int,
        settings: Mapping[str, Any],
        sources: Sources,
        domains: Sequence[str],
        gradients: Mapping[str, Stage] | None = None,
    ) -> Stage:
        """A merge that is measured on domains, and by the tasks' gradients, and not kept."""
        examples, seconds = self.config.mismatch_examples, self.tested * len(domains) / EVALUATED
        return self.stage(
            title,
            "merging:merge_and_measure",
            {**settings, "domains": list(domains), "examples": examples, "seed": seed},
            seconds + len(gradients or ()) * examples / DIFFERENTIATED,
            **sources,
            gradients=gradients or {},
        )

    def _sweep(self, seed: int, name: str, spec: Sweep, settings: dict[str, Any], inputs: Sources) -> None:
        data = self.config.data
        told = {"forecast": spec.forecast, "seed": seed} if spec.forecast else {}
        rows = self.tested * len(data.domains) + 3 * spec.forecast * len(data.tasks)
        shared = {key: value for key, value in settings.items() if key != "alpha"}
        self.sweeps[seed, name] = self.stage(
            f"{self.title(seed)}/sweep-{slug(name)}",
            "sweep:sweep",
            {**shared, "alphas": list(spec.alphas), "domains": data.domains, **told},
            len(spec.alphas) * rows / EVALUATED,
            **inputs,
        )

    def _mismatch(self, seed: int, name: str, model: Stage) -> None:
        config = self.config
        self.mismatches[seed, name] = self.stage(
            f"{self.title(seed)}/mismatch-{slug(name)}",
            "mismatch:mismatch",
            {"seed": seed, "examples": config.mismatch_examples, "delta0": config.delta0},
            config.mismatch_examples * len(config.data.tasks) / DIFFERENTIATED,
            model=model,
            gradients={task: self.gradients[seed, task] for task in config.data.tasks},
            base_curvature=self.curvatures[seed, "base"],
        )

    def _compare(self, title: str, pair: tuple[str, str], domains: list[str]) -> Stage:
        sides = {
            side: {str(seed): self.evaluations[seed, name] for seed in self.config.seeds}
            for side, name in zip(("ours", "theirs"), pair, strict=True)
        }
        name = "-".join([f"{self.config.experiment}/{title}", *map(slug, pair)])
        return self.stage(name, "comparing:compare", {"domains": domains}, 1, **sides)


def slug(name: str) -> str:
    """A merge's name as a part of a folder's."""
    return "".join(character if character.isalnum() else "_" for character in name).lower()


def stages(config: Config) -> list[Stage]:
    """What has to run for the records of this config; what they need comes with them."""
    return Cells(config).all()


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
    for (seed, name), stage in cells.sweeps.items():
        for row in recorded(stage, store, "sweep", "sweep.json", seed=seed, model=name):
            for point in row["points"]:
                point["metrics"] = _with_tasks(point["metrics"], config.data.tasks)
            found.append(row)
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
    row |= {"domains": config.data.domains, **origin(cells.evaluations[cell], store)}
    model = cells.merged[cell] if role == "merge" else cells.trained[cell]
    if role == "merge":
        row["merge"] = {**config.merges[name].settings, "delta0": config.delta0}
    else:
        row["training_seconds"] = card(model, store)["seconds"]
        row["precision"] = result(model, store, "training.json")["precision"]
    row["folder"] = str(model.folder(store) / "model")
    if cell in cells.choices:
        row["choice"] = result(cells.choices[cell], store, "choice.json")
    if cell in cells.mismatches and is_done(cells.mismatches[cell], store):
        row["mismatch"] = result(cells.mismatches[cell], store, "mismatch.json")
    if cell in cells.distances and is_done(cells.distances[cell], store):
        row["distance_to_joint"] = result(cells.distances[cell], store, "distance.json")["relative"]
    yield row


def _with_tasks(metrics: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Add the average over the tasks, without the base's own domain."""
    parts = [metrics[task] for task in tasks]
    averages = {key: fmean(part[key] for part in parts) for key in ("accuracy", "nll", "ece")}
    return {**metrics, "tasks": {**averages, "n": sum(part["n"] for part in parts)}}


def report(found: list[Record]) -> str:
    """What the experiment prints: the table, what it means in two sentences, where the merged model lies."""
    from experiments.report import sentiment_report

    return sentiment_report(found)
