"""All evidence: the studies that the ten claims are computed from, run as one; see `experiments.claims`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments import claims, verdicts
from experiments import config as configs
from experiments.config import Study
from experiments.pipeline import Stage, in_order, is_done
from experiments.records import Record, of_kind, read_records, write_records

PART = "-claims"  # ends the name of a config of which the claims need a part
COMMITTED = Path(__file__).parents[1] / "results"
SOURCES = {  # what `experiments.claims` asks for -> the experiment that tells it
    "theory": "theory",
    "vision": "vision",
    "alpha": "sentiment",
    "adding": "adding",
    "proof": "removal-proof",
    "toxicity": "removal",
    "guarded": "unlearning",
    "facts": "unlearning",
    "curvature": "curvature",
    "assumption": "assumption",
}


class Config(Study):
    """Keys of the config: `evidence` says which config each part of the claims is computed from.

    parts: overrides for some of them: without what no claim asks for, or smaller and on more seeds; their records are named
    `<config>-claims`.
    small: each of those that has a quick variant is run in it, and `parts` is not needed.
    """

    experiment: Literal["claims"]
    evidence: dict[str, Path] = Field(min_length=1)
    parts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    small: bool = False

    @field_validator("evidence")
    @classmethod
    def _known(cls, evidence: dict[str, Path]) -> dict[str, Path]:
        for name, path in evidence.items():
            if name not in SOURCES:
                raise ValueError(f"no claim asks for {name!r}{configs.nearest(name, SOURCES)}")
            experiment = configs.read(path).get("experiment")
            if experiment != SOURCES[name]:
                raise ValueError(
                    f"{name} is told by a config of {SOURCES[name]}, but {path} is one of {experiment}"
                )
        return evidence

    @model_validator(mode="after")
    def _parts_of_something(self) -> Config:
        for name in self.parts:
            if name not in self.evidence:
                raise ValueError(
                    f"`parts` changes {name!r}, which is no evidence{configs.nearest(name, self.evidence)}"
                )
        return self


def studies(config: Config) -> dict[str, Any]:
    """The checked configs of the evidence, quick where that is asked for and where they have such a variant."""
    found = {}
    for name, path in config.evidence.items():
        if config.small:
            found[name] = configs.load(path, quick="quick" in configs.read(path))
        elif name in config.parts:
            try:
                found[name] = configs.load(path, [*config.parts[name], f"name={path.stem}{PART}"])
            except configs.ConfigError as error:
                raise configs.ConfigError(f"parts.{name}: {error}") from error
        else:
            found[name] = configs.load(path)
    return found


def stages(config: Config) -> list[Stage]:
    """The stages of all the studies, each once."""
    return in_order(
        stage for own in studies(config).values() for stage in configs.study(own.experiment).stages(own)
    )


def records(config: Config, store: Path) -> list[Record]:
    """A record per part of a claim. The studies' own records are written beside, as if each had been run alone.

    A study whose stages are not all done is read from its file in the results, or as it was committed.
    """
    results, evidence, origins = store.parent, {}, {}
    for name, own in studies(config).items():
        study = configs.study(own.experiment)
        made = configs.records(own, store)
        complete = all(is_done(stage, store) for stage in study.stages(own))
        if complete and made:
            write_records(results / f"{own.name}.jsonl", made)
        elif file := find(own.name, results):
            evidence[name], origins[name] = _read(file, results, own, config.evidence[name])
            continue
        evidence[name], origins[name] = made, "this run" if complete else "what has been run of it"
    return as_records(config.name, evidence, origins)


def as_records(name: str, evidence: claims.Evidence, origins: Mapping[str, str]) -> list[Record]:
    """The verdicts, then where the records came from."""
    shared = {"experiment": "claims", "name": name}
    found = [shared | record for record in verdicts.as_records(claims.rows(evidence))]
    return [*found, {**shared, "kind": "origins", "origins": dict(origins)}]


def find(name: str, results: Path | None) -> Path | None:
    """The records of a study: its file in the results, else the committed one; for a part of a config, else that config's."""
    for folder in (results, COMMITTED):
        for known in dict.fromkeys((name, name.removesuffix(PART))):
            if folder and (folder / f"{known}.jsonl").is_file():
                return folder / f"{known}.jsonl"
    return None


def _read(file: Path, results: Path | None, own: Study, path: Path) -> tuple[list[Record], str]:
    """The records of a file, and which one it is in words that are the same on every machine.

    Told, too, where they are neither of the config as it is evidence nor of the whole of it with the same seeds.
    """
    found, whole = read_records(file), configs.load(path)
    carried = {record.get("config") for record in found}
    if carried <= {configs.digest(own)}:
        changed = ""
    elif None in carried:
        changed = " (of no recorded config)"
    elif carried <= {configs.digest(own), configs.digest(whole)}:
        changed = "" if getattr(whole, "seeds", None) == getattr(own, "seeds", None) else " (of other seeds)"
    else:
        changed = " (of a config that has changed since)"
    return found, f"{'results' if file.parent == results else 'experiments/results'}/{file.name}{changed}"


def read(config: Config, results: Path | None) -> list[Record]:
    """The verdicts from files of records alone: nothing is run."""
    evidence, origins = {}, {}
    for name, own in studies(config).items():
        file = find(own.name, results)
        evidence[name], origins[name] = (
            _read(file, results, own, config.evidence[name]) if file else ([], "nothing")
        )
    return as_records(config.name, evidence, origins)


def report(found: list[Record]) -> str:
    """Each part of each claim in two lines, the summary, and where the numbers come from."""
    lines = []
    for row in of_kind(found, "verdict"):
        label, statement, threshold, measured, interval, seeds, verdict = verdicts.cells(row)
        lines.append(f"{label:<14} {verdict:<10} {statement}: {threshold}")
        within = f" ({interval})" if interval else ""
        lines.append(f"{'':<25} measured: {measured}{within}" + (f", {seeds} seeds" if row["seeds"] else ""))
    origins = next(record["origins"] for record in of_kind(found, "origins"))
    read_from = [f"  {name}: {where}" for name, where in origins.items()]
    return "\n".join([*lines, "", verdicts.summary(of_kind(found, "verdict")), "Records:", *read_from])


BEGIN, END = (
    "<!-- claims: `python -m experiments claims --write docs/results.md` -->",
    "<!-- end of claims -->",
)


def block(found: list[Record]) -> str:
    """The table in Markdown between its markers."""
    origins = next(record["origins"] for record in of_kind(found, "origins"))
    return f"{BEGIN}\n\n{verdicts.markdown(of_kind(found, 'verdict'), origins)}\n\n{END}"


def rewritten(text: str, found: list[Record]) -> str:
    """A document with the block between its markers replaced. Raises ValueError where it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no block to write into: it goes between {BEGIN!r} and {END!r}")
    return before + block(found) + after
