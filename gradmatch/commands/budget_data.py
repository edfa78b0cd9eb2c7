"""The data and the arguments of `gradmatch budget`: what must stay, what is to go, and what can be wrong with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.commands.reading import check_reading, read_source
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import RULES

if TYPE_CHECKING:
    from gradmatch.measure.objective import Objective

ALPHAS = [0.25, 0.5, 0.75, 1.0]


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
    from gradmatch.output.publishing import check_absent, place
    from gradmatch.removal.forecast import check_alphas

    if args.alphas is not None:
        check_alphas(args.alphas)
    for name in ("nats", "nats_per_token"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not value > 0:
            raise GradmatchError(f"{option} must be positive, got {value:g}", "out_of_range", option)
        if value is not None and max(args.alphas or ALPHAS) == 0:
            raise GradmatchError(
                "--alphas holds nothing above 0, so there is no budget to find", "bad_arguments", "--alphas"
            )
    if not 0 <= args.share <= 1:
        raise GradmatchError(f"--share must lie in [0, 1], got {args.share:g}", "out_of_range", "--share")
    if not all(damping > 0 and math.isfinite(damping) for damping in args.damping):
        raise GradmatchError(
            f"--damping must be positive, got {' '.join(f'{one:g}' for one in args.damping)}: with lambda = 0 directions that no "
            "curvature sees would have no bound",
            "out_of_range",
            "--damping",
        )
    check_needs(args)
    check_reading(args)
    given = [file for file in (args.retain, *args.beside, args.remove) if file is not None]
    for file in given:
        check_source(file)
    if args.prompts:
        check_source(args.prompts)
    besides(args)
    for file in given[:-1] if args.remove is not None else ():
        check_apart(file, args.remove)
    if args.report and not Path(args.report).absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder for --report {args.report}")
    if args.out:
        check_absent(place(args.out), args.overwrite)


def check_needs(args: argparse.Namespace) -> None:
    """What the method and the budget need of the arguments.

    Raises:
        ValueError: the base's curvature, a task, what is to go or what must stay is not given.
    """
    needs = RULES[args.method].needs
    if "base_curvature" in needs and args.base_curvature is None:
        raise GradmatchError(
            f"--method {args.method} needs --base-curvature, a file of `gradmatch estimate` on what must stay",
            "bad_arguments",
            "--base-curvature",
        )
    if "gradient" in needs and args.gradient is None and args.remove is None:
        raise GradmatchError(
            "ascent needs to know what is to go: --remove FILE, or --gradient FILE",
            "bad_arguments",
            "--remove",
        )
    if "gradient" not in needs and not args.task:
        raise GradmatchError(
            f"--method {args.method} needs --task, a model fine-tuned on what is to go",
            "bad_arguments",
            "--task",
        )
    if (args.nats_per_token is not None or args.beside) and args.retain is None:
        raise GradmatchError(
            "--nats-per-token and --beside are measured: give --retain, a file of what must stay",
            "bad_arguments",
            "--retain",
        )


def check_apart(stays: str, goes: str) -> None:
    """Refuse one file on both sides, or two that share half of their lines.

    Raises:
        ValueError: what must stay and what is to go are the same.
    """
    if stays == goes or _same(stays, goes):
        raise GradmatchError(
            f"--retain and --remove are the same file {stays}: what must stay cannot go",
            "bad_arguments",
            stays,
        )
    if not (Path(stays).is_file() and Path(goes).is_file()):
        return
    one, other = (
        {line.strip() for line in Path(file).read_bytes().splitlines() if line.strip()}
        for file in (stays, goes)
    )
    both = len(one & other)
    if both and both >= min(len(one), len(other)) / 2:
        raise GradmatchError(
            f"{both} of the {min(len(one), len(other))} lines of the shorter of {stays} and {goes} stand in both: what must stay "
            "cannot go",
            "bad_arguments",
            stays,
        )
    if both:
        warn(f"{both} lines stand both in {stays} and in {goes}: what must stay cannot go")


def _same(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def objectives(args: argparse.Namespace) -> dict[str, Objective]:
    """The losses on the data files that were given, "retain", those beside it and "remove", with one module of the base's structure."""
    files = {"retain": args.retain, **dict(besides(args)), "remove": args.remove}
    files = {side: file for side, file in files.items() if file is not None}
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


def allowed_nats(args: argparse.Namespace, data: Mapping[str, Objective]) -> dict[str, float] | float | None:
    """The budget in nats an example, of each file that must stay.

    Raises:
        ValueError: nats a token without data, or of data whose examples have one prediction each.
    """
    if args.nats_per_token is None:
        return args.nats if args.nats is None or not args.beside else dict.fromkeys(stay(data), args.nats)
    allowed = {}
    for side in stay(data):
        counts = data[side].predictions()
        if counts is None:
            raise GradmatchError(
                "--nats-per-token is of language models; here every example has one prediction: give --nats",
                "bad_arguments",
                "--nats-per-token",
            )
        allowed[side] = args.nats_per_token * float(counts.mean())
    return allowed


def stay(data: Mapping[str, Objective]) -> list[str]:
    """The names of the data that must stay."""
    return [name for name in data if name != "remove"]


def file_of(args: argparse.Namespace, side: str) -> str:
    """The file of a side's data."""
    return str(getattr(args, side) if side in ("retain", "remove") else dict(besides(args))[side])


def besides(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name -> file of the data beside --retain: by the file's own name, which must be another one each."""
    found = [(Path(file).stem, file) for file in args.beside]
    names = [name for name, _ in found]
    twice = [name for name in names if names.count(name) > 1 or name in ("retain", "remove")]
    if twice:
        raise GradmatchError(
            f"--beside: {twice[0]!r} names two of the data; give the files names of their own",
            "bad_arguments",
            "--beside",
        )
    return found
