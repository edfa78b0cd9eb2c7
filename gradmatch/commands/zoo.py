"""`gradmatch zoo`: which of many models to merge; each verb is a command of its own."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLES = """
examples:
  gradmatch zoo inspect models/ --base base             a card a model, and how alike they are
  gradmatch zoo cluster models/ --threshold 0.95        what can be merged with what, and why the others cannot
"""
VERBS = {
    "inspect": "one card a model, and a matrix of similarities",
    "cluster": "families that can be merged; every model is in exactly one",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch zoo`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    made = {}
    for name, text in VERBS.items():
        made[name] = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made[name].add_argument("--json", action="store_true", help="print JSON instead of text")
        made[name].add_argument("--quiet", action="store_true", help="no progress bar")
    for name in ("inspect", "cluster"):
        add_looking(made[name])
    made["cluster"].add_argument(
        "--threshold", type=float, default=0.95, help="least mean similarity within a family (default 0.95)"
    )


def add_looking(parser: argparse.ArgumentParser) -> None:
    """Which models, and how they are compared."""
    parser.add_argument("models", nargs="*", metavar="FOLDER", help="models, and folders with models in them")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="MODEL[,curvature=FILE][,name=NAME]",
        help="a model with its curvature; repeatable",
    )
    parser.add_argument("--base", help="the model that they were fine-tuned from: folder, file or hub id")
    parser.add_argument(
        "--by",
        choices=("weights", "task_vectors", "mismatch", "gradients"),
        default="weights",
        help="how models are compared (default: weights); mismatch and gradients need curvature files",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt files (weights_only)")


def run(args: argparse.Namespace) -> int:
    """Do what the verb says, and print it."""
    return _RUN[args.verb](args)


def models_of(args: argparse.Namespace) -> list[Any]:
    """The models that a command names.

    Raises:
        GradmatchError: none.
    """
    from gradmatch.commands.sources import parse_task
    from gradmatch.estimators.errors import GradmatchError

    given = [*args.models, *(parse_task(text) for text in args.task)]
    if not given:
        raise GradmatchError("no models: name folders, or give --task MODEL", "bad_arguments")
    return given


def _inspect(args: argparse.Namespace) -> int:
    from gradmatch.zoo import inspect

    found = inspect(
        models_of(args), args.base, by=args.by, allow_pickle=args.allow_pickle, progress=not args.quiet
    )
    return _print(args, found)


def _cluster(args: argparse.Namespace) -> int:
    from gradmatch.zoo import cluster

    found = cluster(
        models_of(args),
        args.threshold,
        args.by,
        base=args.base,
        allow_pickle=args.allow_pickle,
        progress=not args.quiet,
    )
    return _print(args, found)


def _print(args: argparse.Namespace, found: Any) -> int:
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.summary())
    return 0


_RUN = {"inspect": _inspect, "cluster": _cluster}
