"""`gradmatch mix`: models side by side with a router, by a recipe (ours or mergekit-moe's) or by flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradmatch.commands.reading import add_reading, check_reading
from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.request import FORMS, GATES, LEVELS, ROUTERS, ROUTINGS

EXAMPLES = """
examples:
  gradmatch mix recipe.yaml mixture/                    a recipe of ours, or a file of mergekit-moe as it is
  gradmatch mix --base base --expert maths --expert prose --level model --routing sample -o mixture/
  gradmatch mix --base base --expert maths --expert prose --router spectral --level block --rank 16 -o mixture/
  gradmatch mix train-router mixture/ --data maths.txt --data prose.txt --steps 200      the routers alone, in place
  gradmatch mix report mixture/ --data maths=maths.txt --data prose=prose.txt --figure who.svg
  gradmatch mix curve recipe.yaml --over rank --points 4,16,64 --data test.csv --figure curve.svg      size against accuracy
"""
CHOICES = {"level": LEVELS, "routing": ROUTINGS, "router": ROUTERS, "gate_mode": GATES, "form": FORMS}
MEANINGS = {
    "level": "what an expert is",
    "routing": "a choice for every token (default of ffns), or for the whole sample",
    "router": "spectral needs no data",
    "gate_mode": "how prompts become a router; all but seen as mergekit-moe has them",
    "form": "how it is written",
}
NUMBERS = {
    "top_k": "experts in an answer (default: 2 of ffns, else 1)",
    "rank": "of router spectral: experts as low-rank differences from the merge",
    "gate_rank": "directions that a spectral router looks along (default 8)",
    "seed": "of what starts at random (default 0)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch mix`."""
    parser.add_argument(
        "recipe", nargs="?", help="YAML recipe, flags below override it; or train-router, report, curve"
    )
    parser.add_argument(
        "out_folder", nargs="?", metavar="OUT", help="folder to write, or of the mixture to train or look at"
    )
    parser.add_argument("-o", "--out", help="folder to write")
    parser.add_argument("--base", help="the model that the experts were fine-tuned from: folder or hub id")
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="MODEL[,curvature=FILE][,weight=W][,name=NAME]",
        help="a model; repeatable",
    )
    for name, known in CHOICES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            choices=known,
            help=MEANINGS[name]
            if name == "routing"
            else f"{MEANINGS[name]} (default {'linear' if name == 'router' else known[0]})",
        )
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--dense-layers", type=int, metavar="N", help="merge the first N layers, mix the rest (default 0)"
    )
    parser.add_argument("--method", help="rule of what is not mixed, or base (default averaging)")
    parser.add_argument("--dtype", help="of the output: float32, bfloat16, ... (default: the base's)")
    group = parser.add_argument_group("train-router, report and curve")
    group.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]FILE", help="examples; repeatable"
    )
    group.add_argument("--steps", type=int, default=100, help="of AdamW (default 100)")
    group.add_argument("--rate", type=float, default=1e-2, help="of learning (default 0.01)")
    group.add_argument(
        "--balance", type=float, default=0.01, help="weight of the balance loss (default 0.01)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on where a training ended, up to --steps in all"
    )
    group.add_argument("--figure", metavar="FILE", help="draw the shares or the curve (.svg, .png, .pdf)")
    group.add_argument(
        "--over",
        choices=("layers", "rank"),
        default="layers",
        help="of a curve: layers that are mixed (default), or rank",
    )
    group.add_argument(
        "--points", metavar="N,N,...", help="of a curve (default: quarters of the layers, or ranks 4,16,64)"
    )
    add_reading(group, examples=None)
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def run(args: argparse.Namespace) -> int:
    """Mix, or train or look at what was mixed."""
    if args.recipe in ACTIONS:
        return ACTIONS[args.recipe](args)
    from gradmatch.mixture.mixing import mix
    from gradmatch.recipes.mixture import load_mixture

    recipe, out = args.recipe, args.out or args.out_folder
    if recipe and args.base and not out:
        recipe, out = None, recipe  # `gradmatch mix OUT --base ...`
    arguments: dict[str, Any] = load_mixture(recipe) if recipe else {}
    arguments |= overrides(args)
    if "base" not in arguments or not arguments.get("experts"):
        raise GradmatchError(
            "nothing to mix: give a recipe, or --base and at least two --expert", "bad_arguments"
        )
    if not out:
        raise GradmatchError("no output folder: name it after the recipe or with --out", "bad_arguments")
    made = mix(**arguments, out=out, overwrite=args.overwrite, progress=not args.quiet).report
    print(f"{made.summary()}\nwritten: {out}")
    args.result = {"out": out, "report": made.to_dict()}
    return 0


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as arguments of `mix`."""
    from gradmatch.commands.sources import parse_task

    names = ("base", "method", "dtype", "dense_layers", *CHOICES, *NUMBERS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.expert:
        given["experts"] = [parse_task(text) for text in args.expert]
    return given


def reading_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of reading data, as `gradmatch.measure.data.read` takes them."""
    check_reading(args)
    return {
        "text": [name for given in args.text_column for name in given.split(",")],
        "label": args.label_column,
        "split": args.split,
        "limit": args.examples,
        "seed": args.seed or 0,
        "max_length": args.max_length,
        "batch_size": args.batch_size or 8,
    }


def _folder_and_data(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The mixture's folder, and name -> file."""
    folder = args.out_folder or args.out
    if not folder or not args.data:
        raise GradmatchError(
            f"`gradmatch mix {args.recipe}` takes the folder of a mixture, and --data FILE", "bad_arguments"
        )
    files = {}
    for text in args.data:
        name, equals, file = text.partition("=")
        files[name if equals else Path(text).stem] = file if equals else text
    return folder, files


def _train(args: argparse.Namespace) -> int:
    from gradmatch.mixture.training import train_router

    folder, files = _folder_and_data(args)
    done = train_router(
        folder, list(files.values()), args.steps, rate=args.rate, balance=args.balance, resume=args.resume, reading=reading_of(args),
        progress=not args.quiet,
    )  # fmt: skip
    print(done.summary())
    args.result = done.to_dict()
    return 0


def _report(args: argparse.Namespace) -> int:
    from gradmatch.mixture.shares import routing

    folder, files = _folder_and_data(args)
    found = routing(folder, files, **reading_of(args))
    if args.figure:
        found.figure(args.figure)
    print(found.summary())
    args.result = found.to_dict()
    return 0


def _curve(args: argparse.Namespace) -> int:
    from gradmatch.measure.data import read
    from gradmatch.mixture.curve import accuracy_on, size_curve
    from gradmatch.recipes.mixture import load_mixture

    recipe, files = _folder_and_data(args)
    arguments = {**load_mixture(recipe), **overrides(args)}
    arguments = {key: value for key, value in arguments.items() if key not in ("dense_layers", "rank")}
    base = arguments.pop("base")
    points = [int(one) for one in args.points.split(",")] if args.points else None
    batches = [batch for file in files.values() for batch in read(file, base, **reading_of(args))]
    found = size_curve(base, arguments.pop("experts"), accuracy_on(batches), args.over, points, **arguments)
    if args.figure:
        found.figure(args.figure)
    print(found.summary())
    args.result = found.to_dict()
    return 0


ACTIONS = {"train-router": _train, "report": _report, "curve": _curve}
