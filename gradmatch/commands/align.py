"""`gradmatch align`: a model with its units in the order of another's, or the proof that its units may be moved."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from gradmatch.commands.reading import add_reading, check_reading, read_source
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

EXAMPLES = """
examples:
  gradmatch align other/ --to base/ -o aligned/                                by the weights alone
  gradmatch align other/ --to base/ --method activations --data texts.jsonl -o aligned/
  gradmatch align other/ --to base/ --data test.jsonl --figure path.png        the loss between them, before and after; nothing written
  gradmatch align other/ --check                                               which units may be moved, and the proof
  gradmatch merge --base base/ --task base/ --task aligned/ --method averaging -o merged/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch align`."""
    parser.add_argument("model", help="the model whose units are to be moved: folder or hub id")
    parser.add_argument("--to", metavar="BASE", help="the model whose order they are to have")
    parser.add_argument("-o", "--out", help="folder to write")
    parser.add_argument(
        "--method",
        default="weights",
        help="how units are matched: weights (default), activations, transport (other widths too), learned",
    )
    parser.add_argument(
        "--check", action="store_true", help="prove that the model's units may be moved, and list them"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="examples: to match by, and to measure the loss between the models on"
    )
    parser.add_argument(
        "--figure", metavar="FILE", help="draw the loss between the models (.png, .svg, .pdf); needs --data"
    )
    parser.add_argument("--points", type=int, default=11, help="on that line (default 11)")
    parser.add_argument(
        "--restarts", type=int, default=1, help="searches from other orders; the best is taken (default 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of these orders and of the draw of examples (default 0)"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run the model before and after"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_reading(parser, examples=256, max_length=128)


def run(args: argparse.Namespace) -> int:
    """Check, or align and write."""
    if args.check == bool(args.to):
        raise GradmatchError(
            "--check looks at one model alone, without --to"
            if args.check
            else "nothing to align with: name a model with --to, or --check this one",
            "bad_arguments",
        )
    check_reading(args)
    if args.figure and not args.data:
        raise GradmatchError("--figure draws losses, which need --data FILE", "bad_arguments")
    data = None
    if args.data:
        args.batch_size = args.batch_size or 32
        data = list(read_source(args, args.data, args.model))
    if args.check:
        from gradmatch.rebasin import check

        proof = check(args.model, data, seed=args.seed)
        print(json.dumps(proof.to_dict(), indent=2) if args.json else proof.summary())
        return 0
    if args.out:
        from gradmatch.output.publishing import check_absent, place

        check_absent(place(args.out), args.overwrite)
    from gradmatch.rebasin import align

    view = align(
        args.model, args.to, args.method, data, restarts=args.restarts, seed=args.seed, verify=args.verify
    )
    told: dict[str, Any] = view.report.to_dict()
    lines = [view.report.summary()]
    if data is not None and all("labels" in batch for batch in data):
        told["barriers"] = barriers = _barriers(args, view, data)
        lines += [
            f"barrier of the straight line, {name}: {known['height']:.4f} nats per example"
            for name, known in barriers.items()
        ]
    if args.out:
        _write(args, view)
        told["written"] = args.out
        lines.append(f"written: {args.out}")
    print(json.dumps(told, indent=2) if args.json else "\n".join(lines))
    return 0


def _barriers(args: argparse.Namespace, view: Checkpoint, data: list[Any]) -> dict[str, Any]:
    """The loss between the models, unaligned and aligned, on the same data; drawn where that is asked for."""
    from gradmatch.measure.objective import Objective
    from gradmatch.models.loading import load
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.rebasin import barrier
    from gradmatch.rebasin.path import figure

    objective = Objective(load(open_checkpoint(args.to)), data)
    found = {
        name: barrier(
            args.to, model, lambda weights: objective.loss(weights) / objective.num_examples, args.points
        )
        for name, model in (("unaligned", args.model), ("aligned", view))
        if name == "aligned"
        or view.report.unaligned == view.report.unaligned  # NaN: there is no line between other widths
    }
    if args.figure:
        figure(found, args.figure)
    return {name: known.to_dict() for name, known in found.items()}


def _write(args: argparse.Namespace, view: Checkpoint) -> None:
    """The view as a model's folder, with a card that says what was done."""
    from gradmatch.merging import execute, prepare
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.models.task import Task

    notes = [f"aligned to {open_checkpoint(args.to).names[0]}", *view.report.summary().splitlines()]
    made = prepare(view, [Task(view, name="aligned")], method="passthrough", notes=notes)
    execute(made, args.out, overwrite=args.overwrite, progress=not args.quiet and not args.json)
