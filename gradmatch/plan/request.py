"""What was asked for: method, options, transforms and policies, checked by themselves before any model is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradmatch.common.devices import check_device
from gradmatch.common.kinds import check_kind, plain
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose, nearest
from gradmatch.rules import Options, Rule, find_rule
from gradmatch.rules.after import AFTER
from gradmatch.rules.core import check_core
from gradmatch.rules.edits import TRANSFORMS
from gradmatch.rules.options import takes

Edits = tuple[tuple[str, Options], ...]
DTYPES = ("float64", "float32", "float16", "bfloat16")  # of an output; eight bits would cut large weights off
POLICIES: dict[str, tuple[str, ...]] = {
    "space": ("weights", "core"),
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
        method: a name of RULES, "package.module:NAME" of a rule of one's own, or the name that an installed package gives one.
        base_weight: factor on the base's curvature.
        delta0: floor added to it, in nats per squared unit of weight.
        options: of the rule and its transforms.
        transforms: edits of the task vectors before the rule, by name or as {name: options}.
        after: edits of the merged update behind the rule, in the same form.
        space: what is merged: "weights"; or "core", the factors of LoRA adapters, which gives an adapter again.
        rank: space="core": the largest rank of the output's factors; None: what the update needs, at most the sum of all.
        dtype: of the output ("bfloat16", torch.bfloat16, ...); None: the base's own, tensor by tensor.
        seed: of random transforms and stochastic rounding.
        head_names: patterns of tensors that count as heads, beside those that differ.
        missing, missing_curvature, heads, embeddings, batchnorm, precision, rounding, verify: see POLICIES.
        tokenizer: whose the output has, with its ids and rows: "base" or a task's name; empty: as `embeddings` says.
        chat_template: of the output: "auto" (that of most models), "chatml", or the template itself; empty: the base's.
        shard_bytes: largest size of an output file.
        device: where the arithmetic runs, by torch's name: "cpu", "cuda", "cuda:1". Models are read piece by piece on the CPU,
            which also draws what is random, and the result is on the CPU.
        notes: to be kept with the plan and the report (a translated recipe's differences).
    """

    method: str = "gradient_matching"
    base_weight: float = 1.0
    delta0: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: str | Sequence[str | Mapping[str, Mapping[str, Any]]] = ()
    after: str | Sequence[str | Mapping[str, Mapping[str, Any]]] = ()
    space: str = "weights"
    rank: int | None = None
    dtype: str | None = None
    seed: int = 0
    head_names: Sequence[str] = ()
    missing: str = "error"
    missing_curvature: str = "error"
    heads: str = "error"
    embeddings: str = "error"
    tokenizer: str = ""
    chat_template: str = ""
    batchnorm: str = "error"
    precision: str = "auto"
    rounding: str = "nearest"
    verify: str = "files"
    shard_bytes: int = 5_000_000_000
    device: str = "cpu"
    notes: Sequence[str] = ()

    @cached_property
    def rule(self) -> Rule:
        """The rule by its name, and by those of its options that choose between rules (`structure`)."""
        rule = find_rule(self.method)
        return (rule.chosen(self.options) if rule.chosen else None) or rule

    @cached_property
    def rule_options(self) -> Options:
        """The rule's options, defaults filled in, not yet resolved per tensor."""
        known = {name: value for name, value in self.options.items() if name in self.rule.options}
        return self.rule.options.changed(self.method, known)

    @cached_property
    def edits(self) -> Edits:
        """The transforms in their order, those of the rule last, with their options, not yet resolved per tensor.

        A flat option belongs to the rule where the rule has it, else to every transform that has it. TIES after a transform
        that drops entries does not trim again unless its own density is given.
        """
        chain: list[tuple[str, Options]] = []
        for name, own in _chain((*self.transforms, *self.rule.transforms), "a transform", TRANSFORMS):
            defaults = TRANSFORMS[name].options
            flat = {k: v for k, v in self.options.items() if k in defaults and k not in self.rule.options}
            if "seed" in defaults:
                flat.setdefault("seed", self.seed)
            if name == "ties" and chain:
                flat["density"] = 1.0
            chain.append((name, defaults.changed(name, {**flat, **own})))
        return tuple(chain)

    @cached_property
    def after_edits(self) -> Edits:
        """The edits of the merged update in their order, with their options, not yet resolved per tensor; flat options as in `edits`."""
        chain: list[tuple[str, Options]] = []
        for name, own in _chain(self.after, "an edit of the merged update", AFTER):
            defaults = AFTER[name].options
            flat = {k: v for k, v in self.options.items() if k in defaults and k not in self.rule.options}
            chain.append((name, defaults.changed(name, {**flat, **own})))
        return tuple(chain)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: an unknown method, option, transform or choice (the nearest is named), or a number out of range.
        """
        for name in ("options", "delta0", "base_weight"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name in ("transforms", "after"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        known = set(self.rule.options)  # finds the method
        for policy, choices in POLICIES.items():
            choose(policy, getattr(self, policy), choices)
        if self.dtype is not None:
            choose("dtype", self.dtype, DTYPES)
        for name, value in (("delta0", self.delta0), ("base_weight", self.base_weight)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise GradmatchError(
                    f"{name} is {value!r}; it must be a finite number of at least 0", "out_of_range", name
                )
        check_kind("seed", self.seed, 0)
        check_kind("shard_bytes", self.shard_bytes, 0)
        check_kind("device", self.device, "")
        check_device(self.device)
        if self.shard_bytes < 1:
            raise GradmatchError(f"shard_bytes is {self.shard_bytes}; it must be at least 1", "out_of_range")
        for _, options in (*self.edits, *self.after_edits):
            known |= set(options)
        if self.after and self.rule.removes:
            raise GradmatchError(
                f"after={[name for name, _ in self.after_edits]} edits what tasks add, and {self.method} takes them away; leave it out",
                "bad_setting",
                "after",
            )
        for name in self.options:
            if name not in known:
                raise GradmatchError(
                    f"{self.method} has no option {name!r}{nearest(name, known)}; {takes(known)}",
                    "unknown_option",
                    name,
                )
        _ = self.rule_options  # its values
        if self.rank is not None:
            check_kind("rank", self.rank, 0)
            if self.rank < 1 or self.space != "core":
                said = (
                    "it must be at least 1"
                    if self.rank < 1
                    else "it is that of a merged adapter: say space='core' too"
                )
                raise GradmatchError(f"rank is {self.rank}; {said}", "out_of_range", "rank")
        if self.space == "core":
            check_core(self.method, self.rule, self.rule_options, [name for name, _ in self.edits])


def _chain(
    entries: Sequence[str | Mapping[str, Mapping[str, Any]]], what: str, known: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every edit by its name, with the options that are its own."""
    for entry in entries:
        if isinstance(entry, Mapping) and len(entry) == 1:
            ((name, own),) = entry.items()
        elif isinstance(entry, str):
            name, own = entry, {}
        else:
            raise TypeError(f"{what} is a name or {{name: options}}, not {entry!r}")
        if name not in known:
            raise GradmatchError(
                f"unknown {what.partition(' ')[2]} {name!r}{nearest(name, known)}; known are {', '.join(known)}",
                "unknown_name",
                name,
            )
        yield name, plain(own or {})
