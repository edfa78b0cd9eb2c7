"""The sentiment study as stages: which model is trained, estimated, merged, evaluated and measured from what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.pipeline import Stage
from gradmatch.rules import RULES

if TYPE_CHECKING:
    from experiments.config import Training
    from experiments.studies.sentiment import Config, Merge, Sweep

SOURCES = ("experiments.models", "experiments.assets")
MERGING = (  # what decides a merge's numbers; not the command line, cards, or writers
    *(f"gradmatch.{name}" for name in ("merging", "engine", "models", "plan", "rules")),
    "gradmatch.estimators.curvature",
)
# Examples a second on two cores without bfloat16, of MiniLM on texts of up to 64 tokens: for the plan of a run.
TRAINED, EVALUATED, DIFFERENTIATED, SQUARED = 45, 150, 45, 25
MISMATCH = ("gradmatch.common.layers", "gradmatch.measure.mismatch", "gradmatch.measure.objective")


class Cells:
    """The stages of one config, by what they are of: one object, so that each is made once and read by name."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = self._prepare()
        self.trained: dict[tuple[int, str], Stage] = {}
        self.curvatures: dict[tuple[int, str], Stage] = {}
        self.gradients: dict[tuple[int, str], Stage] = {}
        self.choices: dict[tuple[int, str], Stage] = {}
        self.merged: dict[tuple[int, str], Stage] = {}
        self.evaluations: dict[tuple[int, str], Stage] = {}
        self.mismatches: dict[tuple[int, str], Stage] = {}
        self.sweeps: dict[tuple[int, str], Stage] = {}
        self.distances: dict[tuple[int, str], Stage] = {}
        for seed in config.seeds:
            self._train(seed)
            self._merge(seed)
        everywhere, tasks = config.data.domains, list(config.data.tasks)
        self.comparisons = {pair: self._compare(*pair, "compare", everywhere) for pair in config.compare}
        self.on_tasks = {pair: self._compare(*pair, "compare-tasks", tasks) for pair in config.compare}

    def all(self) -> list[Stage]:
        """Every stage; what they need comes with them."""
        groups = (
            self.evaluations,
            self.mismatches,
            self.distances,
            self.sweeps,
            self.comparisons,
            self.on_tasks,
        )
        return [stage for group in groups for stage in group.values()]  # type: ignore[attr-defined]

    def _prepare(self) -> Stage:
        """The stage that reads the data."""
        data = self.config.data
        limits = {"validation": data.validation, "test": data.test}
        settings: dict[str, Any] = {
            "encoder": self.config.encoder,
            "max_length": data.max_length,
            "limits": limits if data.train is None else {**limits, "train": data.train},
            "split_seed": data.split_seed,
        }
        if not data.corpora:
            given = {"source": data.source, "domains": data.domains}
            return Stage(
                "sentiment/data",
                "experiments.tasks.sentiment:prepare",
                {**given, **settings},
                code=SOURCES,
                seconds=10,
            )
        given = {
            "corpora": {
                domain: data.corpora[domain].model_dump(exclude_defaults=True) for domain in data.domains
            }
        }
        code = (*SOURCES, "experiments.tasks.sentiment")
        corpora = "experiments.tasks.corpora:prepare_corpora"
        return Stage(
            "sentiment/data", corpora, {**given, **settings}, code=code, seconds=30, reads=data.local
        )

    def _start(self) -> dict[str, Any]:
        """What the base is trained from, and its new head."""
        return {"start": self.config.encoder, "num_labels": 2}

    def _train(self, seed: int) -> None:
        config, data = self.config, self.config.data
        base = self._finetune(seed, "base", [data.base], config.base_training, None)
        for task in data.tasks:
            steps = config.task_steps.get(task, config.task_training.steps)
            self._finetune(seed, task, [task], config.task_training.model_copy(update={"steps": steps}), base)
        self._finetune(seed, "joint", list(data.tasks), config.joint_training, base)

    def _finetune(
        self, seed: int, name: str, domains: list[str], training: Training, start: Stage | None
    ) -> Stage:
        stage = Stage(
            f"sentiment/seed{seed}/{name}",
            "experiments.finetune:finetune",
            {
                "domains": domains,
                "precision": self.config.precision,
                "seed": seed,
                **training.model_dump(),
                **({} if start else self._start()),
            },
            {"data": self.data, **({"start": start} if start else {})},
            SOURCES,
            2 + training.steps * training.batch_size / TRAINED,
        )
        self.trained[seed, name] = stage
        self._evaluate(seed, name, stage)
        return stage

    def _evaluate(self, seed: int, name: str, model: Stage) -> None:
        settings = {"domains": self.config.data.domains, "split": "test"}
        self.evaluations[seed, name] = Stage(
            f"sentiment/seed{seed}/evaluate-{slug(name)}",
            "experiments.evaluate:evaluate",
            settings,
            {"data": self.data, "model": model},
            SOURCES,
            (self.config.data.test or 1000) * len(self.config.data.domains) / EVALUATED,
        )

    def _merge(self, seed: int) -> None:
        config, tasks = self.config, self.config.data.tasks
        for name, domain in [("base", config.data.base), *((task, task) for task in tasks)]:
            self.curvatures[seed, name] = Stage(
                f"sentiment/seed{seed}/curvature-{name}",
                "experiments.estimation:curvature",
                {"domain": domain, "seed": seed, **config.fisher.model_dump()},
                {"data": self.data, "model": self.trained[seed, name]},
                (*SOURCES, "gradmatch.estimators"),
                config.fisher.examples * config.fisher.samples / SQUARED,
            )
        for task in tasks:
            self.gradients[seed, task] = Stage(
                f"sentiment/seed{seed}/gradient-{task}",
                "experiments.mismatch:task_gradient",
                {"domain": task, "seed": seed, "examples": config.mismatch_examples},
                {"data": self.data, "model": self.trained[seed, task]},
                (*SOURCES, *MISMATCH),
                config.mismatch_examples / DIFFERENTIATED,
            )
        self._mismatch(seed, "joint", self.trained[seed, "joint"])
        for name, spec in config.merges.items():
            sources = self.sources(seed, tasks)
            if "gram" in RULES[spec.method].needs:
                sources["curvatures"] = {task: self._gram(seed, task) for task in tasks}
            settings = {
                "method": spec.method,
                "alpha": spec.alpha,
                "options": spec.options,
                "delta0": config.delta0,
            }
            inputs: dict[str, Any] = dict(sources)
            if spec.choose:
                inputs["choice"] = self.choices[seed, name] = choice_stage(
                    f"sentiment/seed{seed}/choose-{slug(name)}",
                    spec,
                    config,
                    settings,
                    sources,
                    self.data,
                    tasks,
                )
            self.merged[seed, name] = Stage(
                f"sentiment/seed{seed}/merge-{slug(name)}",
                "experiments.merging:merge_stage",
                settings,
                inputs,
                MERGING,
                2,
            )
            self._evaluate(seed, name, self.merged[seed, name])
            self._mismatch(seed, name, self.merged[seed, name])
            self.distances[seed, name] = Stage(
                f"sentiment/seed{seed}/distance-{slug(name)}",
                "experiments.statistics:distance",
                {},
                {
                    "model": self.merged[seed, name],
                    "base": self.trained[seed, "base"],
                    "joint": self.trained[seed, "joint"],
                },
            )
            if config.sweep and name in config.sweep.merges:
                self._sweep(seed, name, config.sweep, settings, inputs)

    def _gram(self, seed: int, task: str) -> Stage:
        """Gram matrices of a task's inputs, from as many examples as its Fisher."""
        fisher = self.config.fisher
        settings = {"kind": "gram", "samples": 1, "trained_batch_size": self.config.task_training.batch_size}
        return Stage(
            f"sentiment/seed{seed}/gram-{task}",
            "experiments.estimates:estimate_stage",
            {
                "domain": task,
                "seed": seed,
                "examples": fisher.examples,
                "batch_size": fisher.batch_size,
                **settings,
            },
            {"data": self.data, "model": self.trained[seed, task]},
            (*SOURCES, "gradmatch.estimators"),
            fisher.examples * 0.01,
        )

    def sources(self, seed: int, tasks: Sequence[str]) -> dict[str, Any]:
        """What a merge of these tasks reads: `merging.merged_model`'s arguments."""
        return {
            "base": self.trained[seed, "base"],
            "tasks": {task: self.trained[seed, task] for task in tasks},
            "base_curvature": self.curvatures[seed, "base"],
            "curvatures": {task: self.curvatures[seed, task] for task in tasks},
        }

    def _sweep(
        self, seed: int, name: str, spec: Sweep, settings: dict[str, Any], inputs: dict[str, Any]
    ) -> None:
        data = self.config.data
        told = {"forecast": spec.forecast, "seed": seed} if spec.forecast else {}
        examples = (data.test or 1000) * len(data.domains) + 3 * spec.forecast * len(data.tasks)
        self.sweeps[seed, name] = Stage(
            f"sentiment/seed{seed}/sweep-{slug(name)}",
            "experiments.sweep:sweep",
            {
                **{key: value for key, value in settings.items() if key != "alpha"},
                "alphas": list(spec.alphas),
                "domains": data.domains,
                **told,
            },
            {**inputs, "data": self.data},
            (
                *SOURCES,
                *MERGING,
                *MISMATCH,
                "experiments.evaluate",
                "experiments.merging",
                "experiments.mismatch",
            ),
            len(spec.alphas) * examples / EVALUATED,
        )

    def _mismatch(self, seed: int, name: str, model: Stage) -> None:
        config = self.config
        self.mismatches[seed, name] = Stage(
            f"sentiment/seed{seed}/mismatch-{slug(name)}",
            "experiments.mismatch:mismatch",
            {"seed": seed, "examples": config.mismatch_examples, "delta0": config.delta0},
            {
                "data": self.data,
                "model": model,
                "gradients": {task: self.gradients[seed, task] for task in config.data.tasks},
                "base_curvature": self.curvatures[seed, "base"],
            },
            (*SOURCES, *MISMATCH),
            config.mismatch_examples * len(config.data.tasks) / DIFFERENTIATED,
        )

    def _compare(self, ours: str, theirs: str, title: str, domains: list[str]) -> Stage:
        seeds = self.config.seeds
        return Stage(
            f"sentiment/{title}-{slug(ours)}-{slug(theirs)}",
            "experiments.statistics:compare",
            {"domains": domains},
            {
                "ours": {str(seed): self.evaluations[seed, ours] for seed in seeds},
                "theirs": {str(seed): self.evaluations[seed, theirs] for seed in seeds},
                "data": self.data,
            },
        )


def choice_stage(
    title: str,
    spec: Merge,
    config: Config,
    settings: dict[str, Any],
    sources: dict[str, Any],
    data: Stage,
    tasks: Sequence[str],
) -> Stage:
    """The stage that chooses a merge's option on validation examples of the base's domain and of `tasks`."""
    grid = {option: list(values) for option, values in spec.choose.items()}
    domains = [config.data.base, *tasks]
    return Stage(
        title,
        "experiments.merging:choose",
        {**settings, "grid": grid, "domains": domains},
        {**sources, "data": data},
        (*SOURCES, *MERGING, "experiments.evaluate"),
        len(next(iter(grid.values()))) * (config.data.validation or 500) * len(domains) / EVALUATED,
    )


def slug(name: str) -> str:
    """A merge's name as a part of a folder's."""
    return "".join(character if character.isalnum() else "_" for character in name).lower()
