"""Search of a merge's options by Optuna, on the models of a sentiment or vision config; see `experiments.search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from experiments.config import Count, Strict, Study
from experiments.options import check_names, check_rule
from experiments.pipeline import Stage, card, is_done, origin, result
from experiments.records import Record, of_kind
from experiments.studies.cells import EVALUATED, VALIDATED, Cells
from experiments.studies.classifiers import Config as Source
from experiments.studies.classifiers import check_values
from experiments.studies.sources import read_source


class Range(Strict):
    """What is tried for an option: `values`, or numbers from low to high, on a logarithmic scale where `log`."""

    values: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _either(self) -> Range:
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ValueError("give either `values` or both `low` and `high`")
        if not self.values and not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ValueError("`low` must be below `high`, and positive where `log`")
        return self


class Config(Study):
    """Keys of the config: `source` is the config whose models are used; the study is shared by a stage for each of `workers`."""

    experiment: Literal["search"]
    source: Path
    seed: int = Field(default=0, ge=0)
    method: str = "gradient_matching"
    options: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Range] = Field(min_length=1)  # `alpha` is the weight of every task
    sampler: Literal["tpe", "grid"] = "tpe"
    trials: Count = 20

    @property
    def made(self) -> Source:
        """The config whose models are used, checked."""
        return read_source(self.source, (self.seed,), kinds=("sentiment", "vision"))

    @model_validator(mode="after")
    def _known(self) -> Config:
        source = self.made
        check_names(self.method, self.options, self.space)
        check_rule("method", self.method, len(source.data.tasks), lacking=("gram", "factors"))
        tried = {name: own.values or (own.low, own.high) for name, own in self.space.items()}
        check_values(self.method, self.options, tried)
        for name, own in self.space.items():
            if self.sampler == "grid" and not own.values:
                raise ValueError(f"space.{name}: a grid needs `values`")
        return self


def stages(config: Config) -> list[Stage]:
    """A stage per worker; the models they read come with them."""
    made = Cells(config.made)
    data, sources = made.config.data, made.sources(config.seed, made.config.data.tasks)
    settings = config.model_dump(mode="json", include={"method", "options", "space", "sampler", "seed"})
    settings |= {"domains": data.domains, "delta0": made.config.delta0}
    seconds = (
        config.trials * len(data.domains) * data.rows("validation", VALIDATED) / EVALUATED / config.workers
    )

    def stage(name: str, **own: Any) -> Stage:
        return made.stage(f"search/{name}", "search:take_part", settings | own, seconds, **sources)

    shared = stage("")  # what all workers have in common: it names their study
    own = {"study": f"search-{shared.key}", "trials": config.trials}
    return [stage(f"{config.name}/worker{n}", worker=n, **own) for n in range(config.workers)]


def records(config: Config, store: Path) -> list[Record]:
    """What the worker that ended last saw: a record per trial, one of the best."""
    done = [stage for stage in stages(config) if is_done(stage, store)]
    if not done:
        return []
    last = max(done, key=lambda stage: str(card(stage, store)["finished"]))
    found = result(last, store, "search.json")
    common = {"seed": config.seed, "method": config.method}
    trials = [common | {"kind": "trial"} | trial for trial in found["trials"]]
    return [*trials, common | {"kind": "best"} | found["best"] | origin(last, store)]


def report(found: list[Record]) -> str:
    """The five best trials, and the best on test examples."""
    from experiments.report import format_table

    trials = sorted(of_kind(found, "trial"), key=lambda trial: float(trial["nll"]))
    names = list(trials[0]["params"])
    rows = [
        [str(t["number"]), *(f"{t['params'][name]:.4g}" for name in names), f"{t['nll']:.4f}"]
        for t in trials[:5]
    ]
    best = of_kind(found, "best")[0]
    macro = best["test"]["macro"]
    table = format_table(["trial", *names, "validation NLL"], rows)
    return (
        f"The best of {len(trials)} trials of {best['method']}:\n\n{table}\n\n"
        f"The best on test examples: accuracy {100 * macro['accuracy']:.1f} %, NLL {macro['nll']:.4f} (macro)."
    )
