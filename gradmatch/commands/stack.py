"""`gradmatch stack`: layer ranges of models in depth, and light fine-tuning of what was added."""

from __future__ import annotations

import argparse

from gradmatch.commands.reading import add_reading, check_reading
from gradmatch.estimators.errors import GradmatchError

EXAMPLES = """
examples:
  gradmatch stack cook:0:12 cook:6:12 -o deeper/                   starts as the first entry: what is added is the identity
  gradmatch stack cook:0:4 cook:8:12 -o shorter/ --no-identity     drops the layers between
  gradmatch stack train deeper/ --data texts.txt --steps 200       trains the added blocks alone, in place
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch stack`."""
    parser.add_argument(
        "parts",
        nargs="+",
        metavar="MODEL:FIRST:STOP",
        help="layers FIRST to STOP - 1 of a model, from below; or train FOLDER",
    )
    parser.add_argument("-o", "--out", help="folder to write")
    parser.add_argument(
        "--no-identity", action="store_true", help="leave the added blocks as they are in their model"
    )
    parser.add_argument("--dtype", help="of the output: float32, bfloat16, ... (default: the models')")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    group = parser.add_argument_group("train")
    group.add_argument("--data", action="append", default=[], metavar="FILE", help="examples; repeatable")
    group.add_argument("--steps", type=int, default=100, help="of AdamW (default 100)")
    group.add_argument("--rate", type=float, default=1e-4, help="of learning (default 1e-4)")
    group.add_argument(
        "--resume", action="store_true", help="go on where a training ended, up to --steps in all"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draw of examples (default 0)")
    add_reading(group, examples=None)


def run(args: argparse.Namespace) -> int:
    """Stack, or train what was stacked."""
    if args.parts[0] == "train":
        return _train(args)
    from gradmatch.mixture.stacking import stack

    models, layers = [], []
    for part in args.parts:
        model, *numbers = part.rsplit(":", 2)
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise GradmatchError(f"{part!r} is no MODEL:FIRST:STOP, such as cook:0:12", "bad_arguments", part)
        models.append(model)
        layers.append((int(numbers[0]), int(numbers[1])))
    if not args.out:
        raise GradmatchError("no output folder: name it with --out", "bad_arguments")
    made = stack(
        models,
        layers,
        args.out,
        identity=not args.no_identity,
        dtype=args.dtype,
        overwrite=args.overwrite,
        progress=not args.quiet,
    ).report
    print(f"{made.summary()}\nwritten: {args.out}")
    args.result = {"out": args.out, "report": made.to_dict()}
    return 0


def _train(args: argparse.Namespace) -> int:
    from gradmatch.commands.mix import reading_of
    from gradmatch.mixture.stacking import train_blocks

    if len(args.parts) != 2 or not args.data:
        raise GradmatchError("`gradmatch stack train` takes one folder, and --data FILE", "bad_arguments")
    check_reading(args)
    done = train_blocks(
        args.parts[1],
        args.data,
        args.steps,
        rate=args.rate,
        resume=args.resume,
        reading=reading_of(args),
        progress=not args.quiet,
    )
    print(done.summary())
    args.result = done.to_dict()
    return 0
