"""Where the commands that forecast find models and data: a recipe, flags over it, and a file of examples for each task."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.commands.reading import add_reading, check_reading, read_source
from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from gradmatch.models.task import Task

SETTINGS = ("method", "base_curvature", "base_weight", "delta0")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The models: a recipe, and flags over it."""
    parser.add_argument("recipe", nargs="?", help="YAML recipe of the merge, ours or mergekit's")
    parser.add_argument("--method", help="rule of the merge (default: the recipe's)")
    add_models(parser)
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples (default 0)")


def add_models(parser: argparse.ArgumentParser) -> None:
    """Base, tasks and curvatures, as every command takes them."""
    parser.add_argument(
        "--base", help="the model that the tasks were fine-tuned from: folder, file or hub id"
    )
    parser.add_argument(
        "--task", action="append", default=[], metavar="MODEL[,curvature=FILE][,weight=W][,name=NAME]",
        help="a fine-tuned model; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--base-curvature", help="curvature file of the base, or a number for an isotropic one"
    )
    parser.add_argument("--base-weight", type=float, help="factor on the base's curvature (default 1)")
    parser.add_argument("--delta0", type=float, help="floor of the curvature (default 1e-6)")


def add_guard(parser: argparse.ArgumentParser) -> None:
    """What keeps the curvature positive where a task is removed."""
    from gradmatch.rules.removal import GUARDS

    parser.add_argument(
        "--keep", type=float, default=0.1, help="guard: H0 - alpha H_t is at least keep * H0 (default 0.1)"
    )
    parser.add_argument(
        "--guard",
        choices=GUARDS,
        default="floor",
        help="floor H0 - alpha H_t there (default), or scale H_t down",
    )


def parse_task(text: str) -> Task:
    """MODEL[,curvature=FILE][,weight=W][,name=NAME].

    Raises:
        ValueError: another key, or a weight that is no setting.
    """
    from gradmatch.common.yamltext import load_yaml
    from gradmatch.models.task import Task

    model, *pairs = text.split(",")
    fields: dict[str, Any] = {}
    while pairs:
        pair = pairs.pop(0)
        while pairs and any(pair.count(a) > pair.count(b) for a, b in ("[]", "{}")):  # weight=[0.1,0.9]
            pair += "," + pairs.pop(0)
        key, equals, value = pair.partition("=")
        if not equals or key not in ("curvature", "weight", "name"):
            raise GradmatchError(
                f"--task {text!r}: {pair!r} is none of curvature=FILE, weight=W, name=NAME",
                "unknown_name",
                text,
            )
        fields[key] = load_yaml(value, f"--task {text!r}: the weight") if key == "weight" else value
    return Task(model, **fields)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Examples of each task, or the products that were measured on them. The draw goes by --seed, which the command has."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="examples with true labels, one per task: csv, tsv, json, jsonl, parquet, txt, a folder, a hub set, or tensors "
        "as .safetensors",
    )
    add_reading(parser, examples=256, max_length=256)
    parser.add_argument(
        "--products", metavar="FILE", help="stored by `gradmatch forecast --save`, to forecast from"
    )


def sources(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's arguments with the flags over them.

    Raises:
        ValueError: no base or no task.
    """
    from gradmatch.recipes.recipe import load_recipe

    arguments: dict[str, Any] = load_recipe(args.recipe) if args.recipe else {}
    for name in ("base", *SETTINGS):
        value = getattr(args, name)
        if value is not None:
            arguments[name] = number_or_text(value) if name == "base_curvature" else value
    if args.task:
        arguments["tasks"] = [parse_task(text) for text in args.task]
    if "base" not in arguments or not arguments.get("tasks"):
        raise GradmatchError(
            "nothing to look at: give a recipe, or --base and at least one --task", "bad_arguments"
        )
    return arguments


def in_one_order(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a merge with the tasks aligned to the base, where a recipe or flag asks for that."""
    given = dict(arguments)
    if align := given.pop("align", None):
        from gradmatch.api import aligned

        given["tasks"], told = aligned(given["base"], given["tasks"], align)
        given["notes"] = [*given.get("notes", ()), *told]
    return given


def read_data(
    args: argparse.Namespace, arguments: dict[str, Any], also: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Batches of every --data file, tokenised as the base wants it; None without one. `also`: what they may belong to beside tasks."""
    if not args.data:
        return None
    from gradmatch.plan.opened import task_names

    check_reading(args)
    files = parse_data(args.data, [*task_names(arguments["tasks"]), *also])
    return {
        task: read_source(args, file, str(arguments["base"]), task, needs_labels=True)
        for task, file in files.items()
    }


def parse_data(arguments: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """TASK=FILE arguments as a table.

    Raises:
        ValueError: not TASK=FILE, or an unknown task.
        FileNotFoundError: no such file.
    """
    from gradmatch.measure.tables import check_source

    files = {}
    for argument in arguments:
        task, equals, name = argument.partition("=")
        if not equals or not name:
            raise GradmatchError(
                f"--data {argument!r} is not TASK=FILE; the tasks are {', '.join(tasks)}",
                "bad_arguments",
                argument,
            )
        if task not in tasks:
            raise GradmatchError(
                f"--data names a task {task!r}; the tasks are {', '.join(tasks)}", "bad_arguments"
            )
        check_source(name)
        files[task] = name
    return files


def number_or_text(text: str) -> float | str:
    """A curvature on the command line: a number, or a file."""
    try:
        return float(text)
    except ValueError:
        return text
