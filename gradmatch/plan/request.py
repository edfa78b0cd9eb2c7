"""What was asked for: method, options, transforms and policies, checked by themselves before any model is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradmatch.common.kinds import check_kind, leaves, plain
from gradmatch.common.names import nearest
from gradmatch.common.settings import numbers
from gradmatch.rules import RULES, Rule
from gradmatch.rules.edits import TRANSFORMS, check_options
from gradmatch.rules.removal import GUARDS
from gradmatch.rules.rowwise import ALONG

Edits = tuple[tuple[str, Mapping[str, Any]], ...]
DTYPES = ("float64", "float32", "float16", "bfloat16")  # of an output; eight bits would cut large weights off
REMOVALS = ("removal", "negation", "ewr", "fisher_negation")  # what takes a task away
POLICIES: dict[str, tuple[str, ...]] = {
    "missing": ("error", "base"),
    "missing_curvature": ("error", "zero"),
    "heads": ("error", "base", "keep-per-task"),
    "embeddings": ("error", "intersect", "union"),
    "batchnorm": ("error", "copy", "average", "recalibrate"),
    "precision": ("auto", "float32", "float64"),
    "rounding": ("nearest", "stochastic"),
    "verify": ("files", "reload"),
}


@dataclass(frozen=True)
class Request:
    """What was asked for, checked by itself; `plan` checks it against the models.

    Attributes:
        method: a name of RULES.
        base_weight: factor on the base's curvature.
        delta0: floor added to it, in nats per squared unit of weight.
        options: of the rule and its transforms.
        transforms: edits of the task vectors before the rule, by name or as {name: options}.
        dtype: of the output ("bfloat16", torch.bfloat16, ...); None: the base's own, tensor by tensor.
        seed: of random transforms and stochastic rounding.
        head_names: patterns of tensors that count as heads, beside those that differ.
        missing, missing_curvature, heads, embeddings, batchnorm, precision, rounding, verify: see POLICIES.
        shard_bytes: largest size of an output file.
        notes: to be kept with the plan and the report (a translated recipe's differences).
    """

    method: str = "gradient_matching"
    base_weight: float = 1.0
    delta0: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: str | Sequence[str | Mapping[str, Mapping[str, Any]]] = ()
    dtype: str | None = None
    seed: int = 0
    head_names: Sequence[str] = ()
    missing: str = "error"
    missing_curvature: str = "error"
    heads: str = "error"
    embeddings: str = "error"
    batchnorm: str = "error"
    precision: str = "auto"
    rounding: str = "nearest"
    verify: str = "files"
    shard_bytes: int = 5_000_000_000
    notes: Sequence[str] = ()

    @property
    def rule(self) -> Rule:
        """The rule by its name."""
        return RULES[self.method]

    @property
    def formula(self) -> str:
        """What is computed: the rule's formula, with the edits that come before it."""
        edits = [entry if isinstance(entry, str) else next(iter(entry)) for entry in self.transforms]
        return (
            f"{self.rule.formula}; tau edited before by {', then '.join(edits)}"
            if edits
            else self.rule.formula
        )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: an unknown method, option, transform or choice (the nearest is named), or a number out of range.
        """
        for name in ("options", "delta0", "base_weight"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if isinstance(self.transforms, str):
            object.__setattr__(self, "transforms", (self.transforms,))
        if self.method not in RULES:
            raise ValueError(
                f"unknown method {self.method!r}{nearest(self.method, RULES)}; known are {', '.join(RULES)}"
            )
        for policy, choices in POLICIES.items():
            chosen = getattr(self, policy)
            if chosen not in choices:
                raise ValueError(
                    f"{policy} is {chosen!r}{nearest(str(chosen), choices)}; choose one of {', '.join(choices)}"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {self.dtype!r}{nearest(str(self.dtype), DTYPES)}; choose one of {', '.join(DTYPES)}"
            )
        for name, value in (("delta0", self.delta0), ("base_weight", self.base_weight)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
        check_kind("seed", self.seed, 0)
        check_kind("shard_bytes", self.shard_bytes, 0)
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")
        resolve_options(self)


def resolve_options(request: Request) -> tuple[dict[str, Any], Edits]:
    """The rule's options and the chain of transforms with theirs, defaults filled in, not yet resolved per tensor.

    A flat option belongs to the rule where the rule has it, else to every transform of the chain that has it. TIES after a
    transform that drops entries does not trim again unless its own density is given.

    Raises:
        ValueError: an option or transform that nobody knows (the nearest is named), or a value out of range.
        TypeError: a transform that is neither a name nor {name: options}.
    """
    rule = request.rule
    chain: list[tuple[str, Mapping[str, Any]]] = []
    for entry in (*request.transforms, *rule.transforms):
        if isinstance(entry, str):
            chain.append((entry, {}))
        elif isinstance(entry, Mapping) and len(entry) == 1:
            chain.extend((name, own or {}) for name, own in entry.items())
        else:
            raise TypeError(f"a transform is a name or {{name: options}}, not {entry!r}")
    known = set(rule.options)
    for name, _ in chain:
        if name not in TRANSFORMS:
            raise ValueError(
                f"unknown transform {name!r}{nearest(name, TRANSFORMS)}; known are {', '.join(TRANSFORMS)}"
            )
        known |= set(TRANSFORMS[name].options)
    for option in request.options:
        if option not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(f"{request.method} has no option {option!r}{nearest(option, known)}; {takes}")
    rule_options = {name: request.options.get(name, default) for name, default in rule.options.items()}
    edits = []
    dropped = False
    for name, own in chain:
        transform = TRANSFORMS[name]
        for option in own:
            if option not in transform.options:
                raise ValueError(
                    f"{name} has no option {option!r}{nearest(option, transform.options)}; "
                    f"it takes {', '.join(transform.options)}"
                )
        flat = {
            key: value
            for key, value in request.options.items()
            if key in transform.options and key not in rule.options
        }
        defaults = {key: request.seed if key == "seed" else value for key, value in transform.options.items()}
        if "epsilon" in defaults:
            defaults["epsilon"] = None  # its default goes by the density: `given_or_widest`
        if name == "ties" and dropped:
            defaults["density"] = 1.0
            flat.pop("density", None)
        options = {**defaults, **flat, **own}
        check_options(name, options)
        edits.append((name, options))
        dropped = True
    _check_rule_options(request.method, rule_options)
    return rule_options, tuple(edits)


def _check_rule_options(method: str, options: Mapping[str, Any]) -> None:
    """Ranges of the rules' own options.

    Raises:
        ValueError: a value out of range.
    """
    for name, value in options.items():
        default = RULES[method].options[name]
        number = name == "hbar_weight" and value is not None  # a number where it is given
        check_kind(f"{method}: {name}", value, 1.0 if number else default)
    ranges = {
        "t": (0.0, 1.0),
        "keep": (0.0, 1.0),
        "off_diagonal": (0.0, 1.0),
        "ridge": (0.0, math.inf),
        "floor": (0.0, math.inf),
        "hbar_weight": (0.0, math.inf),
        "iterations": (1.0, math.inf),
        "tolerance": (0.0, math.inf),
    }
    for name, (low, high) in ranges.items():
        for value in numbers(options.get(name)):
            if not low <= value <= high or (name == "keep" and value == 0):
                bounds = f"({low:g}, {high:g}]" if name == "keep" else f"[{low:g}, {high:g}]"
                raise ValueError(f"{method}: {name} is {value:g}, it must lie in {bounds}")
    for name, choices in (("guard", GUARDS), ("along", ALONG)):
        for chosen in leaves(options.get(name, choices[0])):
            if chosen not in choices:
                raise ValueError(
                    f"{method}: {name} is {chosen!r}{nearest(str(chosen), choices)}; choose one of {', '.join(choices)}"
                )
