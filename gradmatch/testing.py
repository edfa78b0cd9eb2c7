"""`check_rule`: whether a merging rule of one's own keeps what rules promise, to be called from a test of your own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.api import merge
from gradmatch.estimators import check_estimator
from gradmatch.estimators.curvature import Curvature
from gradmatch.models.task import Task
from gradmatch.rules import RULES, Elementwise, Rule, Solve, Whole

__all__ = ["check_estimator", "check_rule"]

NAME = "the rule under test"
SHAPES = {
    "embed.weight": (11, 4),
    "layers.0.w": (4, 6),
    "layers.1.w": (6, 4),
    "norm.bias": (4,),
    "temperature": (),
}
INVARIANTS = {
    "single": "one model at weight 1 returns itself",
    "equal": "T equal models at weights 1/T return that model",
    "zero": "weights of 0 return the base",
    "order": "the order of the tasks plays no role",
}
CLOSE = 1e-9  # of float64 results that are equal on paper
ROUNDING = 1e-3  # of a float32 result, in the 2-norm
WEIGHTS = [0.5, 1.2, 0.3]
State = dict[str, Tensor]


def check_rule(rule: Rule, **options: Any) -> None:
    """Merge small random models by a rule, and check its promises.

    What it says of itself must be in order; the result must have the base's names, shapes and dtypes, be finite, be the same
    again, leave its inputs as they were and agree in float32 and float64; an elementwise rule must look at one coordinate
    alone; every invariant that `lacks` does not name must hold, and every one that it names must not; an `update` must turn with
    the task vectors, and be what the rule adds.

    Args:
        rule: a `gradmatch.Rule` of any kind.
        options: of the rule, for the merges.

    Raises:
        AssertionError: a promise that is not kept; the message says which.

    Example:
        >>> from gradmatch import Rule
        >>> check_rule(Rule("mean_t theta_t", "mine", linear=lambda alpha, gram, o: (0.0, [1 / len(alpha)] * len(alpha)),
        ...                 lacks={"zero": "weights play no role"}))
        >>> check_rule(Rule("mean_t theta_t", "mine", elementwise=lambda block: block.tau.mean(0)))
        Traceback (most recent call last):
        ...
        AssertionError: 'single' does not hold (one model at weight 1 returns itself): ...
    """
    _promise(isinstance(rule, Rule), f"a rule is a gradmatch.Rule, not {type(rule).__name__}")
    _promise(NAME not in RULES, "check_rule does not run inside itself")
    _check_declaration(rule)
    RULES[NAME] = rule
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = _problem(int(min(3, max(rule.models))), rule, options)
            _check_result(rule, problem)
            for invariant in INVARIANTS:
                _check_invariant(rule, problem, invariant)
            _check_turned(rule, problem, options)
    finally:
        del RULES[NAME]


@dataclass(frozen=True)
class _Problem:
    """A base, fine-tunes of it that have something in common, their curvatures, and what else `merge` is given."""

    base: State
    models: list[State]
    curvatures: list[Curvature | None]
    more: dict[str, Any]

    def merge(
        self, weights: Sequence[float], chosen: Sequence[int] | None = None, backwards: bool = False
    ) -> Any:
        """A merge by the rule under test; random draws go by the names of the tasks, not by their order."""
        tasks = [
            Task(self.models[t], self.curvatures[t], weight, f"t{name}")
            for name, (t, weight) in enumerate(zip(chosen or range(len(weights)), weights, strict=True))
        ]
        return merge(self.base, tasks[::-1] if backwards else tasks, method=NAME, **self.more)

    def of(self, part: Callable[[State], State]) -> _Problem:
        """The same problem with another part or precision of every model and curvature."""

        def curvature(whole: Curvature | None) -> Curvature | None:
            if whole is None:
                return None
            found = {name: whole.gradient(name) for name in whole}
            gradient = {name: value for name, value in found.items() if value is not None}
            mean = part({name: whole.mean(name) for name in whole})
            factors = [
                {
                    name: one.to(mean[name].dtype)
                    for name in mean
                    if (one := read(name)) is not None and mean[name].shape == whole.mean(name).shape
                }
                for read in (whole.factor_a, whole.factor_b)
            ]
            return Curvature.from_dict(
                mean, whole.num_examples, gradient=part(gradient) if gradient else None,
                factor_a=factors[0], factor_b=factors[1],
            )  # fmt: skip

        more = {
            key: curvature(value)
            if isinstance(value, Curvature)
            else part(value)
            if key == "anchor"
            else value
            for key, value in self.more.items()
        }
        return _Problem(
            part(self.base), [part(m) for m in self.models], [curvature(c) for c in self.curvatures], more
        )


def _problem(count: int, rule: Rule, options: Mapping[str, Any]) -> _Problem:
    """A random problem of so many tasks, in float64, with all that the rule needs."""
    base, shared = _normal(0, 1.0), _normal(1, 0.3)
    models = [
        {name: value + shared[name] + own[name] for name, value in base.items()}
        for own in (_normal(2 + t, 0.3) for t in range(count))
    ]
    curvatures = [_curvature(base, 100 + t, 10 * (t + 1), rule) if rule.needs else None for t in range(count)]
    prior = {"base_curvature": _curvature(base, 99, 50, rule)} if "base_curvature" in rule.needs else {}
    anchor = {"anchor": {name: base[name] + one for name, one in _normal(50, 0.3).items()}}
    return _Problem(
        base, models, curvatures, {**prior, **(anchor if "anchor" in rule.needs else {}), **options}
    )


def _normal(seed: int, scale: float) -> State:
    """Random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def _curvature(like: Mapping[str, Tensor], seed: int, num_examples: int, rule: Rule) -> Curvature:
    """A positive curvature, with gradients, Gram matrices and Kronecker factors where the rule needs them."""
    generator = torch.Generator().manual_seed(seed)

    def positive(shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) ** 3 + 1e-3

    def moments(width: int) -> Tensor:
        x = torch.randn(20, width, generator=generator, dtype=torch.float64)
        return x.T @ x / 20

    matrices = {
        name: value.shape for name, value in like.items() if value.dim() == 2 and isinstance(rule, Solve)
    }
    return Curvature.from_dict(
        {name: positive(value.shape) for name, value in like.items()},
        num_examples,
        gradient={name: positive(value.shape) - 0.5 for name, value in like.items()}
        if "gradient" in rule.needs
        else None,
        factor_a={name: moments(shape[1]) for name, shape in matrices.items()},
        factor_b={name: moments(shape[0]) for name, shape in matrices.items()}
        if "gram" not in rule.needs
        else None,
    )


def _promise(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def _check_declaration(rule: Rule) -> None:
    """What the rule says of itself."""
    _promise(bool(rule.told(rule.options)), "the rule has no formula; cards and plans show it")
    fewest, most = rule.models
    _promise(1 <= fewest <= most, f"models is {rule.models}; it must be (fewest, most) tasks, at least 1")
    for invariant, why in rule.lacks.items():
        _promise(bool(why), f"lacks[{invariant!r}] gives no reason")
    _promise(
        fewest == 1 or "single" in rule.lacks,
        f"the rule takes at least {fewest} models, so it lacks 'single': say lacks={{'single': 'it takes {fewest} models'}}",
    )
    other = getattr(rule, "otherwise", None)
    if other is not None:
        _promise(isinstance(other, Rule), f"otherwise is a {type(other).__name__}, not a gradmatch.Rule")
        more = ", ".join(sorted(other.needs - rule.needs))
        _promise(not more, f"otherwise needs {more}, which the rule itself does not say that it needs")


def _check_result(rule: Rule, problem: _Problem) -> None:
    """Names, shapes, dtypes, values, inputs; the same again, and in pieces, and in float32."""
    base, weights = problem.base, WEIGHTS[: len(problem.models)]
    before = problem.of(lambda state: {name: value.clone() for name, value in state.items()})
    try:
        found, again = problem.merge(weights), problem.merge(weights)
    except Exception as error:
        raise AssertionError(f"small models cannot be merged: {type(error).__name__}: {error}") from error
    for name, value in base.items():
        one = found[name]
        kept = one.shape == value.shape and one.dtype == value.dtype
        _promise(
            kept, f"{name!r} came out as {one.dtype} {list(one.shape)}, not {value.dtype} {list(value.shape)}"
        )
        _promise(torch.equal(one, again[name]), f"{name!r} is another one at every call; draw from a seed")
    pairs = zip((base, *problem.models), (before.base, *before.models), strict=True)
    same = all(torch.equal(now[name], then[name]) for now, then in pairs for name in base)
    _promise(same, "the models were changed; work on copies")
    if isinstance(rule, Elementwise) and not rule.transforms:
        name, few = "layers.0.w", 5
        alone = problem.of(lambda state: {name: state[name].flatten()[:few].clone()}).merge(weights)
        _promise(
            torch.allclose(alone[name], found[name].flatten()[:few], rtol=CLOSE, atol=CLOSE),
            "an elementwise rule must look at one coordinate alone, and this one depends on others: make it a whole rule",
        )
    if "gram" not in rule.needs:  # which is float64 whatever the models are
        single = problem.of(lambda state: {name: value.float() for name, value in state.items()}).merge(
            weights
        )
        apart = sum(float((single[name].double() - found[name]).square().sum()) for name in base) ** 0.5
        size = sum(float(value.square().sum()) for value in found.values()) ** 0.5
        _promise(apart <= ROUNDING * size, f"float32 and float64 differ by {apart / size:.2g} of the result")


def _check_invariant(rule: Rule, problem: _Problem, invariant: str) -> None:
    """One invariant, from both sides."""
    if invariant == "single" and rule.models[0] > 1:
        return
    what, base, count = INVARIANTS[invariant], problem.base, len(problem.models)
    weights = WEIGHTS[:count]
    cases: dict[str, Callable[[], tuple[Any, Any]]] = {
        "single": lambda: (problem.merge([1.0]), problem.models[0]),
        "equal": lambda: (problem.merge([1 / count] * count, [0] * count), problem.models[0]),
        "zero": lambda: (problem.merge([0.0] * count), base),
        "order": lambda: (problem.merge(weights), problem.merge(weights, backwards=True)),
    }
    try:
        found, wanted = cases[invariant]()
    except ValueError as error:  # weights of 0 that cannot be normalised
        said = f"{invariant!r} cannot be had ({what}): {error}; say so in lacks={{{invariant!r}: ...}}"
        _promise(invariant in rule.lacks, said)
        return
    apart = {name: float((found[name] - wanted[name]).abs().max()) for name in base}
    worst = max(apart, key=lambda name: apart[name])
    close = all(torch.allclose(found[name], wanted[name], rtol=CLOSE, atol=CLOSE) for name in base)
    _promise(
        close or invariant in rule.lacks,
        f"{invariant!r} does not hold ({what}): {worst!r} is off by {apart[worst]:.2g}; mend the rule, or say why in "
        f"lacks={{{invariant!r}: ...}}",
    )
    _promise(
        not close or invariant not in rule.lacks,
        f"lacks names {invariant!r}, but it holds ({what}): leave it out",
    )


def _check_turned(rule: Rule, problem: _Problem, options: Mapping[str, Any]) -> None:
    """The update of a rule that merges cores of adapters: Q tau_t R must give Q update R."""
    if not isinstance(rule, Whole) or rule.update is None:
        return
    name, weights = "layers.0.w", WEIGHTS[: len(problem.models)]
    theta0, own = problem.base[name], rule.options.changed(NAME, options)
    tau = torch.stack([model[name] - theta0 for model in problem.models])
    rank = min(theta0.shape)
    update = rule.update(tau, weights, own, rank)
    whole = rule.whole(theta0, tau, weights, own)
    _promise(
        torch.allclose(theta0 + update, whole, rtol=CLOSE, atol=CLOSE),
        "update is not what the rule adds to theta0",
    )
    square = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=tau.dtype)
    q, r = (torch.linalg.qr(one[:side, :side])[0] for one, side in zip(square, theta0.shape, strict=True))
    turned = rule.update(q @ tau @ r, weights, own, rank)
    _promise(
        torch.allclose(turned, q @ update @ r, rtol=CLOSE, atol=CLOSE),
        "update does not turn with its task vectors, so that cores are no matter for it: leave update out",
    )
