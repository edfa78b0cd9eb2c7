"""`gradmatch forecast`: what a merge will cost each task, and the weights that cost least, before merging."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.commands.sources import add_sources, in_one_order, read_data, sources
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import write_atomically

if TYPE_CHECKING:
    from gradmatch.choosing.auto import AutoWeights
    from gradmatch.measure.forecast import Products
    from gradmatch.models.task import Task

SETTINGS = ("base_curvature", "base_weight", "delta0")
EXAMPLES = """
examples:
  gradmatch forecast recipe.yaml --data amazon=amazon.jsonl --data nyt=nyt.jsonl --save products.json
  gradmatch forecast recipe.yaml --products products.json --upper 1
  gradmatch forecast recipe.yaml --data ... --span preconditioned      weights after the elementwise Eq. 12

The forecast is exact in curvature (Jacobian-vector products over the examples) and quadratic in the weights; "?" marks rises
outside its region. Without data it falls back on the curvature files, whose diagonals rank but do not forecast.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch forecast`."""
    add_sources(parser)
    parser.add_argument(
        "--span", choices=("tau", "preconditioned"), default="tau", help="directions (default tau)"
    )
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="LAYER",
        help="layer group with weights of its own; repeatable",
    )
    parser.add_argument("--lower", type=float, default=0.0, help="smallest weight (default 0)")
    parser.add_argument("--upper", type=float, default=2.0, help="largest weight (default 2)")
    parser.add_argument("--save", metavar="FILE", help="store the products beside the curvature files")
    parser.add_argument("--write", metavar="FILE", help="write a recipe with the best weights, to merge by")
    parser.add_argument(
        "--pareto", action="store_true", help="also the weights that trade two or three tasks off"
    )


def run(args: argparse.Namespace) -> int:
    """Forecast and print."""
    if args.write and args.group:
        raise GradmatchError(
            "--write and --group do not go together: a recipe's weights multiply whole task vectors",
            "bad_arguments",
        )
    arguments = sources(args)
    from gradmatch.api import forecast
    from gradmatch.plan.opened import task_names

    tasks = in_one_order(arguments)["tasks"]
    given = {name: arguments[name] for name in SETTINGS if name in arguments}
    result = forecast(
        arguments["base"], tasks, data=read_data(args, arguments), products=args.products, span=args.span,
        groups=args.group, lower=args.lower, upper=args.upper, save=args.save, **given,
    )  # fmt: skip
    for line in describe(result):
        print(line)
    args.result = result.to_dict()
    if args.pareto:
        for line in front(result.products, args.lower, args.upper):
            print(line)
    if args.write:
        given_tasks = arguments["tasks"]
        write_recipe(
            args.write, arguments, dict(zip(task_names(given_tasks), given_tasks, strict=True)), result
        )
    if args.save:
        print(f"written: {args.save}", file=sys.stderr)
    return 0


def write_recipe(path: str, arguments: dict[str, Any], tasks: dict[str, Task], result: AutoWeights) -> None:
    """A recipe with these weights, of task arithmetic or of Eq. 12; paths are absolute, so that it can lie anywhere."""
    import yaml

    from gradmatch.choosing.choose import HBAR_WEIGHT

    recipe: dict[str, Any] = {"base": _absolute(arguments["base"]), "method": "task_arithmetic"}
    if result.span == "preconditioned":
        recipe |= {"method": "gradient_matching", "options": {"hbar_weight": HBAR_WEIGHT}}
        recipe |= {name: arguments[name] for name in ("base_weight", "delta0") if name in arguments}
        h0 = arguments["base_curvature"]
        recipe["base_curvature"] = _absolute(h0) if isinstance(h0, str) else h0
    if arguments.get("align"):
        recipe["align"] = arguments["align"]
    recipe["tasks"] = []
    for name, task in tasks.items():
        entry = {"model": _absolute(task.model), "weight": round(result.weights[name], 6), "name": name}
        if result.span == "preconditioned":
            entry["curvature"] = _absolute(task.curvature)
        recipe["tasks"].append(entry)
    write_atomically(
        path, "# weights chosen by gradmatch forecast\n" + yaml.safe_dump(recipe, sort_keys=False)
    )
    print(f"written: {path}", file=sys.stderr)


def _absolute(path: Any) -> str:
    return str(Path(str(path)).absolute()) if Path(str(path)).exists() else str(path)


def describe(result: AutoWeights) -> list[str]:
    """The best weights, and every task's forecast there."""
    kind = {p.kind for p in result.products}
    seen = {p.examples_seen for p in result.products}
    lines = [
        f"best weights in the span of the {result.span} directions (curvature: {', '.join(sorted(kind))})"
    ]
    width = max(len(name) for name in result.weights)
    lines += [f"  {name:<{width}}  {weight:.3f}" for name, weight in result.weights.items()]
    lines.append(
        f"forecast rise of each task's loss there, nats per example ({min(seen)} or more examples seen)"
    )
    for p in result.products:
        lines.append(f"  {p.task:<{width}}  {result.best.rises[p.task] / p.num_examples:.4f}")
    if not result.best.trusted:
        lines.append(
            "? the best weights lie outside the region where the quadratic can hold: measure before you trust them"
        )
    if kind != {"ggn"}:
        lines.append(
            "note: without data the forecast rests on curvature files; diagonals come out far too small"
        )
    return lines


def front(products: list[Products], lower: float, upper: float) -> list[str]:
    """The Pareto front as a table: weights, then the rises they are forecast to cost."""
    from gradmatch.measure.forecast import pareto_front

    points: list[Any] = pareto_front(products, 11 if len(products) == 2 else 5, lower=lower, upper=upper)
    tasks = [p.task for p in products]
    lines = ["Pareto front: weights | forecast rises, nats per example of " + ", ".join(tasks)]
    for point in points:
        weights = "  ".join(f"{name} {c:.2f}" for name, c in point.coefficients.items())
        rises = "  ".join(f"{point.rises[p.task] / p.num_examples:.4f}" for p in products)
        lines.append(f"  {weights}  |  {rises}")
    return lines
