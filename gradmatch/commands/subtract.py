"""`gradmatch subtract`: remove what one or several tasks taught, and add others in the same call."""

from __future__ import annotations

import argparse
from typing import Any

from gradmatch.commands.merge import add_model_arguments, make_plan, overrides, print_plan
from gradmatch.commands.options import add_options
from gradmatch.commands.reading import add_reading, check_reading, read_source
from gradmatch.commands.sources import add_guard, parse_task
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import RULES, removals
from gradmatch.subtraction import both_signs, check_steps, scaled, task_of, tasks_of

EXAMPLES = """
examples:
  gradmatch subtract --base model --task toxic,curvature=toxic.safetensors --base-curvature clean.safetensors -o clean/
  gradmatch subtract --base model --task toxic,weight=0.3 --method negation -o clean/
  gradmatch subtract --base model --task toxic --base-curvature clean.safetensors --method guarded --damping 0.1 -o clean/
  gradmatch subtract --base model --gradient toxic.safetensors --base-curvature clean.safetensors --method ascent -o clean/
  gradmatch subtract --base model --remove toxic.txt --steps 2 --weight 40 --base-curvature clean.safetensors --method ascent -o clean/
  gradmatch subtract --base model --task toxic --add cook,curvature=cook.safetensors --base-curvature clean.safetensors --method guarded -o clean/
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
    parser.add_argument(
        "--remove",
        metavar="FILE",
        help="ascent, in place of --gradient: examples of what is to go; their gradient is taken",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1,
        help="ascent with --remove: 1 to 3, the gradient anew at each (default 1)",
    )
    parser.add_argument(
        "--add", action="append", default=[], metavar="MODEL,curvature=FILE[,weight=W]",
        help="guarded: a task that is added in the same call; repeatable",
    )  # fmt: skip
    add_reading(parser, examples=32, max_length=256)
    parser.add_argument("--weight", type=float, default=1.0, help="alpha, for all tasks (default 1)")
    add_guard(parser)
    add_options(parser, [RULES[name] for name in removals()])


def run(args: argparse.Namespace) -> int:
    """Subtract, or print the plan."""
    arguments = overrides(args, ("keep", "guard", "weight"))
    arguments["gradient"] = gradient = gradient_of(args)
    arguments["add"] = added = [parse_task(task) for task in args.add]
    arguments.pop("steps", None)
    if "base" not in arguments or ("tasks" not in arguments and gradient is None):
        raise GradmatchError(
            "nothing to subtract: give --base and at least one --task (see gradmatch subtract --help)",
            "bad_arguments",
        )
    arguments["task"] = arguments.pop("tasks", None)
    if args.dry_run:
        own = {"keep": args.keep, "guard": args.guard} if RULES[args.method].guarded else {}
        arguments.pop("add")
        gradient, task = arguments.pop("gradient"), arguments.pop("task")
        if callable(gradient):  # what it needs of the models is what an ascent needs of the base
            gradient, method, given = None, "negation", arguments["base"]
        else:
            method, given = args.method, task_of(arguments["base"], task, gradient, args.method)
        arguments["tasks"] = [scaled(one, args.weight) for one in tasks_of(given)]
        if added:
            arguments["tasks"], method = both_signs(arguments["tasks"], added, args.method), "signed"
        args.result = print_plan(make_plan({**arguments, **own, "method": method}), args.out, args.overwrite)
        return 0
    if not args.out:
        raise GradmatchError(
            "no output folder: name it with --out (or look first, with --dry-run)", "bad_arguments"
        )
    from gradmatch.subtraction import subtract

    result = subtract(
        **arguments, method=args.method, weight=args.weight, steps=args.steps, keep=args.keep, guard=args.guard,
        out=args.out, overwrite=args.overwrite, progress=not args.quiet,
    )  # fmt: skip
    print(result.report.summary())
    print(f"written: {args.out}")
    args.result = {"out": args.out, "report": result.report.to_dict()}
    return 0


def gradient_of(args: argparse.Namespace) -> Any:
    """The gradient on what is to go: a file, or a function that takes it on data at any weights; None where neither is given.

    Raises:
        ValueError: both, data with another method than ascent, or steps that nothing can take.
    """
    if args.remove is None:
        check_steps(args.steps, args.gradient, args.method)
        return args.gradient
    if args.gradient is not None or args.method != "ascent":
        raise GradmatchError(
            "--remove gives ascent its gradient: "
            + ("leave --gradient out" if args.gradient else "add --method ascent"),
            "bad_arguments",
            "--remove",
        )
    from gradmatch.measure.objective import Objective
    from gradmatch.measure.opening import module_of
    from gradmatch.measure.tables import check_source
    from gradmatch.models.opening import open_checkpoint

    check_reading(args)
    check_source(args.remove)
    base = open_checkpoint(args.base)
    rows = read_source(args, args.remove, args.base, "remove", by_length=True, needs_labels=True)
    gradient = Objective(module_of(base, base), rows).gradient
    check_steps(args.steps, gradient, args.method)
    return gradient
