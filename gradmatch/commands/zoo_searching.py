"""`gradmatch zoo select` and `evolve`: what merges are scored by, and how they are searched."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from gradmatch.commands.reading import add_reading, check_reading
from gradmatch.measure.tables import check_source


def add_models(parser: argparse.ArgumentParser) -> None:
    """Which models."""
    parser.add_argument("models", nargs="*", metavar="FOLDER", help="models, and folders with models in them")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="MODEL[,curvature=FILE][,name=NAME]",
        help="a model with its curvature; repeatable",
    )
    parser.add_argument("--base", help="the model that they were fine-tuned from: folder, file or hub id")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt files (weights_only)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """What merges are scored by, and what they are."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="examples with true labels to score on; repeatable, each counts the same",
    )
    parser.add_argument(
        "--metric",
        choices=("auto", "accuracy", "loss"),
        default="auto",
        help="of --data (default: accuracy where outputs are classes)",
    )
    parser.add_argument(
        "--tasks",
        action="append",
        default=[],
        metavar="NAME[,metric=M][,weight=W]",
        help="a task of lm-eval (gradmatch[lm-eval]); repeatable",
    )
    parser.add_argument("--include", metavar="FOLDER", help="task files beside lm-eval's own")
    parser.add_argument(
        "--shots", type=int, help="examples in the prompts of --tasks (default: as each says)"
    )
    add_reading(parser, examples=None)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw of examples, and of the search (default 0)"
    )
    parser.add_argument("--method", default="linear", help="rule of the merges (default: linear)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the method, or a policy of merge (heads=base); repeatable",
    )
    parser.add_argument("-o", "--out", help="folder to write the chosen merge to")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def add_evolving(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gradmatch zoo evolve`."""
    add_models(parser)
    add_scoring(parser)
    parser.add_argument(
        "--sampler",
        choices=("cmaes", "nsga2"),
        default="cmaes",
        help="nsga2: every --data or --tasks is an objective (default: cmaes, their mean)",
    )
    parser.add_argument(
        "--trials", type=int, default=200, help="candidates of all workers together (default 200)"
    )
    parser.add_argument(
        "--storage",
        help="journal file, FILE.db or URL that workers share (default: $GRADMATCH_STORAGE, else memory)",
    )
    parser.add_argument("--name", default="zoo", help="of the study in the storage (default: zoo)")
    parser.add_argument(
        "--groups",
        type=int,
        default=0,
        help="groups of layers with weights of their own (default 0: one for the model)",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="OPTION=LOW:HIGH",
        help="option of the method that is searched too; repeatable",
    )
    parser.add_argument(
        "--start",
        default="average",
        help="a strategy of select, uniform, random, or what select printed with --json (default: average)",
    )
    parser.add_argument("--population", type=int, help="candidates a generation (default: 4 + 3 ln n)")
    parser.add_argument(
        "--forecast",
        action=argparse.BooleanOptionalAction,
        help="spare candidates that curvature files are against (default: where every model has one)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a config of mergekit-evolve: models, base, method, groups and tasks come from it, as it is",
    )
    parser.add_argument("--figure", metavar="FILE", help="draw the Pareto front: .svg, .png or .pdf")


def add_selecting(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gradmatch zoo select`."""
    add_models(parser)
    add_scoring(parser)
    parser.add_argument(
        "--strategy",
        choices=("average", "greedy_soup", "coefficient", "most_similar", "least_similar", "exhaustive"),
        default="average",
        help="which candidates are tried (default: average, the greedy soup)",
    )
    parser.add_argument("--budget", type=int, help="evaluations, at most")
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="JSON lines with every score and choice; the same file goes on with them",
    )
    parser.add_argument(
        "--forecast",
        action=argparse.BooleanOptionalAction,
        help="use the curvature files first (default: where every model has one)",
    )


def models_of(args: argparse.Namespace) -> list[Any]:
    """The models that a command names.

    Raises:
        GradmatchError: none.
    """
    from gradmatch.commands.sources import parse_task
    from gradmatch.estimators.errors import GradmatchError

    given = [*args.models, *(parse_task(text) for text in args.task)]
    if not given:
        raise GradmatchError("no models: name folders, or give --task MODEL", "bad_arguments")
    return given


def say(args: argparse.Namespace, found: Any) -> int:
    """Print what was found, and keep it for --json."""
    args.result = found.to_dict()
    print(found.summary())
    return 0


def score_of(args: argparse.Namespace) -> Any:
    """The score that a command's flags describe.

    Raises:
        GradmatchError: none, or two of them.
    """
    from gradmatch.estimators.errors import GradmatchError

    if bool(args.data) == bool(args.tasks):
        raise GradmatchError(
            "a search needs one score: --data FILE with examples, or --tasks NAME of lm-eval"
            + (", not both" if args.data else ""),
            "bad_arguments",
        )
    check_reading(args)
    if args.tasks:
        from gradmatch.zoo.tasks import OnTasks, parse_told

        return OnTasks(
            args.base, [parse_told(text) for text in args.tasks], include=args.include, limit=args.examples, shots=args.shots,
            seed=args.seed, batch_size=args.batch_size or 8,
        )  # fmt: skip
    from gradmatch.zoo.scores import OnExamples

    sources: dict[str, str] = {}
    for text in args.data:
        name, equals, file = text.partition("=") if not Path(text).exists() else ("", "", text)
        file = file if equals or not name else text
        name = name if equals else Path(file).stem
        if name in sources:
            raise GradmatchError(
                f"--data names {name!r} twice; write NAME=FILE with another name", "bad_arguments", name
            )
        check_source(file)
        sources[name] = file
    columns = [name for given in args.text_column for name in given.split(",")]
    return OnExamples(
        args.base, sources, args.metric, text=columns, label=args.label_column, split=args.split, limit=args.examples,
        seed=args.seed, max_length=args.max_length, batch_size=args.batch_size or 32,
    )  # fmt: skip


def select(args: argparse.Namespace) -> int:
    """`gradmatch zoo select`."""
    from gradmatch import zoo

    models = models_of(args)
    _check(args)
    found = zoo.select(
        args.base, models, score_of(args), args.strategy, budget=args.budget, method=args.method, log=args.log, forecast=args.forecast,
        allow_pickle=args.allow_pickle, progress=not args.quiet, **options_of(args),
    )  # fmt: skip
    return _chosen(args, found)


def evolve(args: argparse.Namespace) -> int:
    """`gradmatch zoo evolve`."""
    from gradmatch import zoo
    from gradmatch.zoo.scores import Each

    if args.config:
        return _as_mergekit(args)
    models = models_of(args)
    _check(args)
    ranges = dict(searched(text) for text in args.search)
    start = weights_in(args.start)
    score = score_of(args)
    found = zoo.evolve(
        args.base, models, Each(score) if args.sampler == "nsga2" else score, args.sampler, trials=args.trials,
        storage=args.storage or os.environ.get("GRADMATCH_STORAGE"), seed=args.seed, name=args.name, merge_method=args.method, groups=args.groups,
        search=ranges, start=start, population=args.population, forecast=args.forecast, allow_pickle=args.allow_pickle,
        progress=not args.quiet, **options_of(args),
    )  # fmt: skip
    if args.figure:
        found.figure(args.figure)
        print(f"drawn: {args.figure}", file=sys.stderr)
    return _chosen(args, found)


def _as_mergekit(args: argparse.Namespace) -> int:
    """A config of mergekit-evolve; its notes are said."""
    from gradmatch import zoo
    from gradmatch.recipes.mergekit.evolving import read_evolving
    from gradmatch.zoo.tasks import OnTasks

    asked = read_evolving(args.config)
    args.base = asked.base
    _check(args)
    for note in asked.notes:
        print(f"note: {note}", file=sys.stderr)
    score = (
        score_of(args)
        if args.data
        else OnTasks(asked.base, asked.scored, include=args.include, seed=args.seed, **asked.settings)
    )
    found = zoo.evolve(
        asked.base, asked.models, score, trials=args.trials, storage=args.storage or os.environ.get("GRADMATCH_STORAGE"), seed=args.seed,
        name=args.name, start=asked.start, population=args.population, space=asked.space, allow_pickle=args.allow_pickle,
        progress=not args.quiet, **{**asked.options, **options_of(args)},
    )  # fmt: skip
    return _chosen(args, found)


def searched(text: str) -> tuple[str, tuple[float, float]]:
    """OPTION=LOW:HIGH of --search.

    Raises:
        GradmatchError: something else.
    """
    from gradmatch.estimators.errors import GradmatchError

    name, _, bounds = text.partition("=")
    low, _, high = bounds.partition(":")
    try:
        return name.replace("-", "_"), (float(low), float(high))
    except ValueError as error:
        raise GradmatchError(
            f"--search {text!r} is not OPTION=LOW:HIGH, such as density=0.1:1", "bad_arguments", text
        ) from error


def weights_in(start: str) -> Any:
    """--start: a word, or the weights in a file that `select --json` printed.

    Raises:
        GradmatchError: a file without weights.
    """
    if not Path(start).is_file():
        return start
    from gradmatch.estimators.errors import GradmatchError
    from gradmatch.estimators.files import read_json

    weights = read_json(Path(start)).get("weights")
    if not isinstance(weights, dict) or not all(
        isinstance(value, (int, float)) for value in weights.values()
    ):
        raise GradmatchError(
            f"{start} holds no weights; give what `gradmatch zoo select --json` printed",
            "bad_arguments",
            start,
        )
    return weights


def _check(args: argparse.Namespace) -> None:
    """What is wrong before anything is read.

    Raises:
        GradmatchError: no base.
        FileExistsError: the output is there.
    """
    from gradmatch.estimators.errors import GradmatchError

    if not args.base:
        raise GradmatchError(
            "no base: name the model that they were fine-tuned from with --base", "bad_arguments"
        )
    if args.out:
        from gradmatch.output.publishing import check_absent, place

        check_absent(place(args.out), args.overwrite)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """--option KEY=VALUE as a table."""
    from gradmatch.commands.options import given_options

    return given_options(args)


def _chosen(args: argparse.Namespace, found: Any) -> int:
    """Write what a search chose, where that is asked for, and print it."""
    if args.out:
        found.merge(args.out, overwrite=args.overwrite, progress=not args.quiet, **options_of(args))
    say(args, found)
    if args.out:
        print(f"written: {args.out}")
    return 0
