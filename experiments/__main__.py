"""The command `python -m experiments`: run a config, run the demo, list the configs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

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
            return print_claims(options.configs / "claims.yaml", options.results, options.write)
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
    from experiments import pipeline
    from experiments.records import read_records, write_records

    config = configs.load(path, overrides, quick=options.quick)
    study = configs.study(config.experiment)
    store = options.results / "stages"
    stages = pipeline.in_order(study.stages(config))
    if options.dry_run:
        print(pipeline.plan(stages, store))
        return 0
    outcome = pipeline.run(stages, store, options.workers or config.workers)
    found = [record | {"config": configs.digest(config)} for record in study.records(config, store)]
    if found:
        file = options.results / f"{config.name}.jsonl"
        write_records(file, found)
        print(study.report(read_records(file)))
        print(f"\nRecords: {file}", flush=True)
        if config.wandb and outcome.ran:
            from experiments.tracking import log

            log(config, found)
    if outcome.failed:
        if options.debug:
            print("\n".join(failure["traceback"] for failure in outcome.failed.values()), file=sys.stderr)
        print(f"error: {outcome.message()}", file=sys.stderr)
        return 1 if found else 2
    return 0


def print_claims(path: Path, results: Path, document: Path | None) -> int:
    """Print the claims from records that exist, or write them into a document: then from the committed records alone."""
    from experiments import config as configs
    from experiments.records import write_atomically
    from experiments.studies import claims

    found = claims.read(configs.load(path), None if document else results)
    if document:
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--configs", type=Path, default=CONFIGS, help="folder of configs (default: configs)")
    common.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of stages and records (default: results)"
    )
    common.add_argument(
        "--workers",
        type=_positive,
        help="processes that share the work and the cores (default: what the config says, else 1)",
    )
    common.add_argument(
        "--dry-run", action="store_true", help="list the stages, which are cached, and the minutes left"
    )
    common.add_argument(
        "--quick", action="store_true", help="the config's own small variant, where it has one"
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[common], help="run a config; what is cached is not run again")
    run.add_argument("config", type=Path, help="a YAML file, as configs/sentiment.yaml")
    demo = commands.add_parser(
        "demo", parents=[common], help="run configs/demo.yaml: the paper's core experiment, small"
    )
    for command in (run, demo):
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="changes of the config, as data.test=100"
        )
    claims = commands.add_parser(
        "claims", parents=[common], help="the ten claims, from records that exist; nothing is run"
    )
    claims.add_argument(
        "--write",
        type=Path,
        metavar="README.md",
        help="put the table, from the committed records, between its markers",
    )
    commands.add_parser(
        "list", parents=[common], help="list the configs with their cost and expected numbers"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
