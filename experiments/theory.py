"""Stages: the paper's equations where they can be computed exactly, on convex problems in float64 (claims 1-4 and 10).

Numbers of equations as in Daheim et al. 2024. Each stage writes `out/claim.json`: threshold, measured values, verdict.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.convex import Objective, World, finetuned, ridge_world, sampled_fisher, softmax_world
from experiments.files import write_json
from experiments.statistics import wilson
from gradmatch import Task, merge
from gradmatch.estimators import Curvature

TOLD = {  # claim -> statement, threshold
    1: (
        "exact on ridge regression: distance to the joint solution / its distance to theta0",
        "GM <= 1e-9, TA and FA >= 1e-2",
    ),
    2: ("the mismatch is the error of AM (Eq. 6) and TA (Eq. 10): relative difference", "<= 1e-8"),
    3: ("special cases of Eq. 12: relative difference, largest", "<= 1e-12"),
    4: ("GM nearer to the joint model than TA on softmax regression, alpha = 1", "in >= 95 % of seeds"),
    10: (
        "Newton steps from the diagonal-Fisher merge: distance to theta* / first distance (convex part)",
        "<= 1e-3 after three steps in every seed, shrinking at each step",
    ),
}


def gradient_matching_full(world: World, alpha: Tensor, hessians: Tensor, h0: Tensor) -> Tensor:
    """theta0 + Hbar^-1 sum_t alpha_t (H0 + H_t) tau_t, Hbar = H0 + sum_t alpha_t H_t (Eq. 12 with whole matrices)."""
    h_bar = h0 + torch.einsum("t,tij->ij", alpha, hessians)
    return world.theta0 + torch.linalg.solve(
        h_bar, torch.einsum("t,tij,tj->i", alpha, h0 + hessians, world.tau)
    )


def fisher_average_full(world: World, alpha: Tensor, hessians: Tensor) -> Tensor:
    """FA: (sum_t alpha_t H_t)^-1 sum_t alpha_t H_t theta_t, with whole matrices."""
    weighted = torch.einsum("t,tij->ij", alpha, hessians)
    return torch.linalg.solve(weighted, torch.einsum("t,tij,tj->i", alpha, hessians, world.thetas))


def exactness(out: Path, *, seeds: Sequence[int]) -> None:
    """Claim 1: on ridge regression Eq. 12 is the joint solution, TA and FA are not."""
    ours, arithmetic, fisher = [], [], []
    for seed in seeds:
        world = ridge_world(seed)
        alpha = 2 * torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target, hessians = world.target(alpha), world.hessians()
        size = (target - world.theta0).norm()
        ours.append(float((gradient_matching_full(world, alpha, hessians, world.h0) - target).norm() / size))
        arithmetic.append(float((world.arithmetic(alpha) - target).norm() / size))
        fisher.append(float((fisher_average_full(world, alpha, hessians) - target).norm() / size))
    value = {"GM, largest": max(ours), "TA, smallest": min(arithmetic), "FA, smallest": min(fisher)}
    passed = max(ours) <= 1e-9 and min(arithmetic + fisher) >= 1e-2
    _write(out, 1, value, len(seeds), passed)


def identities(out: Path, *, seeds: Sequence[int]) -> None:
    """Claim 2: Eqs. 6 and 10 hold on softmax regression, which is not quadratic."""
    sixth, tenth = [], []
    for seed in seeds:
        world = softmax_world(seed, diagonal=False)
        alpha = 2 * torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = world.target(alpha)
        error = target - world.arithmetic(alpha)
        predicted = -torch.linalg.solve(world.h0, mismatch(world, alpha, target))
        tenth.append(float((error - predicted).norm() / error.norm()))
        toy = finetuned(
            0 * world.theta0, torch.eye(len(world.theta0), dtype=torch.float64), world.losses, world.data
        )
        target = toy.target(alpha)
        error = target - alpha @ toy.thetas
        sixth.append(float((error + mismatch(toy, alpha, target)).norm() / error.norm()))
    value = {"Eq. 6, largest": max(sixth), "Eq. 10, largest": max(tenth)}
    passed = max(sixth + tenth) <= 1e-8
    _write(out, 2, value, len(seeds), passed)


def mismatch(world: World, alpha: Tensor, theta: Tensor) -> Tensor:
    """sum_t alpha_t [grad l_t(theta) - grad l_t(theta_t)]."""
    return torch.stack(
        [
            a * (loss.gradient(theta) - loss.gradient(own))
            for a, loss, own in zip(alpha, world.losses, world.thetas, strict=True)
        ]
    ).sum(0)


def special_cases(out: Path, *, seeds: Sequence[int]) -> None:
    """Claim 3: Eq. 12 contains TA, FA, AM, and is the MAP of Eq. 17; with zero curvature and a floor it is TA."""
    gaps: dict[str, float] = {}
    for seed in seeds:
        world = ridge_world(seed)
        tasks, features = world.thetas.shape
        generator = torch.Generator().manual_seed(seed)
        alpha = 2 * torch.rand(tasks, generator=generator, dtype=torch.float64)
        diagonal = torch.rand(tasks, features, generator=generator, dtype=torch.float64) + 0.1
        h0 = torch.rand(features, generator=generator, dtype=torch.float64) + 0.1
        zero = torch.zeros_like(diagonal)
        cases = {
            "H_t = 0 is TA": (_merged(world, alpha, zero, h0, 0.0), world.arithmetic(alpha)),
            "zero curvature is TA": (_merged(world, alpha, zero, 0 * h0, 1e-6), world.arithmetic(alpha)),
            "H0 -> 0 is FA": (
                _merged(world, alpha, diagonal, 0 * h0, 1e-14),
                (alpha[:, None] * diagonal * world.thetas).sum(0) / (alpha[:, None] * diagonal).sum(0),
            ),
            "alpha = 1/T, H_t = 0 is AM": (
                _merged(world, 0 * alpha + 1 / tasks, zero, h0, 0.0),
                world.thetas.mean(0),
            ),
            "MAP of Eq. 17": (
                gradient_matching_full(world, alpha, world.hessians(), world.h0),
                gaussian_product(world, alpha, world.hessians()),
            ),
        }
        for name, (found, expected) in cases.items():
            gaps[name] = max(gaps.get(name, 0.0), float((found - expected).norm() / expected.norm()))
    _write(out, 3, gaps, len(seeds), max(gaps.values()) <= 1e-12)


def gaussian_product(world: World, alpha: Tensor, hessians: Tensor) -> Tensor:
    """Mean of p0 prod_t (q_t / p0)^alpha_t, p0 = N(theta0, H0^-1), q_t = N(theta_t, (H0 + H_t)^-1) (Eqs. 15-17).

    Precisions and precision-weighted means of Gaussians add up, with the powers as their weights.
    """
    precision = world.h0 * (1 - alpha.sum()) + torch.einsum("t,tij->ij", alpha, world.h0 + hessians)
    weighted = (1 - alpha.sum()) * world.h0 @ world.theta0
    weighted = weighted + torch.einsum("t,tij,tj->i", alpha, world.h0 + hessians, world.thetas)
    return torch.linalg.solve(precision, weighted)


def _merged(world: World, alpha: Tensor, diagonal: Tensor, h0: Tensor, delta0: float) -> Tensor:
    """`gradmatch.merge` by diagonal curvatures of summed losses: diagonal (T, p), h0 (p,)."""
    tasks = [
        Task({"w": theta}, Curvature.from_dict({"w": h}, 1), float(a))
        for theta, h, a in zip(world.thetas, diagonal, alpha, strict=True)
    ]
    base = Curvature.from_dict({"w": h0}, 1)
    return merge({"w": world.theta0}, tasks, base_curvature=base, delta0=delta0)["w"]  # type: ignore[no-any-return]


def closer(out: Path, *, seeds: Sequence[int]) -> None:
    """Claim 4: with the diagonal Monte-Carlo Fisher, GM is nearer to the joint model than TA, at alpha = 1."""
    ratios = []
    for seed in seeds:
        world, merged = _fisher_merge(seed)
        target = world.target(torch.ones(3, dtype=torch.float64))
        arithmetic = world.arithmetic(torch.ones(3, dtype=torch.float64))
        ratios.append(float((merged - target).norm() / (arithmetic - target).norm()))
    nearer = sum(ratio < 1 for ratio in ratios)
    share, (low, high) = nearer / len(ratios), wilson(nearer, len(ratios))
    value = {"share of seeds": share, "interval low": low, "interval high": high}
    value["median ratio of distances"] = sorted(ratios)[len(ratios) // 2]
    _write(out, 4, value, len(seeds), share >= 0.95)


def _fisher_merge(seed: int) -> tuple[World, Tensor]:
    """A softmax world and its merge by sampled diagonal Fishers."""
    world = softmax_world(seed, diagonal=True)
    fishers = [
        sampled_fisher(data, theta, 3, seed + 1000 * index).total("weight").double().flatten()
        for index, (data, theta) in enumerate(zip(world.data[1:], world.thetas, strict=True), start=1)
    ]
    return world, _merged(
        world, torch.ones(3, dtype=torch.float64), torch.stack(fishers), world.h0.diagonal(), 0.0
    )


def refinement(out: Path, *, seeds: Sequence[int]) -> None:
    """Claim 10, convex part: Newton steps on Eq. 9 lead from the merge to theta*, and never raise the objective."""
    paths, rises = [], 0
    alpha = torch.ones(3, dtype=torch.float64)
    for seed in seeds:
        world, theta = _fisher_merge(seed)
        loss, target = Objective(world.losses, alpha, world.theta0, world.h0), world.target(alpha)
        distances, values = [float((theta - target).norm())], [float(loss.value(theta))]
        for _ in range(4):
            theta = loss.refined(theta)
            distances.append(float((theta - target).norm()))
            values.append(float(loss.value(theta)))
        paths.append([distance / distances[0] for distance in distances])
        rises += any(after > before + 1e-9 * abs(before) for before, after in itertools.pairwise(values))
    third, fourth = ([path[step] for path in paths] for step in (3, 4))
    shrinking = sum(all(after < before for before, after in itertools.pairwise(path[:4])) for path in paths)
    value = {
        "after three steps, median": statistics.median(third),
        "after three steps, largest": max(third),
        "share of seeds <= 1e-3": sum(left <= 1e-3 for left in third) / len(third),
        "after four steps, largest": max(fourth),
        "share that shrinks at each step": shrinking / len(paths),
        "seeds whose objective rose": rises,
    }
    _write(out, 10, value, len(seeds), max(third) <= 1e-3 and shrinking == len(paths) and not rises)


def _write(out: Path, number: int, value: dict[str, float], seeds: int, passed: bool) -> None:
    statement, threshold = TOLD[number]
    card = {"claim": number, "statement": statement, "threshold": threshold, "value": value, "seeds": seeds}
    write_json(out / "claim.json", {**card, "holds": bool(passed)})
