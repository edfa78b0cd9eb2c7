"""`gradmatch diagnose`: why a merge failed, or whether it will."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """
examples:
  gradmatch diagnose recipe.yaml                        before merging, from files alone
  gradmatch diagnose recipe.yaml merged/                after merging
  gradmatch diagnose recipe.yaml merged/ --data amazon=amazon.jsonl --data nyt=nyt.jsonl --html why.html

Data files hold a few hundred examples with their true labels: .jsonl, .csv or .tsv with columns text and label, .txt for
language models, or .safetensors with the model's inputs and "labels". The tokenizer is the base's.
"""
SETTINGS = ("method", "base_curvature", "base_weight", "delta0")
# Of a recipe, what concerns the planned merge only; everything else there is an option of the rule.
POLICIES = ("allow_mismatch", "allow_pickle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch diagnose`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_sources(parser)
    parser.add_argument(
        "merged", nargs="?", help="folder or file of the merge (default: it is planned from the recipe)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the diagnosis as JSON (default with data: none)"
    )
    parser.add_argument("--html", metavar="FILE", help="write it as one self-contained page")
    parser.add_argument(
        "--quick", action="store_true", help="no forecast, paths and redundancy: losses and mismatch only"
    )


def add_sources(parser: argparse.ArgumentParser) -> None:
    """What diagnose and forecast share: the models, and data."""
    parser.add_argument("recipe", nargs="?", help="YAML recipe of the merge, ours or mergekit's")
    parser.add_argument("--base", help="the model that the tasks were fine-tuned from")
    parser.add_argument(
        "--task", action="append", default=[], metavar="MODEL[,curvature=FILE][,weight=W][,name=NAME]",
        help="a fine-tuned model; repeatable",
    )  # fmt: skip
    parser.add_argument("--method", help="rule of the merge (default: the recipe's)")
    parser.add_argument("--base-curvature", help="curvature file of the base, or a number")
    parser.add_argument("--base-weight", type=float, help="factor on the base's curvature (default 1)")
    parser.add_argument("--delta0", type=float, help="floor of the curvature (default 1e-6)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="examples with true labels; one per task",
    )
    parser.add_argument("--examples", type=int, default=256, help="examples of each file (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default 16)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of each text (default 256)")
    parser.add_argument("--products", metavar="FILE", help="stored products to forecast from")


def run(args: argparse.Namespace) -> int:
    """Diagnose, print, and write what was asked for."""
    if args.recipe and args.base and not args.merged:
        args.recipe, args.merged = None, args.recipe  # `gradmatch diagnose MERGED --base ...`
    arguments = sources(args)
    from gradmatch.diagnosis import diagnose

    data = read_data(args, arguments)
    settings = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
    base, tasks = arguments.pop("base"), arguments.pop("tasks")
    options = {key: value for key, value in arguments.items() if key not in POLICIES}
    result = diagnose(
        base,
        tasks,
        args.merged,
        data=data,
        products=args.products,
        forecast=not args.quick,
        thorough=not args.quick,
        **settings,
        **options,
    )
    print(result)
    if args.json:
        _write(args.json, json.dumps(result.to_dict(), indent=1) + "\n")
    if args.html:
        _write(args.html, result.to_html())
    return 0


def sources(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's arguments with the flags over them.

    Raises:
        ValueError: no base or no task.
    """
    from gradmatch.commands.merge import parse_task
    from gradmatch.recipe import load_recipe

    arguments: dict[str, Any] = load_recipe(args.recipe) if args.recipe else {}
    for name in ("base", *SETTINGS):
        value = getattr(args, name)
        if value is not None:
            arguments[name] = _number(value) if name == "base_curvature" else value
    if args.task:
        arguments["tasks"] = [parse_task(text) for text in args.task]
    if "base" not in arguments or not arguments.get("tasks"):
        raise ValueError("nothing to look at: give a recipe, or --base and at least one --task")
    return arguments


def read_data(args: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Batches of every --data file, tokenised as the base wants it; None without one."""
    if not args.data:
        return None
    from gradmatch.diagnosis.data import parse_data, read_batches
    from gradmatch.inputs.opened import task_names

    files = parse_data(args.data, task_names(arguments["tasks"]))
    return {
        task: read_batches(
            path,
            str(arguments["base"]),
            examples=args.examples,
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
        for task, path in files.items()
    }


def _write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    print(f"written: {name}", file=sys.stderr)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
