"""`gradmatch evaluate`: models before and after a merge, on data of each task."""

from __future__ import annotations

import argparse
from typing import Any

from gradmatch.commands.reading import add_reading, check_reading, read_source
from gradmatch.commands.sources import parse_data
from gradmatch.estimators.errors import GradmatchError

EXAMPLES = """
examples:
  gradmatch evaluate base amazon nyt merged --data amazon=amazon.csv --data nyt=nyt.csv
  gradmatch evaluate base merged --data cook=cook.txt --examples 200 --json

The first model is what the others are compared with, on the same examples. Where a merge's weights were chosen by forecast, what
was forecast stands beside. The folders load in lm-evaluation-harness as they are: lm_eval --model hf --model_args pretrained=merged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch evaluate`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders, hub ids or adapters; the first is the one to compare with",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="examples with true labels, one per task",
    )
    add_reading(parser, examples=256)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples (default 0)")
    parser.add_argument("--quiet", action="store_true", help="the table, warnings and errors alone")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if not args.data:
        raise GradmatchError("nothing to evaluate on: give --data TASK=FILE, once a task", "bad_arguments")
    check_reading(args)
    files = parse_data(args.data, [text.partition("=")[0] for text in args.data])
    if len(files) < len(args.data):
        raise GradmatchError("--data names a task twice", "bad_arguments", "--data")
    from gradmatch.measure.evaluating import evaluate

    def read(source: Any, model: Any, task: str) -> Any:
        return read_source(args, source, str(model), task, needs_labels=True)

    found = evaluate(args.models, files, read=read, progress=not args.quiet)
    print(found.summary())
    args.result = found.to_dict()
    return 0
