"""The stages of a comparison of removals: texts or facts, models, curvatures, and a path a way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.config import Training
from experiments.pipeline import Stage
from experiments.studies.classifiers import local_model
from experiments.studies.unlearning_config import Config, Way
from experiments.tasks.texts import LISTS

# Seconds of a token on two cores without bfloat16, of SmolLM2-135M: for the plan of a run.
TRAINED, CURVED, EVALUATED, GENERATED = 0.0067, 0.018, 0.0025, 0.009


class Cells:
    """The stages of one config."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.paths: dict[tuple[int, int, str], Stage] = {}
        self.references: dict[tuple[int, str], Stage] = {}
        self.judge: Stage | None = None
        if config.judge:
            settings = {**config.judge.model_dump(), "seed": 0}
            self.judge = Stage(
                "unlearning/judge", "experiments.removal.judge:train", settings, seconds=60,
                reads=(config.judge.source, *local_model(config.judge.encoder)),
            )  # fmt: skip
        reads = local_model(config.model)
        self.start = Stage(
            "removal/base", "experiments.removal.language:save_base", {"source": config.model}, seconds=30, reads=reads
        )  # fmt: skip
        for seed in config.seeds:
            self._seed(seed)

    def all(self) -> list[Stage]:
        """Every stage that is asked for; what they need comes with them."""
        judged = [self.judge] if self.judge else []
        return [*judged, *self.references.values(), *self.paths.values()]

    def _seed(self, seed: int) -> None:
        config, title = self.config, f"unlearning/seed{seed}"
        facts = config.facts
        data = self._data(seed)
        base, retrained = self.start, None
        if facts:
            assert config.learning is not None  # the config was checked
            base = self._tuned(f"{title}/learned", "all", self.start, config.learning, seed, data)
            retrained = self._tuned(f"{title}/retrained", "keep", self.start, config.learning, seed, data)
            for name, model in (("learned", base), ("retrained", retrained)):
                self.references[seed, name] = Stage(
                    f"{title}/reference-{name}", "experiments.removal.curves:reference", {"max_length": config.max_length},
                    {"data": data, "model": model, **({"retrained": retrained} if name == "learned" else {})}, seconds=60,
                )  # fmt: skip
        sides = {"keep": config.guard // 2, "beside": config.guard - config.guard // 2}
        guard = self._curvature(
            f"{title}/guard", sides if facts else {"keep": config.guard}, "kfac", base, data, seed
        )
        gradient = self._curvature(
            f"{title}/gradient", {"remove": config.gradient}, "fisher", base, data, seed, gradient=True
        )
        shared = {"retrained": retrained} if retrained else {}
        shared |= {"judge": self.judge} if self.judge and config.texts else {}
        plain = {
            "data": data,
            "base": base,
            "task": base,
            "guard": guard,
            "gradient": gradient,
            "own": gradient,
        }
        unedited = self._path(f"{title}/unedited", "", Way(way="negation"), seed, plain | shared)
        for bad in range(config.bad):
            own = seed * 100 + bad
            task = self._tuned(f"{title}/bad{bad}", "remove", base, config.training, own, data)
            curved = self._curvature(
                f"{title}/own{bad}", {"remove": config.gradient}, "fisher", task, data, seed
            )
            given = {
                "data": data,
                "base": base,
                "task": task,
                "guard": guard,
                "gradient": gradient,
                "own": curved,
            }
            given |= shared | {"unedited": unedited}
            for label, way in config.ways.items():
                self.paths[seed, bad, label] = self._path(
                    f"{title}/bad{bad}/{label}", label, way, seed, given
                )

    def _data(self, seed: int) -> Stage:
        config = self.config
        if config.facts:
            settings = {**config.facts.model_dump(), "seed": seed}
            return Stage("unlearning/facts", "experiments.removal.facts:prepare", settings, seconds=5)
        assert config.texts is not None  # one of the two
        asked = config.texts
        sources = [asked.remove, asked.keep, asked.beside, *asked.prompts.values()]
        settings = asked.model_dump(include={"remove", "keep", "beside", "prompts"})
        settings |= {"limits": asked.model_dump(include={"train", "validation", "test"}), "split_seed": 0}
        reads = tuple(source.source for source in sources if source.source not in LISTS)
        return Stage("unlearning/texts", "experiments.tasks.texts:prepare", settings, seconds=8, reads=reads)

    def _tuned(self, name: str, side: str, base: Stage, how: Training, seed: int, data: Stage) -> Stage:
        settings = {
            "max_length": self.config.max_length,
            "precision": "float32",
            "seed": seed,
            "side": side,
            **how.model_dump(exclude_none=True),
        }
        settings |= {"end": True} if self.config.facts else {}
        seconds = 10 + how.steps * how.batch_size * self.config.max_length * TRAINED
        inputs = {"data": data, "base": base}
        return Stage(name, "experiments.removal.stages:finetune", settings, inputs, seconds=seconds)

    def _curvature(
        self, name: str, sides: Mapping[str, int], method: str, model: Stage, data: Stage, seed: int, gradient: bool = False
    ) -> Stage:  # fmt: skip
        settings = {
            "sides": dict(sides), "method": method, "max_length": self.config.max_length, "seed": seed, "gradient": gradient,
            **({"end": True} if self.config.facts and "keep" not in sides else {}),
        }  # fmt: skip
        inputs = {"data": data, "model": model}
        seconds = 10 + sum(sides.values()) * self.config.max_length * CURVED
        return Stage(name, "experiments.removal.curves:curvature", settings, inputs, seconds=seconds)

    def _path(self, name: str, label: str, way: Way, seed: int, given: Mapping[str, Any]) -> Stage:
        config = self.config
        measure = {"scorer": config.scorer, "tokens": config.tokens, "top_p": config.top_p, "seed": seed}
        measure |= {"encoder": config.judge.encoder} if config.judge else {}
        attacked = label in config.relearn
        settings = {
            "way": way.way, "options": [dict(one) for one in way.options], "budgets": list(config.budgets), "looks": config.looks,
            "validation": config.texts.validation if config.texts else 32, "max_length": config.max_length, "seed": seed,
            "end": bool(config.facts), "measure": measure, "after": config.relearning.model_dump() if attacked else {},
        }  # fmt: skip
        texts = config.texts
        tokens = config.max_length * (config.looks * (texts.validation if texts else 32) * 2)
        tokens += config.max_length * len(config.budgets) * 3 * (texts.test if texts else 60)
        prompts = sum(source.limit or 100 for source in texts.prompts.values()) if texts else 0
        seconds = tokens * EVALUATED + len(config.budgets) * prompts * config.tokens * GENERATED
        steps = sum(int(one.get("steps", 0)) * int(one.get("batch_size", 8)) * 2 for one in way.options)
        seconds += (
            (45 if way.way in ("guarded", "ascent") else 10) * len(way.options)
            + steps * config.max_length * TRAINED
            + (150 if attacked else 0)
        )
        return Stage(name, "experiments.removal.curves:path", settings, given, seconds=seconds)
