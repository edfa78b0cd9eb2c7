"""The stages of a removal study: texts, models, curvatures, choices, and an evaluation at every point of every path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.pipeline import Stage
from experiments.studies.classifiers import local_model
from experiments.studies.removal_config import Config, Forecast, Method
from experiments.tasks.texts import LISTS
from gradmatch.rules import find_rule

BASE_SEED = 0  # of what is had of the base: the same whatever seeds a config asks for
SIDE, PROMPTS, BATCH = (
    500,
    300,
    32,
)  # texts a side and prompts a list where nothing limits them, about; texts a batch
# Seconds of a token on two cores without bfloat16, of SmolLM2-135M: for the plan of a run.
TRAINED, SQUARED, EVALUATED, GENERATED = 0.0067, 0.009, 0.0025, 0.009

Inputs = Mapping[str, Stage]


class Cells:
    """The stages of one config, by what they are of."""

    def __init__(self, config: Config) -> None:
        self.config = config
        lists = [source.source for source in config.sources.values()]
        self.data = Stage(
            "removal/data",
            "experiments.tasks.texts:prepare",
            config.model_dump(include={"remove", "keep", "prompts", "limits", "split_seed"}),
            seconds=8,
            reads=tuple(source for source in lists if source not in LISTS),
        )
        function, reads = "experiments.removal.language:save_base", local_model(config.model)
        self.base = Stage("removal/base", function, {"source": config.model}, seconds=30, reads=reads)
        self.trained: dict[int, Stage] = {}
        self.curvatures: dict[int, Stage] = {}  # of the fine-tuned model
        self.evaluations: dict[tuple[int, str, float], Stage] = {}
        self.forecasts: dict[int, Stage] = {}
        self.choices: dict[tuple[int, str], Stage] = {}
        # The base is one model whatever the seed: its curvature and its own evaluation are had once.
        self.base_curvature = self._curvature("removal/curvature-base", "keep", self.base, BASE_SEED)
        unedited = Method(method="removal", alphas=(1.0,))
        self.unedited = self._point("removal", "base", unedited, 0.0, {"base": self.base}, BASE_SEED)
        for seed in config.seeds:
            self._prepare(seed)
            self._evaluate(seed)

    def all(self) -> list[Stage]:
        """Every stage, the longest first, so that no worker is left with it; what they need comes with them."""
        return [*self.forecasts.values(), self.unedited, *self.evaluations.values()]

    def _stage(
        self, name: str, function: str, settings: dict[str, Any], seconds: float, **inputs: Stage
    ) -> Stage:
        data = {"data": self.data, **inputs}
        return Stage(name, f"experiments.removal.{function}", settings, data, seconds=seconds)

    def _prepare(self, seed: int) -> None:
        config, name = self.config, f"removal/seed{seed}"
        tokens = config.training.steps * config.max_length * config.training.batch_size
        settings = {**self._reading(seed), **config.training.model_dump(exclude_none=True)}
        seconds = 10 + tokens * TRAINED
        tuned = self._stage(f"{name}/task", "stages:finetune", settings, seconds, base=self.base)
        self.trained[seed] = tuned
        self.curvatures[seed] = self._curvature(f"{name}/curvature-task", "remove", tuned, seed)

    def _reading(self, seed: int) -> dict[str, Any]:
        """How texts are read, and what every draw is seeded by."""
        return {"max_length": self.config.max_length, "precision": self.config.precision, "seed": seed}

    def _curvature(self, name: str, side: str, model: Stage, seed: int) -> Stage:
        fisher = self.config.fisher
        settings = {"side": side, **self._reading(seed), **fisher.model_dump()}
        seconds = 10 + fisher.examples * fisher.samples * self.config.max_length * SQUARED
        return self._stage(name, "stages:curvature", settings, seconds, model=model)

    def _evaluating(self, seed: int) -> dict[str, Any]:
        """How continuations are made and scored, and losses taken."""
        own = self.config.model_dump(include={"generation", "scorer"})
        return {**self._reading(seed), **own, "batch_size": BATCH}

    def _point(self, folder: str, label: str, spec: Method, alpha: float, inputs: Inputs, seed: int) -> Stage:
        """The evaluation of one point of one path."""
        config = self.config
        texts = 2 * (config.limits.test or SIDE) * config.max_length
        prompts = sum(source.limit or PROMPTS for source in config.prompts.values())
        settings = {"method": spec.method, "alpha": alpha, "options": spec.options, "split": "test"}
        seconds = 6 + texts * EVALUATED + prompts * config.generation.tokens * GENERATED
        name, settings = f"{folder}/evaluate-{label}-{alpha:g}", settings | self._evaluating(seed)
        return self._stage(name, "stages:evaluate", settings, seconds, **inputs)

    def _evaluate(self, seed: int) -> None:
        config, folder = self.config, f"removal/seed{seed}"
        models = {"base": self.base, "task": self.trained[seed]}
        both = {"base_curvature": self.base_curvature, "task_curvature": self.curvatures[seed]}
        for label, spec in config.methods.items():
            inputs = {**models, **(both if find_rule(spec.method).needs else {})}
            if spec.choose:
                choice = self._choose(f"{folder}/choose-{label}", spec, seed, inputs)
                inputs["chosen"] = self.choices[seed, label] = choice
            for alpha in spec.alphas:
                point = self._point(folder, label, spec, alpha, inputs, seed)
                self.evaluations[seed, label, alpha] = point
            if config.forecast and config.forecast.method == label:
                self.forecasts[seed] = self._forecast(folder, spec, config.forecast, {**both, **inputs})

    def _choose(self, name: str, spec: Method, seed: int, inputs: Inputs) -> Stage:
        """The choice of one method's option on validation data."""
        config, how = self.config, self.config.choosing
        assert how is not None  # the config was checked
        alphas = list(spec.alphas[1::2] or spec.alphas)
        grid = {option: list(values) for option, values in spec.choose.items()}
        settings = {"method": spec.method, "options": spec.options, "alphas": alphas, "grid": grid}
        settings |= {"count": how.count, "nats": how.nats, "split_seed": config.split_seed}
        settings |= {"prompts": config.prompts[how.prompts].model_dump(), **self._evaluating(seed)}
        points = sum(map(len, grid.values())) * len(alphas) + 1
        seconds = points * (14 + how.count * config.generation.tokens * GENERATED)
        return self._stage(name, "choosing:choose", settings, seconds, **inputs)

    def _forecast(self, folder: str, spec: Method, how: Forecast, inputs: Inputs) -> Stage:
        """The forecasts along one method's path."""
        settings = spec.model_dump(include={"method", "options"}) | {"alphas": list(spec.alphas)}
        settings |= {"max_length": self.config.max_length, "examples": how.examples, "nats": how.nats}
        seconds = 30 + 26 * len(spec.alphas)
        return self._stage(f"{folder}/forecast", "stages:forecast", settings, seconds, **inputs)
