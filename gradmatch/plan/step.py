"""What happens to every output tensor: the steps of a plan, with what a reader should know before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradmatch.models.stores import Spec
from gradmatch.plan.request import Edits, Request

if TYPE_CHECKING:
    from gradmatch.plan.opened import Inputs


@dataclass(frozen=True)
class Step:
    """What happens to one output tensor.

    Attributes:
        name: of the tensor in the output.
        action: "merge", "copy" (from the base), "average" (BatchNorm statistics), "matrix" (solved as a whole).
        spec: shape and output dtype.
        compute: dtype of the arithmetic, "F32" or "F64".
        why: for the printed plan.
        tasks: positions of the tasks that take part.
        alpha: their weights.
        options: the rule's options here.
        edits: the transforms with their options here.
        bytes_read: of all inputs together.
    """

    name: str
    action: str
    spec: Spec
    compute: str = "F32"
    why: str = ""
    tasks: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    edits: Edits = ()
    bytes_read: int = 0

    @property
    def along(self) -> str:
        """Which vectors of a tensor the rule treats one by one: "rows", "columns", or "" where it treats the tensor as one."""
        chosen = self.options.get("along", "tensor")
        return "" if chosen == "tensor" else str(chosen)

    @property
    def whole(self) -> bool:
        """Whether the rule needs all of the tensor at once."""
        return self.action == "matrix" or (
            self.along != "" and (self.along == "columns" or len(self.spec.shape) > 2)
        )


@dataclass
class Plan:
    """All steps of a merge, with what a reader should know before it runs."""

    request: Request
    inputs: Inputs
    steps: list[Step]
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    heads: dict[int, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, once."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's tensors."""
        return sum(step.spec.nbytes for step in self.steps)
