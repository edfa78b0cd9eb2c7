"""A study on classifiers as stages (which model is trained, estimated, merged, evaluated and measured from what), and their records.

The base is an encoder fine-tuned on one domain, the tasks are fine-tuned from it, the joint model (the target of every merge)
is fine-tuned from it on all tasks together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import Training
from experiments.pipeline import Stage
from experiments.studies.classifiers import Config, Merge, Sweep, local_model
from gradmatch.rules import find_rule

# Examples a second on two cores without bfloat16, of MiniLM on texts of up to 64 tokens: for the plan of a run.
TRAINED, EVALUATED, DIFFERENTIATED, SQUARED, GRAMS = 45, 150, 45, 25, 100
TESTED, VALIDATED = 1000, 500  # rows of a domain where nothing limits them, about

READ = {  # which splits a stage's function reads; all of them where it is not here
    "finetune:finetune": ("train",),
    "finetune:take": ("train",),
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
        self.sweeps: dict[tuple[int, str, float], Stage] = {}
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
        return [*self.data.values(), *(stage for group in (*first, *last) for stage in group.values())]

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
        base = self._model(seed, "base", [data.base], config.base_training)
        for task in data.tasks:
            self._model(
                seed, task, [task], None if task in config.models else config.training_of(task), start=base
            )
        if config.has_joint:
            self._model(seed, "joint", list(data.tasks), config.joint_training, start=base)

    def _model(
        self, seed: int, name: str, domains: list[str], training: Training | None, **start: Stage
    ) -> Stage:
        """A model that is trained, or taken as it is."""
        config = self.config
        settings = {"domains": domains, "seed": seed}
        reads: tuple[str, ...] = ()
        own = config.start()
        if not start:
            settings, reads = settings | own, local_model(config.encoder)
        if training is not None:
            settings |= {"precision": config.precision, **training.model_dump(exclude_none=True)}
            seconds, function = 2 + training.steps * training.batch_size / TRAINED, "finetune:finetune"
        else:
            source = config.models.get(name, config.encoder)
            settings |= {**own, "source": source}
            settings.pop("start", None)
            seconds, reads, function = 2, local_model(source), "finetune:take"
        title = f"{self.title(seed)}/{name}"
        self.trained[seed, name] = self.stage(title, function, settings, seconds, reads, **start)
        self._evaluate(seed, name, self.trained[seed, name])
        return self.trained[seed, name]

    def _evaluate(self, seed: int, name: str, model: Stage) -> None:
        domains = self.config.data.domains
        settings: dict[str, Any] = {"domains": domains, "split": "test"}
        if self.config.evaluation:
            settings["own"] = self.config.evaluation
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
        if config.has_joint:
            self._mismatch(seed, "joint", self.trained[seed, "joint"])

    def fisher(self, title: str, seed: int, domain: str, model: Stage) -> Stage:
        """The curvature of a model on a domain."""
        fisher = self.config.fisher
        settings = {"domain": domain, "seed": seed, **fisher.settings}
        seconds = fisher.examples * fisher.samples / SQUARED
        return self.stage(title, "estimates:estimate_stage", settings, seconds, model=model)

    def _merge(self, seed: int, name: str, spec: Merge) -> None:
        config, tasks, title = self.config, self.config.data.tasks, slug(name)
        needs = find_rule(spec.method).needs
        sources = self.sources(seed, tasks)
        if not needs & {
            "base_curvature",
            "curvature",
            "gradient",
            "factors",
        }:  # nothing that it reads changes with them
            sources = {"base": sources["base"], "tasks": sources["tasks"]}
        if "gram" in needs:
            sources["curvatures"] = {task: self._gram(seed, task) for task in tasks}
        settings, inputs = spec.told(config.delta0), dict(sources)
        if spec.choose:
            choice = self.choice(f"{self.title(seed)}/choose-{title}", spec, settings, sources)
            inputs["choice"] = self.choices[seed, name] = choice
        name_ = f"{self.title(seed)}/merge-{title}"
        merged = Stage(name_, "experiments.merging:merge_stage", settings, inputs, seconds=2)
        self.merged[seed, name] = merged
        self._evaluate(seed, name, merged)
        self._mismatch(seed, name, merged)
        if config.has_joint:
            self._distance(seed, name, merged)
        if config.sweep and name in config.sweep.merges:
            self._sweep(seed, name, config.sweep, settings, inputs)

    def _distance(self, seed: int, name: str, merged: Stage) -> None:
        ends = {"base": self.trained[seed, "base"], "joint": self.trained[seed, "joint"]}
        name_ = f"{self.title(seed)}/distance-{slug(name)}"
        self.distances[seed, name] = Stage(
            name_, "experiments.comparing:distance", {}, {"model": merged, **ends}
        )

    def _gram(self, seed: int, task: str) -> Stage:
        """Gram matrices of a task's inputs, from as many examples as its Fisher."""
        fisher, model = self.config.fisher, self.trained[seed, task]
        settings = {"domain": task, "seed": seed, **fisher.settings, "kind": "gram", "samples": 1}
        settings.pop("options", None)
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
        for alpha in spec.alphas:
            title = f"{self.title(seed)}/sweep-{slug(name)}-{slug(f'{alpha:g}')}"
            own = {**settings, "alpha": alpha, "domains": data.domains, **told}
            self.sweeps[seed, name, alpha] = self.stage(
                title, "sweep:point", own, 4 + rows / EVALUATED, **inputs
            )

    def _mismatch(self, seed: int, name: str, model: Stage) -> None:
        config = self.config
        self.mismatches[seed, name] = self.stage(
            f"{self.title(seed)}/mismatch-{slug(name)}",
            "mismatch:mismatch",
            {"seed": seed, "examples": config.mismatch_examples},
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
