"""`gradmatch merge`: by a recipe (ours or mergekit's), or by flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.commands.options import add_options, given_options
from gradmatch.commands.sources import (
    add_data,
    add_models,
    in_one_order,
    number_or_text,
    parse_task,
    read_data,
)
from gradmatch.estimators.errors import GradmatchError
from gradmatch.plan.request import POLICIES
from gradmatch.rules import RULES
from gradmatch.rules.after import AFTER

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan

EXAMPLES = """
examples:
  gradmatch merge recipe.yaml merged/
  gradmatch merge recipe.yaml merged/ --dry-run         the complete check and the plan, nothing written
  gradmatch merge --base base --task a,curvature=a.safetensors --task b,curvature=b.safetensors \\
      --base-curvature base.safetensors -o merged/
  gradmatch merge --base base --task a,weight=0.5 --task b,weight=0.5 --method ties --density 0.2 -o merged/
  gradmatch merge recipe.yaml merged/ --weights auto --data a=a.jsonl --data b=b.jsonl      weights chosen by forecast
  gradmatch merge recipe.yaml merged/ --posterior       and its curvature beside it, for the next merge or unmerge
  gradmatch merge mergekit.yml merged/                  a file with merge_method: is understood as mergekit's
"""


MEANINGS = {  # of the policies, for --help
    "space": "what is merged: weights, or (core) the factors of LoRA adapters, which gives an adapter again",
    "missing": "tensors that a task lacks or has beyond the base: refuse, or go by the base",
    "missing_curvature": "parameters without curvature: refuse, or take it as flat",
    "heads": "heads that differ: refuse, the base's, or the base's with each task's saved beside",
    "embeddings": "vocabularies that differ: refuse, the common tokens, or all of them",
    "batchnorm": "BatchNorm statistics that differ: refuse, the base's, their mean, or measured anew",
    "precision": "of the arithmetic; auto: float32, float64 where an input is",
    "rounding": "to the output's dtype",
    "verify": "of the written folder: its files, or also a reload by transformers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch merge`."""
    parser.add_argument("recipe", nargs="?", help="YAML recipe, ours or mergekit's; flags below override it")
    parser.add_argument("out_folder", nargs="?", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--method", help=f"one of {', '.join(RULES)} (default: gradient_matching), or package.module:RULE"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--transform",
        action="append",
        default=[],
        metavar="NAME",
        help="edit of the task vectors before the method; repeatable",
    )
    parser.add_argument(
        "--after",
        action="append",
        metavar="NAME",
        help=f"edit of the merged update behind the method ({', '.join(AFTER)}); repeatable",
    )
    parser.add_argument(
        "--weights", choices=("auto",), help="auto: chosen by forecast, from --data or --products"
    )
    parser.add_argument(
        "--align",
        metavar="METHOD",
        help="bring tasks of another beginning into the base's order of units first: weights, ...",
    )
    parser.add_argument(
        "--anchor", metavar="MODEL", help="anchored: another merge of the base, to hold on to"
    )
    parser.add_argument(
        "--posterior",
        action="store_true",
        help="write posterior.safetensors, the merge's own curvature, beside the weights",
    )
    add_data(parser)
    add_options(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What merge and subtract share."""
    parser.add_argument("-o", "--out", help="folder to write")
    add_models(parser)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the method, as its flag below or one of your own rule; repeatable",
    )
    parser.add_argument("--dtype", help="of the output: float32, bfloat16, ... (default: the base's)")
    parser.add_argument("--rank", type=int, help="of an adapter merged with --space core, at the most")
    for policy, choices in POLICIES.items():
        parser.add_argument(
            f"--{policy.replace('_', '-')}",
            choices=choices,
            default=None,
            help=f"{MEANINGS[policy]} (default: {choices[0]})",
        )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="whose tokenizer the output has: base, or a task's (rows follow by token)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="TEXT",
        help="of the output: auto (that of most models), chatml, or the template",
    )
    parser.add_argument("--seed", type=int, help="of random transforms and stochastic rounding (default 0)")
    parser.add_argument("--device", help="where the arithmetic runs: cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--shard-bytes", type=int, help="largest size of an output file (default 5e9)")
    parser.add_argument(
        "--allow-mismatch", action="store_true", default=None, help="accept curvatures of other weights"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", default=None, help="read .bin and .pt files (weights_only)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan; write nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Merge, or print the plan."""
    from gradmatch.recipes.recipe import load_recipe

    recipe, out = args.recipe, args.out or args.out_folder
    if recipe and args.base and not args.out_folder and not args.out:
        recipe, out = None, recipe  # `gradmatch merge OUT --base ...`
    arguments = load_recipe(recipe) if recipe else {}
    arguments |= overrides(args)
    if args.method:
        arguments["method"] = args.method
    if args.transform:
        arguments["transforms"] = args.transform
    arguments |= {
        name: getattr(args, name) for name in ("weights", "products", "align") if getattr(args, name)
    }
    if "base" not in arguments or not arguments.get("tasks"):
        raise GradmatchError(
            "nothing to merge: give a recipe, or --base and at least one --task (see gradmatch merge --help)",
            "bad_arguments",
        )
    if args.dry_run:
        if arguments.get("weights"):
            from gradmatch.choosing.choose import check_choice

            check_choice(
                data=args.data or None, **{"products": None, "method": "gradient_matching", **arguments}
            )
        args.result = print_plan(make_plan(arguments), out, args.overwrite)
        if arguments.get("weights"):
            print("weights are chosen when merging; this plan shows 1")
        return 0
    if not out:
        raise GradmatchError(
            "no output folder: name it after the recipe or with --out (or look first, with --dry-run)",
            "bad_arguments",
        )
    from gradmatch.api import merge

    if args.data:
        arguments = {**arguments, "data": read_data(args, arguments)}
    result = merge(
        **arguments, out=out, overwrite=args.overwrite, progress=not args.quiet, posterior=args.posterior
    )
    print(result.report.summary())
    print(f"written: {out}")
    args.result = {"out": str(out), "report": result.report.to_dict()}
    return 0


def overrides(args: argparse.Namespace, also: Sequence[str] = ()) -> dict[str, Any]:
    """The flags that were given, as arguments of `merge`; `also` are flags that no --option may set."""
    from gradmatch.recipes.recipe import SETTINGS, options_alone

    given: dict[str, Any] = {}
    for name in ("base", "anchor", "allow_mismatch", "allow_pickle", *SETTINGS):
        if name != "method" and getattr(args, name, None) is not None:
            given[name] = getattr(args, name)
    if args.base_curvature is not None:
        given["base_curvature"] = number_or_text(args.base_curvature)
    if args.task:
        given["tasks"] = [parse_task(text) for text in args.task]
    return {**given, **options_alone(given_options(args), also)}


def make_plan(arguments: dict[str, Any]) -> Plan:
    """Everything that `merge` checks before it reads a value."""
    from gradmatch.merging import prepare

    given = {name: value for name, value in arguments.items() if name not in ("weights", "products")}
    return prepare(**in_one_order(given))


def print_plan(made: Plan, out: str | None, overwrite: bool) -> dict[str, Any]:
    """The plan, tensor by tensor, with totals, also as values; an output that would be refused is refused here."""
    from gradmatch.output.writer import check_output
    from gradmatch.plan.printed import describe, peak_bytes

    if out is not None:
        check_output(out, made, overwrite)

    for line in describe(made, out):
        print(line)
    return {"plan": {**made.to_dict(), "peak_bytes": peak_bytes(made)}}
