"""`gradmatch subtract`: remove what one or several tasks taught."""

from __future__ import annotations

import argparse

from gradmatch.commands.merge import add_model_arguments, make_plan, overrides, print_plan
from gradmatch.commands.options import add_options
from gradmatch.commands.sources import add_guard
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import RULES, removals
from gradmatch.subtraction import scaled, task_of, tasks_of

EXAMPLES = """
examples:
  gradmatch subtract --base model --task toxic,curvature=toxic.safetensors --base-curvature clean.safetensors -o clean/
  gradmatch subtract --base model --task toxic,weight=0.3 --method negation -o clean/
  gradmatch subtract --base model --task toxic --base-curvature clean.safetensors --method guarded --damping 0.1 -o clean/
  gradmatch subtract --base model --gradient toxic.safetensors --base-curvature clean.safetensors --method ascent -o clean/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch subtract`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--method", choices=removals(), default="removal", help="Eq. 13 (default), or a baseline"
    )
    parser.add_argument(
        "--gradient", metavar="FILE",
        help="ascent, in place of --task: the base's gradient on what is to go (`estimate --gradient`)",
    )  # fmt: skip
    parser.add_argument("--weight", type=float, default=1.0, help="alpha, for all tasks (default 1)")
    add_guard(parser)
    add_options(parser, [RULES[name] for name in removals()])


def run(args: argparse.Namespace) -> int:
    """Subtract, or print the plan."""
    arguments = overrides(args, ("keep", "guard", "weight"))
    arguments["gradient"] = args.gradient
    if "base" not in arguments or ("tasks" not in arguments and not args.gradient):
        raise GradmatchError(
            "nothing to subtract: give --base and at least one --task (see gradmatch subtract --help)",
            "bad_arguments",
        )
    arguments["task"] = arguments.pop("tasks", None)
    if args.dry_run:
        own = {"keep": args.keep, "guard": args.guard} if RULES[args.method].guarded else {}
        given = task_of(arguments["base"], arguments.pop("task"), arguments.pop("gradient"), args.method)
        arguments["tasks"] = [scaled(task, args.weight) for task in tasks_of(given)]
        args.result = print_plan(
            make_plan({**arguments, **own, "method": args.method}), args.out, args.overwrite
        )
        return 0
    if not args.out:
        raise GradmatchError(
            "no output folder: name it with --out (or look first, with --dry-run)", "bad_arguments"
        )
    from gradmatch.subtraction import subtract

    result = subtract(
        **arguments, method=args.method, weight=args.weight, keep=args.keep, guard=args.guard,
        out=args.out, overwrite=args.overwrite, progress=not args.quiet,
    )  # fmt: skip
    print(result.report.summary())
    print(f"written: {args.out}")
    args.result = {"out": args.out, "report": result.report.to_dict()}
    return 0
