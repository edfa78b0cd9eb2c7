"""`gradmatch diagnose`: why a merge failed, or whether it will."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.commands.sources import SETTINGS, add_sources, in_one_order, read_data, sources
from gradmatch.estimators.files import write_atomically

if TYPE_CHECKING:
    from gradmatch.models.task import Task

EXAMPLES = """
examples:
  gradmatch diagnose recipe.yaml                        before merging, from files alone
  gradmatch diagnose recipe.yaml merged/                after merging
  gradmatch diagnose recipe.yaml merged/ --data amazon=amazon.jsonl --data nyt=nyt.jsonl --html why.html
  gradmatch diagnose recipe.yaml merged/ --data nyt=nyt.jsonl --data base=general.txt       what does the base forget?

Data files hold a few hundred examples with their true labels: .jsonl, .csv or .tsv with columns text and label, .txt for
language models, or .safetensors with the model's inputs and "labels". The tokenizer is the base's.
"""
# Of a recipe, what concerns the planned merge only; everything else there is an option of the rule.
POLICIES = ("allow_mismatch", "allow_pickle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch diagnose`."""
    add_sources(parser)
    parser.add_argument(
        "merged", nargs="?", help="folder or file of the merge (default: it is planned from the recipe)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the diagnosis as JSON; without FILE to stdout",
    )
    parser.add_argument("--html", metavar="FILE", help="write it as one self-contained page")
    parser.add_argument(
        "--quick", action="store_true", help="no forecast, paths and redundancy: losses and mismatch only"
    )
    parser.add_argument("--quiet", action="store_true", help="no word of the cost, no progress bar")


def run(args: argparse.Namespace) -> int:
    """Diagnose, print, and write what was asked for."""
    if args.recipe and args.base and not args.merged:
        args.recipe, args.merged = None, args.recipe  # `gradmatch diagnose MERGED --base ...`
    arguments = sources(args)
    from gradmatch.diagnosis import diagnose

    data = read_data(args, arguments, ("base",))
    arguments = in_one_order(arguments)
    arguments.pop("notes", None)
    settings = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
    base, tasks = arguments.pop("base"), arguments.pop("tasks")
    products = args.products or arguments.pop("products", None)
    if arguments.pop("weights", None):
        own = {task: batches for task, batches in (data or {}).items() if task != "base"}
        tasks, arguments = chosen(args.merged, base, tasks, own or None, products, settings, arguments)
    options = {key: value for key, value in arguments.items() if key not in POLICIES}
    result = diagnose(
        base,
        tasks,
        args.merged,
        data=data,
        products=products,
        forecast=not args.quick,
        thorough=not args.quick,
        progress=not args.quiet,
        **settings,
        **options,
    )
    content = json.dumps(result.to_dict(), indent=1)
    print(result, file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        print(content)
    elif args.json:
        _write(args.json, content + "\n")
    if args.html:
        _write(args.html, result.to_html())
    return 0


def chosen(
    merged: str | None,
    base: Any,
    tasks: list[Task],
    data: Any,
    products: Any,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> tuple[list[Task], dict[str, Any]]:
    """Tasks and options of a recipe with `weights: auto`: those of the merge's card, else chosen again as `merge` would."""
    from gradmatch.choosing.choose import check_choice, choose_weights
    from gradmatch.output.card import CARD
    from gradmatch.plan.opened import task_names

    card = Path(merged) / CARD if merged else None
    found = json.loads(card.read_text(encoding="utf-8")) if card and card.is_file() else {}
    weights = found.get("report", {}).get("forecast", {}).get("weights", {})
    names = task_names(tasks)
    if set(weights) == set(names):
        told = [replace(task, weight=weights[name]) for name, task in zip(names, tasks, strict=True)]
        return told, {**options, **found["recipe"]["options"]}
    settings = {"method": "gradient_matching", **settings}
    given = {"data": None if products else data, "products": products}
    check_choice(weights="auto", tasks=tasks, method=settings["method"], **given)
    choice = choose_weights(base, tasks, **given, **settings)
    return choice.tasks, {**options, **choice.options}


def _write(name: str, text: str) -> None:
    write_atomically(name, text)
    print(f"written: {name}", file=sys.stderr)
