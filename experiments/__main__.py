"""The command `python -m experiments`: run a config, run the demo, list the configs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a process forks after tokenising
# Threads that wait for one another sleep instead of spinning: five times faster where other programs want the cores too,
# as fast where they do not. Read when torch is loaded, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RESULTS = Path("results")
CONFIGS = Path("configs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 some stages failed, 2 nothing could be run."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            print(list_configs(options.configs))
            return 0
        if options.command == "claims":
            return print_claims(options.configs / "claims.yaml", options)
        path = options.configs / "demo.yaml" if options.command == "demo" else options.config
        return run_config(path, options.overrides, options)
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept, run again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_config(path: Path, overrides: Sequence[str], options: argparse.Namespace) -> int:
    """Run what a config needs, write its records, print its report."""
    from experiments import config as configs
    from experiments import pipeline, running
    from experiments.records import read_records, write_records

    config = configs.load(path, overrides, quick=options.quick)
    study = configs.study(config.experiment)
    store = _folder(options.results) / "stages"
    stages = pipeline.in_order(study.stages(config))
    if options.dry_run:
        print(pipeline.plan(stages, store))
        return 0
    outcome = running.run(stages, store, options.workers or config.workers)
    found = configs.records(config, store)
    if found:
        file = options.results / f"{config.name}.jsonl"
        write_records(file, found)
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


def print_claims(path: Path, options: argparse.Namespace) -> int:
    """Print the claims from records that exist, or write them to a file: then from the committed records alone."""
    from experiments import config as configs
    from experiments.records import write_atomically, write_records
    from experiments.studies import claims

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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _option(*names: str, **settings: Any) -> argparse.ArgumentParser:
    """An option that several commands share."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*names, **settings)
    return parent


def _parser() -> argparse.ArgumentParser:
    configs = _option("--configs", type=Path, default=CONFIGS, help="folder of configs (default: configs)")
    results = _option(
        "--results", type=Path, default=RESULTS, help="folder of stages and records (default: results)"
    )
    workers = _option(
        "--workers",
        type=_positive,
        help="processes that share the work and the cores (default: what the config says, else 1)",
    )
    dry = _option(
        "--dry-run", action="store_true", help="list the stages, which are cached, and the minutes left"
    )
    quick = _option("--quick", action="store_true", help="the config's own small variant, where it has one")
    debug = _option("--debug", action="store_true", help="show tracebacks")
    running = [results, workers, dry, quick, debug]
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=running, help="run a config; what is cached is not run again")
    run.add_argument("config", type=Path, help="a YAML file, as configs/sentiment.yaml")
    demo = commands.add_parser(
        "demo", parents=[configs, *running], help="run configs/demo.yaml: the paper's core experiment, small"
    )
    for command in (run, demo):
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="changes of the config, as data.test=100; ~key leaves a key out, as ~data.corpora",
        )
    claims = commands.add_parser(
        "claims",
        parents=[configs, results, quick, debug],
        help="the ten claims, from records that exist; nothing is run",
    )
    claims.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="from the committed records: a document, whose markers then hold the table, or records (.jsonl)",
    )
    commands.add_parser(
        "list", parents=[configs, debug], help="list the configs with their cost and expected numbers"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
