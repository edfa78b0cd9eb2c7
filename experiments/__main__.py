"""The command `python -m experiments`: run a config, repeat a study from its records, show and compare what was found."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.arguments import parsed

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a process forks after tokenising
# Threads that wait for one another sleep instead of spinning: five times faster where other programs want the cores too,
# as fast where they do not. Read when torch is loaded, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


ASKS_FROM = 480  # minutes of a plan that are not run unasked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 some stages failed or figures differ, 2 nothing could be run."""
    options = parsed(arguments)
    try:
        return int(_COMMANDS[options.command](options))
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept, run again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from experiments import config as configs

    path = options.configs / "demo.yaml" if options.command == "demo" else options.config
    config = configs.load(path, options.overrides, quick=options.quick)
    return run_config(config, configs.made_of(path, options.overrides, quick=options.quick), options)


def run_config(config: Any, made: dict[str, Any], options: argparse.Namespace) -> int:
    """Run what a config needs, write its records, print its report."""
    from experiments import config as configs
    from experiments import pipeline, running
    from experiments.records import read_records, write_records
    from experiments.rerun import study_record

    study = configs.study(config.experiment)
    store = _folder(options.results) / "stages"
    targets = study.stages(config)
    stages = pipeline.in_order(targets)
    told = study.preview(config, store, reads=options.dry_run) if hasattr(study, "preview") else ""
    if options.dry_run:
        print("\n\n".join(part for part in (told, pipeline.plan(stages, store)) if part))
        return 0
    left = pipeline.in_order(targets, store)
    minutes = sum(stage.seconds for stage in left) / 60
    if minutes > ASKS_FROM and not options.yes:
        raise ValueError(
            f"this is planned to take {minutes:.0f} minutes (--dry-run lists the stages): say --yes to run it, or ask for less"
        )
    if told and left:
        print(told, file=sys.stderr, flush=True)
    outcome = running.run(targets, store, options.workers or config.workers)
    found = configs.records(config, store)
    if found:
        about = study_record(config, made, stages, targets)
        about |= {"experiment": config.experiment, "name": config.name, "config": configs.digest(config)}
        file = _records_file(options.results / f"{config.name}.jsonl", about)
        write_records(file, [about, *found])
        print(study.report(read_records(file)))
        print(f"\nRecords: {file}", flush=True)
        if config.wandb:
            from experiments.tracking import log

            print(f"wandb: {log(config, found)} runs in the group {config.name}", flush=True)
    if outcome.failed:
        if options.debug:
            print("\n".join(failure["traceback"] for failure in outcome.failed.values()), file=sys.stderr)
        print(f"error: {outcome.message()}", file=sys.stderr)
        return 1 if found else 2
    return 0


def _records_file(file: Path, about: dict[str, Any]) -> Path:
    """Where the records of a run go: beside those of the same config on other data, not in their place."""
    from experiments.records import of_kind, read_records

    if not file.is_file():
        return file
    before = of_kind(read_records(file), "study")
    if not before or before[0]["content"] != about["content"] or before[0]["data"] == about["data"]:
        return file
    mark = hashlib.sha256(json.dumps(about["data"], sort_keys=True).encode()).hexdigest()[:8]
    print(
        f"the data have changed since {file} was written, which stays: these records have a name of their own",
        file=sys.stderr,
    )
    return file.with_name(f"{file.stem}-data{mark}.jsonl")


def _rerun(options: argparse.Namespace) -> int:
    """Repeat a study, or one stage of it, and say whether the figures, or the bytes, agree."""
    from experiments import config as configs
    from experiments import pipeline, rerun, running
    from experiments.records import read_records

    was = read_records(options.records)
    study = rerun.of_study(was, options.records)
    changed = rerun.changes(study)
    print(
        "\n".join(
            ["since then:", *map("  {}".format, changed)]
            if changed
            else ["code, libraries and data are as they were"]
        )
    )
    if options.stage:
        told, same = rerun.run_stage(study, options.stage, _folder(options.records.parent) / "stages")
        print(told)
        return 0 if same else 1
    config = configs.from_record(study)
    store = _folder(options.results) / "stages"
    targets = configs.study(config.experiment).stages(config)
    if options.dry_run:
        print(pipeline.plan(pipeline.in_order(targets), store))
        return 0
    outcome = running.run(targets, store, options.workers or config.workers)
    found = rerun.compare(was, json.loads(json.dumps(configs.records(config, store))))
    print(found)
    if outcome.failed:
        print(f"error: {outcome.message()}", file=sys.stderr)
    return 1 if outcome.failed or found.differing else 0


def _show(options: argparse.Namespace) -> int:
    """Print what a run printed, from its records."""
    from experiments import config as configs
    from experiments.records import read_records

    found = read_records(options.records)
    experiment = next((record["experiment"] for record in found if "experiment" in record), None)
    if experiment not in configs.EXPERIMENTS:
        raise ValueError(f"{options.records} holds no records of an experiment")
    print(configs.study(experiment).report(found))
    return 0


def _frame(options: argparse.Namespace) -> int:
    """Records as a tidy table, a row a figure."""
    from experiments.keeping import frame

    files = [
        file
        for path in options.records
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    if not files:
        raise FileNotFoundError(f"no records in {', '.join(map(str, options.records))}")
    table = frame(files)
    if options.out and options.out.suffix == ".parquet":
        table.to_parquet(options.out)
    else:
        table.to_csv(options.out or sys.stdout, index=False)
    return 0


def _diff(options: argparse.Namespace) -> int:
    """Where two studies differ: what they were told, ran with, found."""
    from experiments.records import read_records
    from experiments.rerun import diff

    a, b = (read_records(path) for path in (options.a, options.b))
    print(diff(a, b, (options.a.stem, options.b.stem)))
    return 0


def _prune(options: argparse.Namespace) -> int:
    """Remove stages that no record names, and with --weights models and curvatures whose figures are there."""
    from experiments.keeping import prune

    print(prune(_folder(options.results), weights=options.weights, dry_run=options.dry_run))
    return 0


def _keys(options: argparse.Namespace) -> int:
    """Every key of every config: as a page, or as a JSON Schema for editors."""
    from experiments import schema

    print(schema.json_schema() if options.json else schema.page(), end="")
    return 0


def _list(options: argparse.Namespace) -> int:
    print(list_configs(options.configs))
    return 0


def _claims(options: argparse.Namespace) -> int:
    return print_claims(options.configs / "claims.yaml", options)


_COMMANDS = {
    "run": _run, "demo": _run, "rerun": _rerun, "show": _show, "frame": _frame, "diff": _diff, "prune": _prune,
    "keys": _keys, "list": _list, "claims": _claims,
}  # fmt: skip


def print_claims(path: Path, options: argparse.Namespace) -> int:
    """Print the claims from records that exist, or write them to a file: then from the committed records alone."""
    from experiments import config as configs
    from experiments.records import write_records
    from experiments.studies import claims
    from gradmatch.estimators.files import write_atomically

    document: Path | None = options.write
    if document and options.quick:
        raise ValueError(
            "--write takes the committed records, which are of no quick variant: leave --quick out"
        )
    config = configs.load(path, quick=options.quick)
    found = claims.read(config, None if document else _folder(options.results))
    if document and document.suffix == ".jsonl":
        write_records(document, found)
    elif document:
        write_atomically(document, claims.rewritten(document.read_text(encoding="utf-8"), found))
    print(claims.report(found))
    return 0


def list_configs(folder: Path) -> str:
    """Every config with its first comment: command, hardware, minutes, expected numbers."""
    lines = []
    for path in sorted(folder.glob("*.yaml")):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        lines.append(f"{shlex.quote(str(path))}\n    " + "\n    ".join(comment or ["(no comment)"]))
    if not lines:
        raise FileNotFoundError(f"no configs in {folder.resolve()}: run this at the top of the repository")
    return "\n".join(lines)


def _folder(results: Path) -> Path:
    if results.exists() and not results.is_dir():
        raise ValueError(
            f"--results {results} is a file; it takes a folder, which is made where there is none"
        )
    return results


if __name__ == "__main__":
    sys.exit(main())
