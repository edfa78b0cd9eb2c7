"""What a rule is: one of four kinds, by how much of the models it must see at once to merge a tensor.

| kind | a rule gives | sees |
|---|---|---|
| `Linear` | `linear(alpha, gram, options) -> (c0, c)`: coefficients of theta0 and the theta_t | inner products at most |
| `Elementwise` | `elementwise(block) -> tensor` | one coordinate of everything |
| `Whole` | `whole(theta0, tau, alpha, options) -> tensor` | all of one tensor |
| `Solve` | `solve(theta0, tau, alpha, curved) -> tensor` | one matrix, with its curvature |

`Rule(formula, source, whole=...)` makes the kind whose function it is given. The plan picks the rule of every tensor, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.rules.options import NONE, Options, declared

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.rules.block import Block, Curved

Gram = Sequence[Sequence[float]]
Terms = tuple[float, list[float]] | tuple[float, list[float], str]
NEEDS = ("curvature", "base_curvature", "gradient", "gram", "factors", "anchor")
INVARIANTS = ("single", "equal", "zero", "order")
GRAMS = ("", "theta", "tau")
UNLIMITED = float("inf")


@dataclass(frozen=True)
class Rule:
    """What every rule says of itself.

    Attributes:
        formula: what it computes; a function of the options where they change it, and then the text of their defaults.
        source: who published it.
        needs: of "curvature" (of the tasks), "base_curvature", "gradient" (measured), "gram", "factors" (Kronecker), "anchor"
            (another merge).
        options: an `Options` with its defaults, or a plain table of defaults.
        transforms: edits of the task vectors that belong to the rule.
        models: (fewest, most) tasks.
        lacks: invariants that do not hold, each with the reason; tests assert both sides. "single": one model at weight 1
            returns itself; "equal": T equal models at weights 1/T return that model; "zero": weights of 0 return the base;
            "order": the order of the tasks plays no role.
        weighs: whether the tasks' weights play a role.
        relative: whether it divides by the sum of the weights whatever the options are.
        removes: whether it takes the tasks away.
        guarded: whether it keeps the share `options.keep` of H0 from what it takes away; the report then tells how often.
        damped: whether lambda I stands beside H0, with lambda = `options.damping` times the mean of H0's diagonal; delta0 then
            plays no role.
        signed: whether a task of a weight below 0 is taken away, and then needs no curvature.
        bounded: whether it multiplies a task's entries by 1 or its weight at the most, as averages do; a merge that went
            further is then told to be none of this rule.
        caution: what to warn of whenever it is used.
        family: the name of its list in `gradmatch.rules.beliefs.BELIEFS`, where its precisions are in nats: their sum is then the
            posterior of the merge.
        chosen: options -> the rule that it is under these options, or None for itself.
        spelt: the function that was given as the formula, if it was one.
        memory: (a, b): while a worker merges a piece it holds up to a + b T values for each of the piece's, T tasks. A piece
            is a block of 131,072 values where the rule and its edits allow it, else some rows or the whole tensor.

    Example:
        >>> halved = Rule("theta0 + mean_t tau_t / 2", "mine", elementwise=lambda b: b.theta0 + b.tau.mean(0) / 2)
        >>> halved.kind
        'elementwise'
    """

    formula: Any
    source: str
    _: KW_ONLY
    needs: frozenset[str] = frozenset()
    options: Options = NONE
    transforms: tuple[str | Mapping[str, Mapping[str, Any]], ...] = ()
    models: tuple[int, float] = (1, UNLIMITED)
    lacks: Mapping[str, str] = field(default_factory=dict)
    weighs: bool = True
    relative: bool = False
    removes: bool = False
    guarded: bool = False
    damped: bool = False
    signed: bool = False
    bounded: bool = False
    caution: str = ""
    family: str = ""
    chosen: Callable[[Any], Rule | None] | None = None
    spelt: Callable[[Any], str] | None = None
    memory: tuple[float, float] = (10, 4)

    kind: ClassVar[str] = ""

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """The kind whose function is given, where `Rule` itself is called."""
        if cls is not Rule:
            return object.__new__(cls)
        kinds = [kind for kind in KINDS if kind.kind in given]
        if len(kinds) != 1:
            named = ", ".join(kind.kind for kind in KINDS)
            raise TypeError(
                f"a rule is given exactly one function, as one of {named}; got {len(kinds)} of them"
            )
        return object.__new__(kinds[0])

    def __post_init__(self) -> None:
        """Check what the rule says of itself.

        Raises:
            ValueError: an unknown need or invariant.
            TypeError: no function.
        """
        object.__setattr__(self, "options", declared(self.options))
        object.__setattr__(self, "needs", frozenset(self.needs))
        if callable(self.formula):
            object.__setattr__(self, "spelt", self.formula)
            object.__setattr__(self, "formula", self.formula(self.options))
        for what, given, known in (("needs", self.needs, NEEDS), ("lacks", self.lacks, INVARIANTS)):
            for name in given:
                choose(f"one of {what}", name, known)
        if not callable(getattr(self, self.kind)):
            raise TypeError(f"{self.kind} must be a function, not {getattr(self, self.kind)!r}")

    def told(self, options: Mapping[str, Any]) -> str:
        """The formula under these options."""
        return self.spelt(options) if self.spelt else str(self.formula)


@dataclass(frozen=True)
class Linear(Rule):
    """c0 theta0 + sum_t c_t theta_t, with the same coefficients for a whole tensor.

    Attributes:
        linear: (alpha, gram, options) -> (c0, c), or (c0, c, branch) where it names the branch that it took.
        gram: whose inner products over the tensor it needs, (T, T) in float64: "theta", "tau", or "" for none; or a function
            of the options.
        rows: the same of every row of a matrix, as `Whole.whole`, for the option `along`.
        searches: whether it chooses among the tasks by a score, with several merges.
    """

    linear: Callable[[Sequence[float], Any, Any], Terms]
    _: KW_ONLY
    gram: str | Callable[[Any], str] = ""
    rows: Callable[[Tensor, Tensor, Sequence[float], Any], Tensor] | None = None
    searches: bool = False
    bounded: bool = True

    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        """As `Rule.__post_init__`.

        Raises:
            ValueError: also inner products of something else.
        """
        super().__post_init__()
        if not callable(self.gram):
            choose("gram", self.gram, GRAMS)

    def terms(
        self, alpha: Sequence[float], gram: Gram | None, options: Mapping[str, Any]
    ) -> tuple[float, list[float], str]:
        """(c0, c, branch), the branch "" where the rule has none.

        Raises:
            ValueError: the rule gives another number of coefficients than there are tasks.
        """
        c0, c, *branch = self.linear(alpha, gram, options)
        if len(c) != len(alpha):
            raise GradmatchError(
                f"the rule gives {len(c)} coefficients for {len(alpha)} tasks", "bad_setting"
            )
        return c0, list(c), str(branch[0]) if branch else ""

    def gram_of(self, options: Mapping[str, Any]) -> str:
        """Whose inner products it needs under these options."""
        return self.gram(options) if callable(self.gram) else self.gram


@dataclass(frozen=True)
class Elementwise(Rule):
    """Every coordinate by itself, from everything that is known of it.

    Attributes:
        elementwise: a `gradmatch.rules.block.Block` (n coordinates) -> merged values (n,).
        divides: whether it divides by Hbar = H0 + sum_t alpha_t H_t, which must then be positive.
        eq12: options -> whether it is Eq. 12 as it stands, which the compiled extension computes too.
    """

    elementwise: Callable[[Block], Tensor]
    _: KW_ONLY
    divides: bool = False
    eq12: Callable[[Any], bool] = lambda options: False

    kind: ClassVar[str] = "elementwise"


@dataclass(frozen=True)
class Whole(Rule):
    """All of one tensor at once, without curvature.

    Attributes:
        whole: (theta0, tau, alpha, options) -> merged. With `otherwise`, of matrices: theta0 (m, n), tau (T, m, n) after the
            transforms, the kernels of a convolution as rows; without, of tensors of any shape, theta0 (*s), tau (T, *s).
        otherwise: the rule of tensors that are no matrices, or None where it treats them too. It is given the options of the
            same names.
        streams: whether it takes the task vectors one after the other and keeps none: tau is then a sequence that reads each when
            it is asked for, into the place of the one before.
        square: a worker holds so many values more, beside `memory`, for each of the m x m of the matrix's smaller side m.
        update: (tau, alpha, options, rank) -> what is added to theta0, of a rule that turns with its task vectors (Q tau_t R gives
            Q update R for orthogonal Q and R), where `rank` is min(m, n) of the whole matrix. Such a rule merges the cores of
            adapters too.
    """

    whole: Callable[[Tensor, Any, Sequence[float], Any], Tensor]
    _: KW_ONLY
    otherwise: Rule | None = None
    streams: bool = False
    square: float = 0
    update: Callable[[Any, Sequence[float], Any, int], Tensor] | None = None

    kind: ClassVar[str] = "whole"


@dataclass(frozen=True)
class Solve(Rule):
    """A linear system for one matrix, with the curvature of the whole matrix.

    Attributes:
        solve: (theta0 (out, in), tau (T, out, in), alpha, curved) -> merged (out, in), in float64; `curved` is a
            `gradmatch.rules.block.Curved`.
        otherwise: the rule of tensors whose factors are not known. It is given the options of the same names.
        whole: whether it solves for matrices without factors too.
        single: options -> whether float32 is enough, where the models are in it; else it is given float64.
        streams: whether it takes the task vectors one after the other and keeps none, as `Whole.streams`.
        square: a worker holds so many values more, beside `memory`, for each of the n x n of the matrix's inputs n.
    """

    solve: Callable[[Tensor, Tensor, Sequence[float], Curved], Tensor]
    _: KW_ONLY
    otherwise: Rule
    whole: bool = False
    single: Callable[[Any], bool] = lambda options: False
    streams: bool = False
    square: float = 0

    kind: ClassVar[str] = "solve"


KINDS: tuple[type[Rule], ...] = (Linear, Elementwise, Whole, Solve)
