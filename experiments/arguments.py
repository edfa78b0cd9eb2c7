"""The arguments of `python -m experiments`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("results")
CONFIGS = Path("configs")
DESCRIPTION = "Run a config, repeat a study from its records, show and compare what was found."


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _option(*names: str, **settings: Any) -> argparse.ArgumentParser:
    """An option that several commands share."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*names, **settings)
    return parent


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand after options too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    late = [word for word in rest if word.startswith("~") or ("=" in word and not word.startswith("-"))]
    if len(late) < len(rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return options


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
        "--dry-run",
        action="store_true",
        help="read the data, list the stages, which are cached, and the minutes left",
    )
    quick = _option("--quick", action="store_true", help="the config's own small variant, where it has one")
    debug = _option("--debug", action="store_true", help="show tracebacks")
    yes = _option("--yes", action="store_true", help="run what is planned to take more than eight hours")
    running = [results, workers, dry, quick, debug, yes]
    parser = argparse.ArgumentParser(prog="python -m experiments", description=DESCRIPTION)
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
    again = commands.add_parser(
        "rerun", parents=[workers, dry, debug], help="repeat a study from its records alone, and compare"
    )
    again.add_argument("--stage", help="repeat one stage, as texts/seed0/merge-gm, and compare its files")
    again.add_argument(
        "--results", type=Path, default=RESULTS / "rerun", help="folder for it (default: results/rerun)"
    )
    show = commands.add_parser("show", parents=[debug], help="print the report of records")
    for command in (again, show):
        command.add_argument("records", type=Path, help="a file of records, as results/demo.jsonl")
    frame = commands.add_parser("frame", parents=[debug], help="records as a tidy table: a row a figure")
    frame.add_argument("records", type=Path, nargs="+", help="files of records, or folders of them")
    frame.add_argument("--out", type=Path, help="a .csv or .parquet file (default: csv on stdout)")
    diff = commands.add_parser("diff", parents=[debug], help="where two files of records differ")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    prune = commands.add_parser(
        "prune", parents=[results, debug], help="remove stages that no record names any more"
    )
    prune.add_argument(
        "--weights", action="store_true", help="also models and curvatures: made again where they are needed"
    )
    prune.add_argument("--dry-run", action="store_true", help="tell what would go, and how large it is")
    keys = commands.add_parser("keys", parents=[debug], help="every key of every config, with its meaning")
    keys.add_argument("--json", action="store_true", help="as a JSON Schema, for editors")
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
