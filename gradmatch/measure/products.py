"""Measure, store and read what forecasts are made of: U'g_t and U'H_t U for a few directions U.

Three sources of H_t: exact GGN products by forward-mode derivatives on data; Kronecker factors from a curvature file; the
diagonal of a curvature file. Only the first should be trusted to forecast losses: a diagonal drops every cross term of
dense, aligned task vectors and comes out orders of magnitude too small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.common.layers import layer_group
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import write_atomically
from gradmatch.measure.forecast import Array, Products
from gradmatch.models.curvatures import Prior

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from gradmatch.estimators.curvature import Curvature
    from gradmatch.measure.objective import Objective

FORMAT_VERSION = 1
Vector = Mapping[str, "Tensor"]


def task_vector(base: Vector, model: Vector) -> dict[str, Tensor]:
    """tau_t = theta_t - theta0 over the floating tensors that both hold, in float32 or more."""
    import torch

    tau = {}
    for name in model:
        theta = model[name]
        if name in base and theta.is_floating_point() and theta.shape == base[name].shape:
            wide = torch.promote_types(theta.dtype, torch.float32)
            tau[name] = theta.to(wide) - base[name].to(wide)
    return tau


def preconditioned_vectors(
    taus: Mapping[str, Vector],
    curvatures: Mapping[str, Curvature],
    base_curvature: Curvature | float,
    alpha: Mapping[str, float],
    *,
    base_weight: float = 1.0,
    delta0: float = 1e-6,
) -> dict[str, dict[str, Tensor]]:
    """Every task's term of Eq. 12, by task: theta0 + sum_t c_t of these is the gradient-matched merge at c = alpha.

    Raises:
        ValueError: a task without curvature, or delta0 <= 0.
    """
    if delta0 <= 0:
        raise GradmatchError(
            f"delta0 must be positive, got {delta0}: it is the fallback where nothing is known",
            "out_of_range",
            "delta0",
        )
    missing = [task for task in taus if task not in curvatures]
    if missing:
        raise GradmatchError(
            f"task {missing[0]!r} has no curvature; the preconditioned span needs one for every task",
            "bad_products",
            missing[0],
        )
    import torch

    prior = Prior.of(base_curvature, base_weight, delta0)
    result: dict[str, dict[str, Tensor]] = {task: {} for task in taus}
    for name in next(iter(taus.values())):
        known = all(name in curvatures[task] for task in taus)
        base_known = isinstance(base_curvature, int | float) or name in base_curvature
        if not (known and base_known):
            for task, tau in taus.items():
                result[task][name] = tau[name]
            continue
        h = {task: curvatures[task].total(name) for task in taus}
        if isinstance(base_curvature, int | float):
            h0 = torch.full_like(next(iter(h.values())), prior.number)
        else:
            h0 = prior.at(base_curvature.mean(name))
        h_bar = h0 + sum(alpha[task] * value for task, value in h.items())
        for task, tau in taus.items():
            result[task][name] = (h0 + h[task]) * tau[name] / h_bar
    return result


def split_by_group(vector: Vector, groups: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """A vector cut into its parts on layer groups: "group" -> part. The last, "rest", holds what no group names."""
    parts: dict[str, dict[str, Tensor]] = {group: {} for group in (*groups, "rest")}
    for name, value in vector.items():
        group = layer_group(name)
        parts[group if group in parts else "rest"][name] = value
    return {group: part for group, part in parts.items() if part}


def dot(u: Vector, v: Vector) -> float:
    """u'v over the names that both hold, in float64."""
    return sum(
        float(value.double().flatten() @ v[name].double().flatten()) for name, value in u.items() if name in v
    )


def measure_products(
    task: str,
    objective: Objective,
    weights: Vector,
    directions: Mapping[str, Vector],
    position: Mapping[str, float],
    *,
    gradient: Vector | None = None,
) -> Products:
    """Exact products of one task on data: K forward-mode derivatives over its batches, and one backward pass.

    Args:
        task: its name.
        objective: its loss on its data.
        weights: theta_t, the point of expansion.
        directions: K vectors, by name.
        position: coordinates of theta_t over the directions (absent ones are 0).
        gradient: grad l_t(theta_t) of the summed loss where it is stored; else it is measured.
    """
    gradient = objective.gradient(weights) if gradient is None else gradient
    curvature = objective.ggn_products(weights, list(directions.values()))
    return Products(
        task=task,
        directions=tuple(directions),
        position=_coordinates(directions, position),
        slope=np.array([dot(u, gradient) for u in directions.values()]),
        curvature=curvature.numpy(),
        loss=objective.loss(weights),
        num_examples=objective.num_examples,
        examples_seen=objective.seen,
        kind="ggn",
        limit=objective.uniform_loss(),
    )


def curvature_products(
    task: str,
    curvature: Curvature,
    directions: Mapping[str, Vector],
    position: Mapping[str, float],
    *,
    gradient: Vector | None = None,
) -> Products:
    """Products from a curvature file alone: Kronecker factors where it holds them, its diagonal elsewhere.

    Without a measured gradient the slope is taken as 0 (theta_t a minimum).
    """
    vectors = list(directions.values())
    k = len(vectors)
    total = np.zeros((k, k))
    kronecker = False
    for name in curvature:
        rows = [i for i, u in enumerate(vectors) if name in u]
        if not rows:
            continue
        factors = kronecker_factors(curvature, name)
        kronecker = kronecker or factors is not None
        applied = {
            i: diagonal_times(curvature.total(name), vectors[i][name])
            if factors is None
            else kronecker_times(*factors, vectors[i][name], curvature.num_examples)
            for i in rows
        }
        for i in rows:
            for j in rows:
                total[i, j] += float((vectors[i][name].double() * applied[j].double()).sum())
    if gradient is None and curvature.has_gradient:
        gradient = stored_gradient(curvature)
    return Products(
        task=task,
        directions=tuple(directions),
        position=_coordinates(directions, position),
        slope=np.zeros(k) if gradient is None else np.array([dot(u, gradient) for u in vectors]),
        curvature=(total + total.T) / 2,
        num_examples=curvature.num_examples,
        examples_seen=int(curvature.info.get("examples_seen", "0") or 0),
        kind="kronecker" if kronecker else "diagonal",
    )


def diagonal_times(h: Tensor, u: Tensor) -> Tensor:
    """H u for a diagonal H of the summed loss. (*s,), (*s,) -> (*s,)."""
    return h.to(u) * u


def kronecker_times(factor_a: Tensor, factor_b: Tensor, u: Tensor, num_examples: int) -> Tensor:
    """N B u A: the curvature N (A (x) B) of a linear layer's weight times u.

    factor_a: (in, in) mean of x x'; factor_b: (out, out) mean of g g'; u: (out, in), or (in, out) as Conv1D stores it.
    """
    a, b = factor_a.to(u), factor_b.to(u)
    if u.shape == (b.shape[0], a.shape[0]):
        return num_examples * (b @ u @ a)
    return num_examples * (a @ u @ b)


def kronecker_factors(curvature: Curvature, name: str) -> tuple[Tensor, Tensor] | None:
    """The per-example factors (A, B) of a matrix where the file holds both and they fit its shape; else None."""
    a, b = curvature.factor_a(name), curvature.factor_b(name)
    if a is None or b is None:
        return None
    shape = curvature.mean(name).shape
    fits = shape in ((len(b), len(a)), (len(a), len(b)))
    return (a, b) if fits else None


def stored_gradient(curvature: Curvature) -> dict[str, Tensor]:
    """grad l_t(theta_t) of the summed loss by name, as far as the curvature carries it."""
    found = {name: curvature.gradient(name) for name in curvature}
    return {name: value for name, value in found.items() if value is not None}


def save_products(
    products: Sequence[Products],
    path: str | os.PathLike[str],
    fingerprints: Mapping[str, str] | None = None,
    settings: Mapping[str, float] | None = None,
) -> None:
    """Write products as JSON, small and readable, to keep beside the curvature files.

    Args:
        products: to write.
        path: the file; replaced whole.
        fingerprints: model name ("base" or task) -> fingerprint of its weights, checked by `load_products`.
        settings: numbers that the directions depend on, such as the delta0 of preconditioned ones; checked as well.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "what": "slopes U'g_t and products U'H_t U of the summed losses, in nats",
        "fingerprints": dict(fingerprints or {}),
        "settings": dict(settings or {}),
        "products": [
            {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(p).items()}
            | {"loss": None if math.isnan(p.loss) else p.loss}
            for p in products
        ],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load_products(
    path: str | os.PathLike[str],
    fingerprints: Mapping[str, str] | None = None,
    settings: Mapping[str, float] | None = None,
) -> list[Products]:
    """Read what `save_products` wrote.

    Args:
        path: the file.
        fingerprints: model name -> fingerprint of the models at hand; a stored one that differs is refused.
        settings: what the directions at hand depend on; a stored number that differs is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no products file, another format version, or products of other weights or settings.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no products file {path}; `gradmatch forecast --data ... --save {path}` writes one"
        )
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version, rows = content["format_version"], content["products"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise GradmatchError(
            f"{path} is no products file ({type(error).__name__}: {error})", "unreadable_file", path
        ) from error
    if version != FORMAT_VERSION:
        raise GradmatchError(
            f"{path}: format version {version}, this library reads {FORMAT_VERSION}", "unreadable_file", path
        )
    for name, found in (fingerprints or {}).items():
        stored = content["fingerprints"].get(name)
        if stored is not None and stored != found:
            raise GradmatchError(
                f"{path} was measured at other weights of {name!r} (fingerprint {stored[:12]} against {found[:12]}); measure again",
                "other_weights",
                path,
            )
    for name, value in (settings or {}).items():
        stored_value = content.get("settings", {}).get(name)
        if stored_value is not None and stored_value != value:
            raise GradmatchError(
                f"{path} was measured with {name} = {stored_value:g}, this is with {value:g}; measure again",
                "bad_products",
                path,
            )
    arrays = ("position", "slope", "curvature")
    return [
        Products(
            **row
            | {
                "directions": tuple(row["directions"]),
                "loss": math.nan if row["loss"] is None else row["loss"],
            }
            | {name: np.array(row[name], dtype=np.float64) for name in arrays}
        )
        for row in rows
    ]


def _coordinates(directions: Mapping[str, Vector], position: Mapping[str, float]) -> Array:
    return np.array([position.get(name, 0.0) for name in directions], dtype=np.float64)
