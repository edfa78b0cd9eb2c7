"""`gradmatch budget`: what removing will cost before it is removed, the strength within a budget, and every method at the same budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.commands.budget_data import ALPHAS, allowed_nats, check, file_of, objectives, used
from gradmatch.commands.reading import add_reading
from gradmatch.commands.sources import add_guard, number_or_text, parse_task
from gradmatch.common.warning import warn
from gradmatch.estimators.files import write_atomically
from gradmatch.plan.request import POLICIES
from gradmatch.rules import RULES, removals

if TYPE_CHECKING:
    from gradmatch.measure.objective import Objective
    from gradmatch.removal import Choice, Problem

COPIED = ("method", "keep", "guard", "base_weight", "delta0", "missing_curvature", "structure", "gradient")
EXAMPLES = """
examples:
  gradmatch budget --base model --task toxic,curvature=toxic.safetensors --base-curvature clean.safetensors
  gradmatch budget --base model --task toxic --base-curvature clean-kfac.safetensors --method guarded --damping 0.01 0.1 \\
      --retain clean.txt --beside news.txt --remove toxic.txt --nats-per-token 0.05 --compare --prompts prompts.txt -o cleaned/
  gradmatch budget --base model --base-curvature clean-kfac.safetensors --method ascent \\
      --retain clean.txt --remove toxic.txt --nats-per-token 0.05

Data files are those of `gradmatch diagnose`. Without --retain the collateral is forecast from the diagonal curvature,
which ranks alphas but underestimates losses by orders of magnitude; with it, by exact GGN products, and it is measured.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch budget`."""
    parser.add_argument("--base", required=True, help="the model to remove from: folder, file or hub id")
    parser.add_argument(
        "--task", action="append", default=[], metavar="MODEL[,curvature=FILE]",
        help="fine-tuned from it on what is to go (full weights or an adapter); repeatable; ascent needs none",
    )  # fmt: skip
    parser.add_argument(
        "--gradient",
        metavar="FILE",
        help="ascent: the base's gradient on what is to go (default: taken on --remove)",
    )
    parser.add_argument(
        "--base-curvature",
        help="curvature file of the base, on what must stay, or a number; negation needs none",
    )
    parser.add_argument(
        "--method",
        choices=removals(),
        default="removal",
        help="Eq. 13 (default), guarded, ascent, or a baseline",
    )
    parser.add_argument(
        "--damping", type=float, nargs="+", default=[0.1],
        help="guarded, ascent: lambda as a share of the mean of H0's diagonal; of several the one that forgets most (default 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--structure", choices=("diagonal", "kronecker"), help="of the curvature (default: as the files)"
    )
    parser.add_argument(
        "--alphas", type=float, nargs="+", help=f"the path to forecast (default {' '.join(map(str, ALPHAS))})"
    )
    allowed = parser.add_mutually_exclusive_group()
    allowed.add_argument(
        "--nats",
        type=float,
        help="budget: allowed rise of the loss on every file that must stay, nats an example",
    )
    allowed.add_argument(
        "--nats-per-token", type=float, help="the same, nats a token (log of the perplexity's ratio)"
    )
    parser.add_argument(
        "--share", type=float, default=0.01, help="allowed share of clamped weights (default 0.01)"
    )
    add_guard(parser)
    parser.add_argument(
        "--base-weight", type=float, default=1.0, help="factor on the base's curvature (default 1)"
    )
    parser.add_argument("--delta0", type=float, default=1e-6, help="floor of the curvature (default 1e-6)")
    parser.add_argument("--retain", metavar="FILE", help="examples that must stay")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="FILE",
        help="more that must stay, of another domain; repeatable",
    )
    parser.add_argument("--remove", metavar="FILE", help="examples that are to go")
    add_reading(parser, examples=32, max_length=256)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples (default 0)")
    parser.add_argument(
        "--compare", action="store_true", help="every possible method at the same budget, negation first"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts, one a line, continued by the base and by the result"
    )
    parser.add_argument("--show", type=int, default=4, help="how many of them (default 4)")
    parser.add_argument(
        "--missing-curvature",
        choices=POLICIES["missing_curvature"],
        default="error",
        help="parameters without curvature: refuse (default), or take it as flat",
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="accept curvatures of other weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--report", metavar="FILE", help="write path, budget and removal report as JSON")
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", help="write the model within the budget, its cost on its card"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")


def run(args: argparse.Namespace) -> int:
    """Forecast, find the budget's strength, print and write."""
    from gradmatch.removal import AlphaPath, alpha_path, choose, path_table, removal_report, report_table

    check(args)
    climbs = args.method == "ascent" and args.gradient is None
    data: dict[str, Objective] = {}
    if climbs:
        data = objectives(args)
        problem = problem_of(args, gradient_on(data["remove"], args.base))
    else:
        problem = problem_of(args, args.gradient)
        _ = problem.plan  # reading models and data takes seconds: what is wrong with the rest is said before
        data = objectives(args)
    beside = {name: one for name, one in data.items() if name not in ("retain", "remove")}
    problem = dataclasses.replace(
        problem, retain=data.get("retain"), remove=data.get("remove"), beside=beside
    )
    points = AlphaPath(problem, progress=not args.quiet)
    alphas = args.alphas or (
        [] if args.method == "ascent" else ALPHAS
    )  # of an ascent they have no natural scale
    content: dict[str, Any] = {"path": []}
    if alphas:
        path = alpha_path(points, alphas)
        print(path_table(path))
        content["path"] = [dataclasses.asdict(point) for point in path]
    if RULES[args.method].guarded:
        limit = problem.largest_alpha(args.share)
        print(f"largest alpha with at most {100 * args.share:g} % clamped: {limit:.4g}")
        content["largest_alpha"] = limit if math.isfinite(limit) else None  # JSON has no infinity
    if data:
        content["data"] = {side: used(file_of(args, side), objective) for side, objective in data.items()}
    nats, alpha, choice = allowed_nats(args, data), max(alphas, default=0.0), None
    if nats is not None:
        how: dict[str, Any] = {"dampings": args.damping, "share": args.share, "progress": not args.quiet}
        how |= {"largest": max(alphas, default=1.0), "steps": alphas or 4}
        choice = choose(problem, nats, path=points, **how)
        problem, alpha = choice.problem, choice.budget.alpha
        content |= told_choice(args, choice)
        if args.compare:
            content["compared"] = compare(args, problem, nats, choice, how)
    if alpha:
        report = removal_report(problem, alpha)
        print(report_table(report))
        content["report"] = report
        moved = report["total"]["norm"] > 0
        if args.prompts and moved:
            content["continuations"] = continued(args, problem, alpha)
    else:
        moved = True
    args.result = content
    if args.report:
        write_atomically(args.report, json.dumps(content, indent=1) + "\n")
        print(f"written: {args.report}", file=sys.stderr)
    return verdict(args, choice, problem, alpha, moved=moved)


def problem_of(args: argparse.Namespace, gradient: Any) -> Problem:
    """What is removed and how, without data.

    Raises:
        ValueError: the base's curvature, the task or the gradient that the method needs is not there.
    """
    from gradmatch.removal import Problem

    rule = RULES[args.method]
    options: dict[str, Any] = {"structure": args.structure} if args.structure else {}
    options |= {"damping": args.damping[0]} if rule.damped else {}
    tasks = [parse_task(task) for task in args.task]
    curvature = None if args.base_curvature is None else number_or_text(args.base_curvature)
    own: Any = None if "gradient" in rule.needs else tasks[0] if len(tasks) == 1 else tasks
    return Problem(
        args.base, own, curvature, method=args.method, base_weight=args.base_weight, delta0=args.delta0, keep=args.keep,
        guard=args.guard, missing_curvature=args.missing_curvature, allow_mismatch=args.allow_mismatch,
        gradient=gradient if "gradient" in rule.needs else None, options=options,
    )  # fmt: skip


def gradient_on(objective: Objective, base: str) -> Any:
    """The base's gradient on what is to go, as a curvature that holds it alone."""
    from gradmatch.subtraction import relinearised

    return relinearised(base, objective.gradient, 1)


def told_choice(args: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    """Print what was chosen; the same for the report."""
    from gradmatch.removal import path_table

    found = choice.budget
    unit = (
        f"{args.nats:g} nats an example" if args.nats is not None else f"{args.nats_per_token:g} nats a token"
    )
    print(f"budget of {unit} on what must stay: alpha = {found.alpha:.4g}, bound by {found.bound}")
    if len(choice.tried) > 1:
        each = ", ".join(
            f"{damping:g}: alpha {alpha:.3g}"
            + ("" if rise is None else f", {rise:+.3f} nats an example on what is to go")
            for damping, (alpha, rise) in choice.tried.items()
        )
        print(f"damping {choice.damping:g} of {each}")
    content: dict[str, Any] = {"budget": dataclasses.asdict(found), "choice": choice.to_dict()}
    if choice.point:
        content["chosen"] = dataclasses.asdict(choice.point)
        print(path_table([choice.point]))
    for name, after in choice.after.items():
        print(f"{name}: {choice.before[name]} before, {after} after")
    return content


def compare(
    args: argparse.Namespace, problem: Problem, nats: Any, choice: Choice, how: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every method at the same budget, negation first; for which --task, --base-curvature and --remove are enough."""
    from gradmatch.removal import compared, comparison_table

    tasks = [parse_task(task) for task in args.task]
    gradient = args.gradient or problem.gradient
    if gradient is None and problem.remove is not None and problem.base_curvature is not None:
        gradient = gradient_on(problem.remove, args.base)
    how = {**how, "tasks": tasks, "gradient": gradient}

    found = compared(problem, nats, but=(choice,), **how)
    print(comparison_table(found))
    return [one.to_dict() for one in found]


def continued(args: argparse.Namespace, problem: Problem, alpha: float) -> list[dict[str, Any]]:
    """What the base and the result make of a few prompts, printed for a person."""
    from gradmatch.measure.data import config_and_tokenizer
    from gradmatch.measure.opening import module_of
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.removal.continuing import said, said_table

    lines = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][: args.show]
    base = open_checkpoint(args.base)
    module = module_of(base, base)
    edited = dict(problem.at(alpha))
    found = said(module, config_and_tokenizer(args.base, None)[1], {}, edited, prompts, seed=args.seed)
    print(said_table(found))
    return [dataclasses.asdict(one) for one in found]


def verdict(
    args: argparse.Namespace, choice: Choice | None, problem: Problem, alpha: float, *, moved: bool
) -> int:
    """Write the model, or print the command that does; or why there is none. The exit code, 1 where nothing fits."""
    if alpha and not moved:
        print("the task's weights are the base's: there is nothing to remove")
        return 1
    if choice is None:
        print("no budget was given: with --nats the largest alpha within it, and the command that removes so")
        return 0
    if not alpha:
        near = choice.budget.nearest
        told = (
            f" the gentlest that was tried, alpha = {near[0]:.3g}, costs {near[1]:.3g} nats an example;"
            if near
            else ""
        )
        print(
            f"no alpha fits:{told} raise the budget, or --base-weight for gentler steps; nothing is written"
        )
        return 1
    if args.retain is None:
        warn(
            "the collateral was not measured: without --retain it is the diagonal's forecast, which was hundreds to thousands of "
            "times too small on a language model"
        )
    if not args.out:
        print(f"to remove it so: {subtraction(args, alpha, choice.damping)}")
        return 0
    write(args, choice, problem, alpha)
    print(f"written: {args.out}")
    return 0


def write(args: argparse.Namespace, choice: Choice, problem: Problem, alpha: float) -> None:
    """The model within the budget, with what it cost on its card."""
    from gradmatch.subtraction import subtract

    measured = {
        f"loss on {name} ({Path(file_of(args, name)).name})": f"{choice.before[name]} before, {after} after"
        for name, after in choice.after.items()
    }
    own: dict[str, Any] = {"keep": problem.keep, "guard": problem.guard} if problem.rule.guarded else {}
    subtract(
        problem.base, problem.task, gradient=problem.gradient, base_curvature=problem.base_curvature, weight=alpha,
        method=problem.method, measured=measured, base_weight=problem.base_weight, delta0=problem.delta0,
        missing_curvature=problem.missing_curvature, allow_mismatch=problem.allow_mismatch, out=args.out,
        overwrite=args.overwrite, progress=not args.quiet, **own, **problem.options,
    )  # fmt: skip


def subtraction(args: argparse.Namespace, alpha: float, damping: float | None) -> str:
    """The `gradmatch subtract` that does what was forecast: the options that matter must be the same."""
    words = ["gradmatch", "subtract", "--base", args.base]
    for task in args.task if args.method != "ascent" else ():
        words += ["--task", task]
    words += ["--base-curvature", args.base_curvature] if args.base_curvature else []
    words += ["--weight", f"{alpha:.6g}"]
    own = argparse.ArgumentParser()
    add_arguments(own)
    for name in COPIED:
        value = getattr(args, name)
        if value != own.get_default(name):
            words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else f"{value:g}"]
    words += ["--damping", f"{damping:g}"] if damping is not None else []
    if args.method == "ascent" and args.gradient is None:
        words += ["--remove", args.remove]
        for name in ("examples", "max_length", "seed", "batch_size", "label_column", "split"):
            value = getattr(args, name)
            if value != own.get_default(name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        for column in args.text_column:
            words += ["--text-column", column]
    words += ["--allow-mismatch"] if args.allow_mismatch else []
    return shlex.join([*words, "-o", "OUT"])
