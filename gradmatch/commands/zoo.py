"""`gradmatch zoo`: which of many models to merge; each verb is a command of its own."""

from __future__ import annotations

import argparse
import sys

from gradmatch.commands.everywhere import add_everywhere
from gradmatch.commands.zoo_searching import (
    add_evolving,
    add_models,
    add_selecting,
    evolve,
    models_of,
    say,
    select,
)

EXAMPLES = """
examples:
  gradmatch zoo inspect models/ --base base             a card a model, and how alike they are
  gradmatch zoo cluster models/ --threshold 0.95        what can be merged with what, and why the others cannot
  gradmatch zoo select models/ --base base --data nyt.csv --strategy coefficient --log search.jsonl -o merged/
  gradmatch zoo select models/ --base base --tasks arc_easy,metric=acc_norm,none --limit 200 --budget 20 -o merged/
  gradmatch zoo evolve models/ --base base --data nyt.csv --groups 2 --trials 100 --storage search.journal -o merged/
  gradmatch zoo evolve --config evolve.yml --trials 100 --storage search.db -o merged/      mergekit-evolve's, as it is
  gradmatch zoo plan ZOO.yaml -o PLAN.yaml && gradmatch zoo run PLAN.yaml merged/
  gradmatch zoo evolve models/ --base base --data a.csv --data b.csv --sampler nsga2 --figure front.svg
"""
SIDE_BY_SIDE = {
    "level": "model",
    "routing": "sample",
    "router": "spectral",
}  # what --mixture writes into a plan
VERBS = {
    "inspect": "one card a model, and a matrix of similarities",
    "cluster": "families that can be merged; every model is in exactly one",
    "select": "choose models and weights greedily, by the score of their merges",
    "plan": "decide what to merge without an evaluation: ZOO.yaml -> PLAN.yaml, with the price of running it",
    "run": "evaluate within a plan's budget, and merge: PLAN.yaml -> OUT",
    "evolve": "search weights and options by CMA-ES or NSGA-II; the same command again, anywhere, is one more worker",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch zoo`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    made = {}
    for name, text in VERBS.items():
        made[name] = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    for name in ("inspect", "cluster"):
        add_looking(made[name])
    add_selecting(made["select"])
    add_evolving(made["evolve"])
    made["plan"].add_argument("zoo", metavar="ZOO.yaml", help="models, base, score, budget, methods")
    made["plan"].add_argument(
        "-o", "--out", metavar="PLAN.yaml", help="where the plan is written (default: it is printed)"
    )
    made["plan"].add_argument(
        "--dry-run", action="store_true", help="look at headers alone: layers, vocabularies, the price"
    )
    made["plan"].add_argument(
        "--mixture",
        action="store_true",
        help="the families' merges, and models that are alone, side by side with a router (edit `mixture:` in the plan)",
    )
    made["run"].add_argument("plan", metavar="PLAN.yaml", help="what `gradmatch zoo plan` wrote")
    made["run"].add_argument("out", metavar="OUT", help="folder of the merge")
    made["run"].add_argument(
        "--log", metavar="FILE", help="JSON lines; the same file goes on with them (default: OUT.log.jsonl)"
    )
    made["run"].add_argument("--overwrite", action="store_true", help="replace the output folder")
    made["run"].add_argument("--dry-run", action="store_true", help="print the plan and its price")
    for parser_ in made.values():
        add_everywhere(parser_)
    made["cluster"].add_argument(
        "--threshold", type=float, default=0.95, help="least mean similarity within a family (default 0.95)"
    )


def add_looking(parser: argparse.ArgumentParser) -> None:
    """Which models, and how they are compared."""
    add_models(parser)
    parser.add_argument(
        "--by",
        choices=("weights", "task_vectors", "mismatch", "gradients"),
        default="weights",
        help="how models are compared (default: weights); mismatch and gradients need curvature files",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the verb says, and print it."""
    return _RUN[args.verb](args)


def _inspect(args: argparse.Namespace) -> int:
    from gradmatch.zoo import inspect

    found = inspect(
        models_of(args), args.base, by=args.by, allow_pickle=args.allow_pickle, progress=not args.quiet
    )
    return say(args, found)


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
    return say(args, found)


def _plan(args: argparse.Namespace) -> int:
    from gradmatch.estimators.files import write_atomically
    from gradmatch.zoo.planfile import as_yaml, described
    from gradmatch.zoo.planning import plan

    mixture = SIDE_BY_SIDE if args.mixture else None
    made = plan(args.zoo, dry_run=args.dry_run, mixture=mixture, progress=not args.quiet)
    args.result = made.model_dump(mode="json")
    for line in described(made):
        print(line, file=sys.stdout if args.out or args.dry_run else sys.stderr)
    if args.dry_run:
        return 0
    if args.out:
        write_atomically(args.out, as_yaml(made))
        print(f"written: {args.out}")
    else:
        print(as_yaml(made), end="")
    return 0


def _run_plan(args: argparse.Namespace) -> int:
    from gradmatch.recipes.families import run_side_by_side
    from gradmatch.zoo.planfile import PlanFile, described, read_file
    from gradmatch.zoo.planning import run

    made = read_file(args.plan, PlanFile)
    for line in described(made):  # the price, before anything starts
        print(line, file=sys.stderr, flush=True)
    if args.dry_run:
        return 0
    log = args.log or f"{args.out.rstrip('/')}.log.jsonl"
    options = {"log": log, "overwrite": args.overwrite, "progress": not args.quiet}
    mixture = None
    if made.mixture:
        found, mixture = run_side_by_side(made, args.out, **options)
    else:
        found = run(made, args.out, **options)
    args.result = {"out": args.out, "log": log, "families": [one.to_dict() for one in found]}
    for one in found:
        print(one.summary())
    if mixture is not None:
        args.result["mixture"] = mixture.to_dict()
        print(mixture.summary())
    print(f"written: {args.out}")
    return 0


_RUN = {
    "inspect": _inspect,
    "cluster": _cluster,
    "select": select,
    "evolve": evolve,
    "plan": _plan,
    "run": _run_plan,
}
