"""What a merge has to say about itself, as values: kept with the result, written to its card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.common.layers import layer_kind
from gradmatch.common.warning import warn
from gradmatch.estimators.shown import frame, html
from gradmatch.rules.matrix_options import allowed_residual

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.plan.step import Plan

CLAMP_WARNING = 0.01  # share of clamped weights beyond which a removal is not the one that was asked for
FAR = 0.1  # residual in the eigenbasis: at .3 a merge of three encoders lost 3 points of accuracy against the exact solution
MORE_KEPT = 1.01  # kept entries per one that was to be kept, beyond which it is told
KEPT_WARNING = 0.9  # share of the update beyond which rounding is no news

HALF = 0.5  # share of a removal's squared update in the embeddings from which it is told
UNCHECKED = (
    "a removal is a claim about one measure: check the result with a scorer that took no part in making or choosing it, and by reading "
    "continuations; fine-tuning brings removed behaviour back"
)

FLOOR = "have less curvature than the floor delta0, which decides there"
SAID = 5e-5  # a smaller share is 0.00 %


@dataclass(repr=False)
class Report:
    """Health of one merge. Shares are of all weights that were merged; None where they do not apply.

    Attributes:
        method: name of the rule.
        formula: what was computed.
        tensors: how many were treated in which way: copied, averaged (statistics), or by the kind of the rule.
        weights: number of merged weights.
        floor_share: share whose curvature is below delta0, where the floor decides (task arithmetic).
        clamped_share: removal: share where the guard acts, H0 - alpha H_t < keep * H0.
        clamped: removal: the same by tensor.
        largest_alpha: removal: share -> the largest weight (for all tasks alike) at which less than this share is clamped.
        moved: by tensor, the norm of the update, and its norm in H0 (square root of nats) for a removal.
        sign_conflict_share: TIES: share of weights that two tasks push in opposite directions.
        kept_shares: TIES: task -> (share of entries that its density asks to keep, share that is kept).
        kept_update: share of the update's squared norm that survived rounding to the output's dtype; of large tensors, one block
            of 131,072 in eight tells.
        solves: matrices that were solved as a whole: the iterations of conjugate gradients (0: in closed form or in the eigenbasis),
            and the residual that is left of the system, as a share of the right side's norm.
        cut: space="core" with a rank: by weight, the share of the update's norm that the rank leaves out.
        branches: how often each branch ran (slerp or lerp, ...).
        heads: with heads="keep-per-task": task -> name -> tensor.
        removed: of a removal: the tasks that were `removed`, with which `weight`, and what it was `measured` to cost, if it was.
        forecast: weights="auto": the chosen weights, and every task's forecast rise of its loss there, nats per example.
        notes: policies that were applied, warnings, what is legal but probably unintended.
    """

    method: str
    formula: str
    tensors: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    floor_share: float | None = None
    clamped_share: float | None = None
    clamped: dict[str, float] = field(default_factory=dict)
    largest_alpha: dict[float, float] = field(default_factory=dict)
    moved: dict[str, dict[str, float]] = field(default_factory=dict)
    sign_conflict_share: float | None = None
    kept_shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    kept_update: float | None = None
    solves: dict[str, dict[str, float]] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    branches: dict[str, int] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors, ready for JSON."""
        values = {key: value for key, value in vars(self).items() if key != "heads"}
        values["heads"] = {task: sorted(tensors) for task, tensors in self.heads.items()}
        values["solved"] = self.solved() if self.solves else None
        values["largest_alpha"] = {str(share): alpha for share, alpha in self.largest_alpha.items()}
        return values

    def to_frame(self) -> Any:
        """What is known of every tensor, as a pandas DataFrame: the norm of its update (in H0 too), what was clamped or cut.

        Raises:
            ImportError: pandas is not installed.
        """
        names = dict.fromkeys([*self.moved, *self.clamped, *self.solves, *self.cut])
        return frame(
            [
                {
                    "name": name,
                    **self.moved.get(name, {}),
                    **({"clamped": self.clamped[name]} if name in self.clamped else {}),
                    **self.solves.get(name, {}),
                    **({"cut": self.cut[name]} if name in self.cut else {}),
                }
                for name in names
            ]
        )

    def _repr_html_(self) -> str:
        return html(repr(self), [], self.summary())

    def __repr__(self) -> str:
        shares = ("floor_share", "clamped_share", "sign_conflict_share", "kept_update")
        known = {name: getattr(self, name) for name in shares if getattr(self, name) is not None}
        counts = ", ".join(f"{count} tensors: {action}" for action, count in self.tensors.items())
        numbers = "".join(f", {name}={value:.4g}" for name, value in known.items())
        return f"Report({self.method}, {counts}, {self.weights} weights{numbers}, {len(self.notes)} notes)"

    def solved(self) -> str:
        """What is left of the systems, in a line; without iterations they were solved in closed form or in their eigenbasis."""
        most = max(int(solve["iterations"]) for solve in self.solves.values())
        worst = max(self.solves, key=lambda name: self.solves[name]["residual"])
        return (
            f"{len(self.solves)} matrices solved in up to {most} iterations; the largest residual is "
            f"{self.solves[worst]['residual']:.2g} of the right side ({worst})"
        )

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.method}: {self.formula}"]
        lines.append(", ".join(f"{count} tensors: {action}" for action, count in self.tensors.items()))
        shares = {
            FLOOR: self.floor_share,
            "are clamped by the guard": self.clamped_share,
            "are in sign conflict": self.sign_conflict_share,
        }
        lines += [
            f"{100 * share:.2f} % of the weights {what}"
            for what, share in shares.items()
            if share is not None and (share >= SAID or what != FLOOR)
        ]
        if self.kept_update is not None:
            lines.append(f"rounding kept {100 * self.kept_update:.1f} % of the update")
        lines += [
            f"largest weight with less than {100 * s:g} % clamped: {a:.4g}"
            for s, a in self.largest_alpha.items()
        ]
        lines += [self.solved()] if self.solves else []
        lines += [f"{branch}: {count} tensors" for branch, count in self.branches.items()]
        return "\n".join([*lines, *self.notes])


def make_report(plan: Plan, stats: Mapping[str, Mapping[str, float]]) -> Report:
    """Sum the tensors' statistics; warns where a share passes its limit."""
    request = plan.request
    report = Report(request.method, plan.formula, notes=list(plan.notes))
    for step in plan.steps:
        report.tensors[step.kind] = report.tensors.get(step.kind, 0) + 1
    total: dict[str, float] = {}
    for name, values in stats.items():
        for key, value in values.items():
            total[key] = total.get(key, 0.0) + value
            if key.startswith("branch:"):
                branch = key.removeprefix("branch:")
                report.branches[branch] = report.branches.get(branch, 0) + 1
        if "update" in values:
            report.moved[name] = {"norm": math.sqrt(values["update"])}
        if values.get("cut"):
            report.cut[name] = math.sqrt(values["cut"])
        if "residual" in values:
            report.solves[name] = {"iterations": values["iterations"], "residual": values["residual"]}
        if "clamped" in values:
            report.clamped[name] = values["clamped"] / max(1.0, values["weights"])
            report.moved[name]["norm_h0"] = math.sqrt(max(0.0, values["update_h0"]))
    report.weights = sum(step.spec.numel for step in plan.merged)
    counted = max(1.0, total.get("weights", 0.0))
    if "clamped" in total:
        report.clamped_share = total["clamped"] / counted
    elif "floored" in total:
        report.floor_share = total["floored"] / counted
    if "conflicts" in total:
        report.sign_conflict_share = total["conflicts"] / counted
    if total.get("rounded_update"):
        report.kept_update = max(0.0, 1 - total["rounding_error"] / total["rounded_update"])
    for key, value in plan.told.items():
        setattr(report, key, value)
    _judge(report, plan)
    return report


def spent(moved: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Which kinds of layer take the squared norm of an update, in a line; and a line where embeddings take half of it.

    Example:
        >>> spent({"embed_tokens.weight": {"norm": 3.0}, "layers.0.mlp.up_proj.weight": {"norm": 1.0}})[0]
        'the step was spent on embeddings 90 %, feed-forward 10 % (of its squared norm)'
    """
    squares = dict.fromkeys(("embeddings", "attention", "feed-forward", "rest"), 0.0)
    for name, values in moved.items():
        squares[layer_kind(name)] += values["norm"] ** 2
    total = sum(squares.values())
    if not total:
        return []
    shares = {kind: value / total for kind, value in squares.items()}
    told = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if share >= 0.005)
    lines = [f"the step was spent on {told} (of its squared norm)"]
    if shares["embeddings"] >= HALF:
        lines.append(
            f"embeddings take {100 * shares['embeddings']:.0f} % of the step: words are made unlikely rather than what they are used "
            "for, and words that what must stay never used move freely; look at continuations with other words"
        )
    return lines


def _judge(report: Report, plan: Plan) -> None:
    """Notes and warnings that follow from the numbers."""
    said = []
    if report.kept_update is not None and report.kept_update < KEPT_WARNING:
        said.append(
            f"rounding kept {100 * report.kept_update:.0f} % of the update: use dtype='float32' or rounding='stochastic'"
        )
    if report.clamped_share is not None and report.clamped_share > CLAMP_WARNING:
        said.append(
            f"{100 * report.clamped_share:.1f} % of the weights are clamped: H0 - alpha H_t is not positive there, so this is "
            "not the removal that Eq. 13 describes; lower the weight (see report.largest_alpha) or improve the curvature"
        )
    if report.branches.get("lerp"):
        report.notes.append(
            f"{report.branches['lerp']} of {sum(report.branches.values())} tensors were interpolated linearly "
            "(nearly parallel, as fine-tunes of one base are)"
        )
    more = {task: (a, b) for task, (a, b) in report.kept_shares.items() if b > MORE_KEPT * a}
    if more:
        told = ", ".join(
            f"{100 * kept:.3g} % of {task} and not {100 * asked:.3g} %"
            for task, (asked, kept) in more.items()
        )
        report.notes.append(
            f"ties keeps {told}: entries as large as the last one all stay, and weights in few bits have many of one size"
        )
    if report.cut:
        squares = {name: moved["norm"] ** 2 for name, moved in report.moved.items()}
        lost = math.sqrt(
            sum(squares[n] * share**2 for n, share in report.cut.items()) / sum(squares.values())
        )
        worst = max(report.cut, key=lambda name: report.cut[name])
        said.append(
            f"rank {plan.request.rank} leaves out {100 * lost:.2g} % of the update's norm ({100 * report.cut[worst]:.2g} % of that of "
            f"{worst}); a higher rank keeps it"
        )
    if report.removed:
        report.notes += spent(report.moved)
        report.notes.append(UNCHECKED)
    allowed = {step.name: allowed_residual(step.options) for step in plan.steps}
    left = [
        name for name, s in report.solves.items() if s["iterations"] and s["residual"] > 2 * allowed[name]
    ]
    if left:
        said.append(
            f"conjugate gradients did not reach their tolerance in {len(left)} of {len(report.solves)} matrices (first: {left[0]}): "
            "what is left lies between task arithmetic and the solution; raise iterations (with solver='exact') or delta0"
        )
    far = {
        name: s["residual"]
        for name, s in report.solves.items()
        if not s["iterations"] and s["residual"] > FAR
    }
    if far:
        worst = max(far, key=lambda name: far[name])
        said.append(
            f"the common eigenbasis leaves more than {100 * FAR:.0f} % of the system in {len(far)} of {len(report.solves)} matrices "
            f"({100 * far[worst]:.0f} % in {worst}): the curvatures differ too much for it, and the merge can be worse than with their "
            "diagonals; "
            + (
                "solver='exact' solves it, without a guard"
                if plan.request.rule.guarded
                else "solver='fast' or 'exact' solves it"
            )
        )
    for text in said:
        report.notes.append(text)
        warn(text)
