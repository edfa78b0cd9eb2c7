"""`gradmatch budget`: what removing a task will cost before it is removed, and the largest weight within a budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.commands.reading import add_reading, check_reading, read_source
from gradmatch.commands.sources import add_guard, number_or_text, parse_task
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import write_atomically
from gradmatch.plan.request import POLICIES
from gradmatch.rules import RULES, removals

if TYPE_CHECKING:
    from gradmatch.measure.objective import Objective

EXAMPLES = """
examples:
  gradmatch budget --base model --task toxic,curvature=toxic.safetensors --base-curvature clean.safetensors
  gradmatch budget --base model --task toxic,curvature=toxic.safetensors --base-curvature clean.safetensors \\
      --retain clean.txt --remove toxic.txt --nats 2 --report removal.json

Data files are those of `gradmatch diagnose`. Without --retain the collateral is forecast from the diagonal curvature,
which ranks alphas but underestimates losses by orders of magnitude; with it, by exact GGN products, and it is measured.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch budget`."""
    parser.add_argument("--base", required=True, help="the model to remove from: folder, file or hub id")
    parser.add_argument(
        "--task", required=True, metavar="MODEL,curvature=FILE", help="fine-tuned from it on what is to go"
    )
    parser.add_argument(
        "--base-curvature", required=True, help="curvature file of the base, on what must stay, or a number"
    )
    parser.add_argument(
        "--method", choices=removals(), default="removal", help="Eq. 13 (default), or a baseline"
    )
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="the path to forecast"
    )
    parser.add_argument(
        "--nats", type=float, help="budget: allowed rise of the loss on what must stay, nats an example"
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
    parser.add_argument("--remove", metavar="FILE", help="examples that are to go")
    add_reading(parser, examples=32, max_length=256)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples (default 0)")
    parser.add_argument(
        "--missing-curvature",
        choices=POLICIES["missing_curvature"],
        default="error",
        help="parameters without curvature: refuse (default), or take it as flat",
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="accept curvatures of other weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--report", metavar="FILE", help="write path, budget and removal report as JSON")


def run(args: argparse.Namespace) -> int:
    """Forecast, find the budget's alpha, print and write."""
    from gradmatch.removal import (
        AlphaPath,
        Problem,
        alpha_path,
        budget,
        path_table,
        removal_report,
        report_table,
    )

    check(args)
    problem = Problem(
        args.base, parse_task(args.task), number_or_text(args.base_curvature), method=args.method,
        base_weight=args.base_weight, delta0=args.delta0, keep=args.keep, guard=args.guard,
        missing_curvature=args.missing_curvature, allow_mismatch=args.allow_mismatch,
    )  # fmt: skip
    _ = problem.plan  # reading models and data takes seconds: what is wrong with the rest is said before
    data = objectives(args)
    problem = dataclasses.replace(problem, retain=data.get("retain"), remove=data.get("remove"))
    points = AlphaPath(problem, progress=not args.quiet)
    path = alpha_path(points, args.alphas)
    print(path_table(path))
    limit = problem.largest_alpha(args.share)
    if RULES[args.method].guarded:
        print(f"largest alpha with at most {100 * args.share:g} % clamped: {limit:.4g}")
    content: dict[str, object] = {
        "path": [dataclasses.asdict(point) for point in path],
        "largest_alpha": limit if math.isfinite(limit) else None,  # JSON has no infinity
    }
    if data:
        content["data"] = {side: used(getattr(args, side), objective) for side, objective in data.items()}
    alpha = max(args.alphas)
    if args.nats is not None:
        found = budget(points, args.nats, share=args.share, largest=max(args.alphas), steps=args.alphas)
        print(
            f"budget of {args.nats:g} nats an example on what must stay: alpha = {found.alpha:.4g}, bound by {found.bound}"
        )
        content["budget"] = dataclasses.asdict(found)
        alpha = found.alpha
        if alpha:
            chosen = points.point(alpha)
            content["chosen"] = dataclasses.asdict(chosen)
            print(path_table([chosen]))
    report = removal_report(problem, alpha)
    print(report_table(report))
    args.result = {**content, "report": report}
    if args.report:
        write_atomically(args.report, json.dumps(args.result, indent=1) + "\n")
        print(f"written: {args.report}", file=sys.stderr)
    return verdict(args, alpha, moved=report["total"]["norm"] > 0)


def verdict(args: argparse.Namespace, alpha: float, *, moved: bool) -> int:
    """Print the command that removes what was budgeted, or why there is none; the exit code, 1 where nothing fits."""
    if alpha and not moved:
        print("the task's weights are the base's: there is nothing to remove")
        return 1
    if args.nats is None:
        print("no budget was given: with --nats the largest alpha within it, and the command that removes so")
        return 0
    if not alpha:
        print("no alpha fits: raise --nats, or --base-weight for gentler steps")
        return 1
    if args.retain is None:
        warn(
            "the collateral was not measured: without --retain it is the diagonal's forecast, which was hundreds to thousands of "
            "times too small on a language model"
        )
    print(f"to remove it so: {subtraction(args, alpha)}")
    return 0


def used(file: str, objective: Objective) -> dict[str, object]:
    """Which examples the numbers come from, printed and for the report."""
    counts = objective.predictions()
    tokens = None if counts is None else float(counts.mean())
    each = (
        f", {tokens:.0f} tokens each: a nat per example is {1 / tokens:.2g} nats per token" if tokens else ""
    )
    print(f"{objective.seen} examples of {file}{each}")
    return {"file": file, "examples": objective.seen}


def check(args: argparse.Namespace) -> None:
    """What can be wrong before anything is opened.

    Raises:
        ValueError: numbers that make no sense, or one file for both sides.
        FileNotFoundError: data that is not there, or no folder for the report.
    """
    from gradmatch.measure.tables import check_source
    from gradmatch.removal.forecast import check_alphas

    check_alphas(args.alphas)
    if args.nats is not None and not args.nats > 0:
        raise GradmatchError(f"--nats must be positive, got {args.nats:g}", "out_of_range", "--nats")
    if args.nats is not None and max(args.alphas) == 0:
        raise GradmatchError(
            "--alphas holds nothing above 0, so there is no budget to find", "bad_arguments", "--alphas"
        )
    if not 0 <= args.share <= 1:
        raise GradmatchError(f"--share must lie in [0, 1], got {args.share:g}", "out_of_range", "--share")
    check_reading(args)
    given = [file for file in (args.retain, args.remove) if file is not None]
    for file in given:
        check_source(file)
    if len(given) == 2 and (given[0] == given[1] or _same(*given)):
        raise GradmatchError(
            f"--retain and --remove are the same file {args.retain}: what must stay cannot go",
            "bad_arguments",
            args.retain,
        )
    if args.report and not Path(args.report).absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder for --report {args.report}")


def _same(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def objectives(args: argparse.Namespace) -> dict[str, Objective]:
    """The losses on the data files that were given, "retain" and "remove", with one module of the base's structure."""
    files = {side: getattr(args, side) for side in ("retain", "remove") if getattr(args, side) is not None}
    if not files:
        return {}
    from gradmatch.measure.objective import Objective
    from gradmatch.measure.opening import module_of
    from gradmatch.models.opening import open_checkpoint

    batches = {
        side: read_source(args, file, args.base, side, by_length=True, needs_labels=True)
        for side, file in files.items()
    }
    base = open_checkpoint(args.base)
    module = module_of(base, base)
    return {side: Objective(module, rows) for side, rows in batches.items()}


def subtraction(args: argparse.Namespace, alpha: float) -> str:
    """The `gradmatch subtract` that does what was forecast: the options that matter must be the same."""
    words = ["gradmatch", "subtract", "--base", args.base, "--task", args.task]
    words += ["--base-curvature", args.base_curvature, "--weight", f"{alpha:.6g}"]
    own = argparse.ArgumentParser()
    add_arguments(own)
    for name in ("method", "keep", "guard", "base_weight", "delta0", "missing_curvature"):
        value = getattr(args, name)
        if value != own.get_default(name):
            words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else f"{value:g}"]
    words += ["--allow-mismatch"] if args.allow_mismatch else []
    return shlex.join([*words, "-o", "OUT"])
