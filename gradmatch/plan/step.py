"""What happens to every output tensor: the steps of a plan, with what a reader should know before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.shown import frame, html
from gradmatch.models.stores import Spec
from gradmatch.plan.request import Edits, Request
from gradmatch.rules import Elementwise, Linear, Options, Rule
from gradmatch.rules.after import AFTER
from gradmatch.rules.edits import TRANSFORMS
from gradmatch.rules.options import NONE

if TYPE_CHECKING:
    from gradmatch.models.cores import Adapter
    from gradmatch.plan.inputs import Inputs

Coefficients = tuple[float, list[float]]


@dataclass(frozen=True)
class Step:
    """What happens to one output tensor. Everything that depends on the rule is decided here, and nowhere else.

    Attributes:
        name: of the tensor in the output.
        kind: "copy" (of the base's), "average" (BatchNorm statistics), or the kind of the rule that merges it: "linear",
            "elementwise", "whole", "solve".
        spec: shape and output dtype.
        compute: dtype of the arithmetic, "F32" or "F64".
        path: what computes it, see `path_of`; "core": the factors of adapters.
        why: for the printed plan.
        rule: that merges it; None for a copy.
        tasks: positions of the tasks that take part.
        alpha: their weights.
        options: the rule's options here.
        edits: the transforms with their options here.
        after: the edits of the merged update with their options here.
        depth: where the tensor lies, 0 at the first layer, 1 at the last.
        coefficients: (c0, c) of c0 theta0 + sum_t c_t theta_t, of linear rules that need no inner products.
        bytes_read: of all inputs together.
        rank: of an adapter's update, at the most; 0 where the tensor itself is written.
    """

    name: str
    kind: str
    spec: Spec
    compute: str = "F32"
    path: str = "copy"
    why: str = ""
    rule: Rule | None = None
    tasks: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    options: Options = NONE
    edits: Edits = ()
    after: Edits = ()
    depth: float = 0.0
    coefficients: Coefficients | None = None
    bytes_read: int = 0
    rank: int = 0

    @property
    def bytes_written(self) -> int:
        """Of the tensor, or of the two factors of its update."""
        if not self.rank:
            return self.spec.nbytes
        rows = self.spec.shape[0]
        return (
            self.rank * (rows + self.spec.numel // max(1, rows)) * self.spec.nbytes // max(1, self.spec.numel)
        )

    @property
    def merged(self) -> bool:
        """Whether the rule of the merge treats it; BatchNorm statistics are averaged whatever the rule is."""
        return self.kind not in ("copy", "average")

    @property
    def formula(self) -> str:
        """What is computed here; "" for a copy."""
        return self.rule.told(self.options) if self.rule else ""

    @property
    def needs(self) -> frozenset[str]:
        """What the rule needs beside the models."""
        return self.rule.needs if self.rule else frozenset()

    @property
    def guarded(self) -> bool:
        """Whether the share `options.keep` of the base's curvature is kept from what is taken away."""
        return self.rule is not None and self.rule.guarded

    @property
    def gram(self) -> str:
        """Whose inner products over the tensor are needed first: "theta", "tau" or ""."""
        return self.rule.gram_of(self.options) if isinstance(self.rule, Linear) and not self.along else ""

    @property
    def along(self) -> str:
        """Which vectors of a tensor the rule treats one by one: "rows", "columns", or "" where it treats the tensor as one."""
        return along_of(self.rule, self.options)

    @property
    def span(self) -> str:
        """How much of the tensor a piece must hold: any "block", whole "rows", or the whole "tensor"."""
        spans = {TRANSFORMS[name].span(options) for name, options in self.edits}
        if self.path in ("whole", "solve") or "tensor" in spans:
            return "tensor"
        if self.path == "rows":
            return "tensor" if self.along == "columns" or len(self.spec.shape) > 2 else "rows"
        return "rows" if "rows" in spans else "block"

    @property
    def assembles(self) -> bool:
        """Whether an edit of the merged update must see all of the tensor, so that its pieces are put together first."""
        return (
            self.path != "core"
            and self.spec.numel > 0
            and any(AFTER[name].matrices for name, _ in self.after)
        )

    @property
    def counted(self) -> list[int]:
        """Rows of `tasks` that are counted as tasks: without weights of 0, where the rule weighs; one at least."""
        return [
            row for row, alpha in enumerate(self.alpha) if alpha or self.rule is None or not self.rule.weighs
        ] or [0]

    @property
    def scopes(self) -> list[str]:
        """Of what each edit must know something before its first piece: "", the "tensor" or the "model"."""
        return [TRANSFORMS[name].scope(options) for name, options in self.edits]


def along_of(rule: Rule | None, options: Options) -> str:
    """What the option `along` chooses, of a rule that has it; see `Step.along`."""
    by_row = isinstance(rule, Linear) and rule.rows is not None
    return "" if not by_row or options["along"] == "tensor" else str(options["along"])


def path_of(rule: Rule, options: Options, edits: Edits, after: Edits) -> str:
    """What computes a step, before the edits of the merged update.

    "linear": coefficients of the models as they are. "rows": every row or column by itself. "stacked": the rule on stacked
    pieces; "eq12" and "ties" are such rules that the compiled extension computes too. "whole", "solve": all of the tensor.
    """
    if isinstance(rule, Linear):
        if along_of(rule, options):
            return "rows"
        if not edits and not after:
            return "linear"
        return "ties" if [name for name, _ in edits] == ["ties"] and not after else "stacked"
    if isinstance(rule, Elementwise):
        return "eq12" if rule.eq12(options) and not edits and not after else "stacked"
    return rule.kind


@dataclass(frozen=True)
class Origin:
    """Of a merge that a task is taken out of: what it was made with, and what its posterior said of itself."""

    base: Any
    base_curvature: Any
    info: Mapping[str, str]


@dataclass(repr=False)
class Plan:
    """All steps of a merge, with what a reader should know before it runs."""

    request: Request
    inputs: Inputs
    steps: list[Step]
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    heads: dict[int, list[str]] = field(default_factory=dict)
    files: dict[str, bytes | None] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list)  # the tasks, where their cores are merged
    told: dict[str, Any] = field(default_factory=dict)  # what the report says that was known before the merge
    origin: Origin | None = None

    @property
    def merged(self) -> list[Step]:
        """The steps that the rule of the merge treats."""
        return [step for step in self.steps if step.merged]

    @property
    def formula(self) -> str:
        """What is computed: the formula of every tensor that is merged, with the edits that come before it."""
        counts = Counter(step.formula for step in self.merged)
        asked = self.request.rule.told(self.request.rule_options)
        first, *others = sorted(counts, key=lambda text: text != asked) or [asked]
        text = "; ".join([first, *(f"of {counts[other]} tensors: {other}" for other in others)])
        before = self.request.edits[: len(self.request.edits) - len(self.request.rule.transforms)]
        for said, edits in (
            ("tau edited before by", before),
            ("theta - theta0 edited after by", self.request.after_edits),
        ):
            text += f"; {said} {', then '.join(name for name, _ in edits)}" if edits else ""
        return text

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, once."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's tensors."""
        return sum(step.bytes_written for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: method, formula, base, tasks, steps (one a tensor), notes, dropped, bytes_read, bytes_written."""
        return {
            "method": self.request.method,
            "formula": self.formula,
            "base": self.inputs.base.where,
            "tasks": [
                {"name": task.name, "model": task.checkpoint.where, "weight": task.weight}
                for task in self.inputs.tasks
            ],
            "steps": [
                {
                    "name": step.name,
                    "kind": step.kind,
                    "shape": list(step.spec.shape),
                    "dtype": step.spec.dtype,
                    "compute": step.compute,
                    "why": step.why,
                }
                for step in self.steps
            ],
            "notes": list(self.notes),
            "dropped": list(self.dropped),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    def to_frame(self) -> Any:
        """The steps as a pandas DataFrame, one row a tensor.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.to_dict()["steps"])

    def __repr__(self) -> str:
        return f"Plan({self.request.method}, {len(self.merged)} of {len(self.steps)} tensors merged)"

    def _repr_html_(self) -> str:
        told = self.to_dict()
        return html(f"{self!r}: {self.formula}", told["steps"], "\n".join(self.notes))


def no_posterior(request: Request) -> GradmatchError | None:
    """Why a merge has no posterior precision; None where it has one."""
    if request.after:
        said = f"after={[name for name, _ in request.after_edits]} moves the merge away from the mode of the beliefs, so it has no posterior"
    elif not request.rule.family:
        said = f"{request.method} has no posterior: it weighs by no curvature in nats; gradient_matching, fisher, mats and the like do"
    else:
        return None
    return GradmatchError(said, "bad_setting", "posterior")
