"""The card of a merged folder: README.md for people, gradmatch.json for programs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.models.reference import hub_id, published

if TYPE_CHECKING:
    from gradmatch.output.report import Report
    from gradmatch.plan.step import Plan

LIBRARIES = ("gradmatch", "torch", "safetensors", "numpy")
CARD = "gradmatch.json"


def card_files(made: Plan, report: Report) -> dict[str, bytes]:
    """Name -> content of the card's files, and of the heads kept per task."""
    content = public(
        {
            "recipe": recipe(made),
            "inputs": input_fingerprints(made),
            **stated(made),
            "report": report.to_dict(),
            "versions": versions(),
        }
    )
    files = {CARD: _json(content), "README.md": readme(content).encode()}
    for task, tensors in report.heads.items():
        from safetensors.torch import save

        files[f"heads/{task}.safetensors"] = save(
            {name: value.contiguous() for name, value in tensors.items()}
        )
    return files


def recipe(made: Plan) -> dict[str, Any]:
    """The merge as its recipe would spell it, defaults included."""
    request, inputs = made.request, made.inputs
    options, transforms, after = used_options(made)
    return {
        "base": "+".join(inputs.base.names),
        "method": request.method,
        "formula": made.formula,
        "source": request.rule.source,
        "base_curvature": _where(inputs.base_curvature),
        **({"anchor": "+".join(inputs.anchor.names)} if inputs.anchor else {}),
        "base_weight": request.base_weight,
        "delta0": request.delta0,
        "options": options,
        "transforms": transforms,
        "after": after,
        "space": request.space,
        "rank": request.rank,
        "dtype": request.dtype or "the base's",
        "seed": request.seed,
        "tasks": [
            {
                "name": task.name,
                "model": "+".join(task.checkpoint.names),
                "weight": task.weight,
                "curvature": _where(task.curvature),
                "num_examples": task.curvature.num_examples if task.curvature else None,
            }
            for task in inputs.tasks
        ],
        "policies": {
            key: getattr(request, key)
            for key in ("heads", "embeddings", "missing", "missing_curvature", "batchnorm")
        },
        "arithmetic": sorted({step.compute for step in made.steps}),
    }


def used_options(made: Plan) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The options of the rule that was asked for, the transforms and the edits after it, as the first tensor that it merges has them."""
    request = made.request
    first = next((step for step in made.merged if step.rule is request.rule), None)
    options, edits, after = request.rule_options, request.edits, request.after_edits
    if first:
        options, edits, after = first.options, first.edits, first.after
    edited, behind = ([{name: dict(own)} for name, own in chain] for chain in (edits, after))
    return dict(options), edited, behind


def input_fingerprints(made: Plan) -> dict[str, str]:
    """Fingerprint of every model by its role (see `gradmatch.estimators.fingerprint.fingerprint`)."""
    models = {
        "base": made.inputs.base,
        **{f"task {task.name}": task.checkpoint for task in made.inputs.tasks},
    }
    return {role: fingerprint(list(model.original), model.original.sample) for role, model in models.items()}


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of what computed it."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed as a package"
    return found


def readme(content: Mapping[str, Any]) -> str:
    """The card for people, in the hub's format."""
    made, report = content["recipe"], content["report"]
    what = "adapter" if made["space"] == "core" else "model"
    licences, datasets = content.get("licences", {}), content.get("datasets", [])
    lines = ["---", front_matter(made, licences, datasets), "---", "", f"# Merged {what}", ""]
    lines += [f"`{made['method']}` ({made['source']}): {made['formula']}", ""]
    lines += [f"Base: `{made['base']}`", "", "| task | weight | model | curvature (N) |", "|---|---|---|---|"]
    for task in made["tasks"]:
        known = f"{task['curvature']} ({task['num_examples']})" if task["curvature"] else "none"
        lines.append(f"| {task['name']} | {task['weight']} | `{task['model']}` | {known} |")
    lines += ["", "## Health", ""]
    for label, key in (
        ("weights merged", "weights"), ("share that the floor delta0 decides", "floor_share"), ("share clamped", "clamped_share"),
        ("share in sign conflict", "sign_conflict_share"), ("share of the update that rounding kept", "kept_update"),
    ):  # fmt: skip
        if report[key] is not None:
            lines.append(f"- {label}: {report[key]:.6g}")
    lines += [f"- {report['solved']}"] if report.get("solved") else []
    lines += [f"- {branch}: {count} tensors" for branch, count in report["branches"].items()]
    lines += [f"- {note}" for note in report["notes"]]
    if len(set(licences.values())) > 1:
        told = ", ".join(f"{role}: {licence}" for role, licence in licences.items())
        lines.append(
            f"- the inputs' licences differ ({told}), so that none is stated: choose one that all of them allow"
        )
    lines += removal_lines(report.get("removed") or {})
    lines += ["", "## Recipe", "", "```json", json.dumps(made, indent=2, default=str), "```", ""]
    lines += [
        "Made with "
        + ", ".join(f"{library} {found}" for library, found in content["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def removal_lines(removed: Mapping[str, Any]) -> list[str]:
    """What was taken away, and at what cost; nothing where nothing was."""
    if not removed:
        return []
    lines = ["", "## Removed", "", f"{', '.join(removed['removed'])}, with weight {removed['weight']:g}."]
    measured = removed["measured"]
    if not measured:
        return [
            *lines,
            "What it costs was not measured when it was written (`gradmatch budget` measures it).",
        ]
    return [*lines, "", *(f"- {what}: {told}" for what, told in measured.items())]


def stated(made: Plan) -> dict[str, Any]:
    """What the inputs' own cards say: by role the licence, and all data sets; empty where they say nothing."""
    import yaml
    from huggingface_hub import ModelCard

    licences, datasets = {}, []
    models = {
        "base": made.inputs.base,
        **{f"task {task.name}": task.checkpoint for task in made.inputs.tasks},
    }
    for role, model in models.items():
        card = model.path / "README.md" if model.path is not None else None
        if card is None or not card.is_file():
            continue
        try:
            told = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        except (ValueError, OSError, yaml.YAMLError):  # a README that is no card
            continue
        if isinstance(told.get("license"), str):
            licences[role] = told["license"]
        found = told.get("datasets") or []
        datasets += [found] if isinstance(found, str) else list(found)
    kept = {"licences": licences, "datasets": list(dict.fromkeys(map(str, datasets)))}
    return {name: value for name, value in kept.items() if value}


def front_matter(
    made: Mapping[str, Any], licences: Mapping[str, str] | None = None, datasets: Sequence[str] = ()
) -> str:
    """The card's head in YAML, by which the hub knows what was merged: every model that has a hub id, of an adapter its base.

    A licence is stated where all inputs that state one state the same; their data sets are put together.
    """
    from huggingface_hub import ModelCardData

    core = made["space"] == "core"
    named = [
        name
        for model in (made, *(() if core else made["tasks"]))
        for name in (model.get("base") or model["model"]).split("+")
    ]
    models = list(dict.fromkeys(filter(None, map(hub_id, named)))) or None
    library, tags = ("peft", ["lora"]) if core else ("transformers", [])
    data = ModelCardData(library_name=library, tags=["merge", "gradmatch", *tags], base_model=models)
    if models:
        data["base_model_relation"] = "adapter" if core else "merge"
    if len(set((licences or {}).values())) == 1:
        data["license"] = next(iter((licences or {}).values()))
    if datasets:
        data["datasets"] = list(datasets)
    return str(data.to_yaml()).strip()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, default=str, allow_nan=False) + "\n").encode()


def public(content: Any) -> Any:
    """The content with null for numbers that JSON has no spelling for (a weight without a limit), and no path of this machine."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, (str, os.PathLike)):
        path = Path(content)
        return published(path) if path.is_absolute() and path.exists() else str(content)
    if isinstance(content, Mapping):
        return {key: public(value) for key, value in content.items()}
    return [public(value) for value in content] if isinstance(content, (list, tuple)) else content


def _where(curvature: Any) -> Any:
    if curvature is None or isinstance(curvature, float):
        return curvature
    return published(Path(curvature.path)) if curvature.path else "in memory"
