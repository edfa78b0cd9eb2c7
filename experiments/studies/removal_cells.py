"""The stages of a removal study: texts, models, curvatures, choices, and an evaluation at every point of every path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.pipeline import Stage
from experiments.studies.sentiment_cells import MERGING
from experiments.tasks.texts import LISTS
from gradmatch.rules import RULES

if TYPE_CHECKING:
    from experiments.studies.removal import Config, Forecast, Method

READING = ("experiments.tasks.texts", "experiments.tasks.sentiment", "experiments.assets")
SOURCES = (*READING, "experiments.removal.language", "experiments.finetune")
WRITING = ("experiments.removal.sampling", "experiments.removal.scorers")  # continuations and their scores
BASE_SEED = 0  # of what is had of the base: the same whatever seeds a config asks for
EDITING = (*MERGING, "gradmatch.subtraction", "gradmatch.models.checkpoint")


class Cells:
    """The stages of one config, by what they are of."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = Stage(
            "removal/data",
            "experiments.tasks.texts:prepare",
            {
                "remove": config.remove.model_dump(),
                "keep": config.keep.model_dump(),
                "prompts": {name: source.model_dump() for name, source in config.prompts.items()},
                "limits": config.limits.model_dump(),
                "split_seed": config.split_seed,
            },
            code=READING,
            seconds=8,
            reads=tuple(source.source for source in config.sources.values() if source.source not in LISTS),
        )
        self.base = Stage(
            "removal/base",
            "experiments.removal.language:save_base",
            {"source": config.model},
            code=("experiments.assets",),
            seconds=30,
        )
        self.trained: dict[int, Stage] = {}
        self.curvatures: dict[int, Stage] = {}  # of the fine-tuned model
        self.evaluations: dict[tuple[int, str, float], Stage] = {}
        self.forecasts: dict[int, Stage] = {}
        self.choices: dict[tuple[int, str], Stage] = {}
        # The base is one model whatever the seed: its curvature and its own evaluation are had once.
        self.base_curvature = self._curvature("removal/curvature-base", "keep", self.base, BASE_SEED)
        self.unedited = self._point("removal", "base", "removal", 0.0, {}, {"base": self.base}, BASE_SEED)
        for seed in config.seeds:
            self._prepare(seed)
            self._evaluate(seed)

    def all(self) -> list[Stage]:
        """Every stage, the longest first, so that no worker is left with it; what they need comes with them."""
        return [*self.forecasts.values(), self.unedited, *self.evaluations.values()]

    def _prepare(self, seed: int) -> None:
        config = self.config
        tokens = config.max_length * config.training.batch_size
        self.trained[seed] = Stage(
            f"removal/seed{seed}/task",
            "experiments.removal.stages:finetune",
            {**self._reading(seed), **config.training.model_dump()},
            {"data": self.data, "base": self.base},
            SOURCES,
            10 + config.training.steps * tokens * 0.0067,
        )
        name = f"removal/seed{seed}/curvature-task"
        self.curvatures[seed] = self._curvature(name, "remove", self.trained[seed], seed)

    def _reading(self, seed: int) -> dict[str, Any]:
        """How texts are read, and what every draw is seeded by."""
        return {"max_length": self.config.max_length, "precision": self.config.precision, "seed": seed}

    def _curvature(self, name: str, side: str, model: Stage, seed: int) -> Stage:
        config = self.config
        return Stage(
            name,
            "experiments.removal.stages:curvature",
            {"side": side, **self._reading(seed), **config.fisher.model_dump()},
            {"data": self.data, "model": model},
            (*SOURCES, "gradmatch.estimators"),
            10 + config.fisher.examples * config.fisher.samples * config.max_length * 0.009,
        )

    def _evaluating(self, seed: int) -> dict[str, Any]:
        """How continuations are made and scored, and losses taken."""
        config = self.config
        return {
            **self._reading(seed),
            "batch_size": 32,
            "generation": config.generation.model_dump(),
            "scorer": config.scorer,
        }

    def _point(
        self,
        folder: str,
        label: str,
        method: str,
        alpha: float,
        options: Mapping[str, Any],
        inputs: Mapping[str, Stage],
        seed: int,
    ) -> Stage:
        """The evaluation of one point of one path."""
        config = self.config
        texts = 2 * (config.limits.test or 500)
        prompts = sum(source.limit or 300 for source in config.prompts.values())
        return Stage(
            f"{folder}/evaluate-{label}-{alpha:g}",
            f"{_module(inputs)}:evaluate",
            {
                "method": method,
                "alpha": alpha,
                "options": dict(options),
                "split": "test",
                **self._evaluating(seed),
            },
            {"data": self.data, **inputs},
            (*SOURCES, *WRITING, *(EDITING if alpha else ()), *_called(inputs)),
            6 + texts * config.max_length * 0.0025 + prompts * config.generation.tokens * 0.009,
        )

    def _evaluate(self, seed: int) -> None:
        config = self.config
        models = {"base": self.base, "task": self.trained[seed]}
        folders = {
            **models,
            "base_curvature": self.base_curvature,
            "task_curvature": self.curvatures[seed],
        }
        for label, spec in config.methods.items():
            inputs = dict(folders if RULES[spec.method].needs else models)
            if spec.choose:
                inputs["chosen"] = self.choices[seed, label] = self._choose(seed, label, inputs)
            for alpha in spec.alphas:
                self.evaluations[seed, label, alpha] = self._point(
                    f"removal/seed{seed}", label, spec.method, alpha, spec.options, inputs, seed
                )
            if config.forecast and config.forecast.method == label:
                self.forecasts[seed] = self._forecast(seed, spec, config.forecast, {**folders, **inputs})

    def _choose(self, seed: int, label: str, folders: Mapping[str, Stage]) -> Stage:
        """The choice of one method's option on validation data."""
        config, spec, how = self.config, self.config.methods[label], self.config.choosing
        assert how is not None  # the config was checked
        alphas = list(spec.alphas[1::2] or spec.alphas)
        grid = {option: list(values) for option, values in spec.choose.items()}
        count = sum(map(len, grid.values())) * len(alphas) + 1
        return Stage(
            f"removal/seed{seed}/choose-{label}",
            "experiments.removal.choosing:choose",
            {
                "method": spec.method,
                "alphas": alphas,
                "options": spec.options,
                "grid": grid,
                "prompts": config.prompts[how.prompts].model_dump(),
                "count": how.count,
                "nats": how.nats,
                "split_seed": config.split_seed,
                **self._evaluating(seed),
            },
            {"data": self.data, **folders},
            (
                *SOURCES,
                *WRITING,
                *EDITING,
                "experiments.removal.stages",
                "experiments.removal.tradeoff",
            ),
            count * (14 + how.count * config.generation.tokens * 0.009),
        )

    def _forecast(self, seed: int, spec: Method, how: Forecast, inputs: Mapping[str, Stage]) -> Stage:
        """The forecasts along one method's path."""
        return Stage(
            f"removal/seed{seed}/forecast",
            f"{_module(inputs)}:forecast",
            {
                "method": spec.method,
                "alphas": list(spec.alphas),
                "options": spec.options,
                "max_length": self.config.max_length,
                "examples": how.examples,
                "nats": how.nats,
            },
            {"data": self.data, **inputs},
            (*SOURCES, *EDITING, "gradmatch.removal", "gradmatch.diagnosis", *_called(inputs)),
            30 + 26 * len(spec.alphas),
        )


def _module(inputs: Mapping[str, Stage]) -> str:
    """Where the stages live that take these inputs: with a chosen option, or without."""
    return "experiments.removal.choosing" if "chosen" in inputs else "experiments.removal.stages"


def _called(inputs: Mapping[str, Stage]) -> tuple[str, ...]:
    """What those stages call to work with the option that was chosen."""
    return ("experiments.removal.stages",) if "chosen" in inputs else ()
