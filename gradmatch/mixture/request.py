"""What was asked of a mixture, checked by itself before any model is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmatch.common.kinds import check_kind
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.plan.request import DTYPES

ROUTER = "router.safetensors"  # the shard of a mixture that training writes anew
LEVELS = ("ffn", "block", "model")
ROUTINGS = ("token", "sample")
ROUTERS = ("linear", "mlp", "spectral")
GATES = ("seen", "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
RANDOM = ("random", "uniform_random")
FORMS = ("auto", "mixtral", "qwen2_moe", "qwen3_moe", "own")


@dataclass(frozen=True)
class Prompts:
    """What shall be routed to an expert, and what shall not: texts, or batches of a model's inputs.

    >>> Prompts.of({"positive": ["2 + 2 ="], "negative": ["Once upon a time"]}).negative
    ('Once upon a time',)
    """

    positive: tuple[Any, ...] = ()
    negative: tuple[Any, ...] = ()

    @classmethod
    def of(cls, given: Any, whose: str = "an expert") -> Prompts:
        """Prompts of one expert: a list, or {"positive": [...], "negative": [...]}.

        Raises:
            GradmatchError: an empty list or text, negative ones alone, another key.
        """
        if isinstance(given, Mapping) and not {"positive", "negative"} & set(given):
            raise GradmatchError(
                f"the prompts of {whose} have the keys {', '.join(map(repr, given))}; known are positive and negative",
                "bad_prompts",
                whose,
            )
        table = given if isinstance(given, Mapping) else {"positive": given}
        found = {}
        for key, entries in table.items():
            if key not in ("positive", "negative"):
                raise GradmatchError(
                    f"the prompts of {whose} have a key {key!r}; known are positive and negative",
                    "unknown_name",
                    whose,
                )
            if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
                raise GradmatchError(
                    f"the {key} prompts of {whose} are {entries!r:.60}; give a list of texts",
                    "bad_prompts",
                    whose,
                )
            for entry in entries:
                if not isinstance(entry, (str, Mapping)):
                    raise GradmatchError(
                        f"a {key} prompt of {whose} is {entry!r:.60}; a prompt is a text",
                        "bad_prompts",
                        whose,
                    )
                if isinstance(entry, str) and not entry.strip():
                    raise GradmatchError(
                        f"a {key} prompt of {whose} is empty; remove it", "bad_prompts", whose
                    )
            found[key] = tuple(entries)
        if not found.get("positive"):
            raise GradmatchError(
                f"{whose} has no positive prompts; give at least one text of what shall be routed to it",
                "bad_prompts",
                whose,
            )
        return cls(**found)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        level: what an expert is: the "ffn" of a layer, a whole "block" (layer), or a whole "model".
        routing: a choice for every "token", or one for the whole "sample"; "": by token of ffns, else by sample.
        router: "linear", "mlp" (linear, ReLU, linear), or "spectral": without data, by the task vectors.
        top_k: experts that take part in an answer; None: 2 of ffns, else 1.
        dense_layers: the first so many layers (or those of a list) are merged, not mixed.
        gate_mode: how prompts become the rows of a router. "seen": the mean of what the router sees at its place, centred over the
            experts and normalised; the others as mergekit-moe has them.
        form: how ffn mixtures are written: "auto", an architecture of transformers, or "own".
        rank: an expert is the merged weights and its difference from them at this rank; None: whole weights.
        gate_rank: directions of each task vector that a spectral router looks along.
        seed: of routers that start at random, and of noise.
        dtype: of the output; None: as the models are stored.
    """

    level: str = "ffn"
    routing: str = ""
    router: str = "linear"
    top_k: int | None = None
    dense_layers: int | Sequence[int] = 0
    gate_mode: str = "seen"
    form: str = "auto"
    rank: int | None = None
    gate_rank: int = 8
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            GradmatchError: an unknown choice (the nearest is named), a number out of range, or choices that do not go together.
        """
        if not self.routing:
            object.__setattr__(self, "routing", "token" if self.level == "ffn" or self.rank else "sample")
        for what, known in (
            ("level", LEVELS),
            ("routing", ROUTINGS),
            ("router", ROUTERS),
            ("gate_mode", GATES),
            ("form", FORMS),
        ):
            choose(what, getattr(self, what), known)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
            choose("dtype", self.dtype, DTYPES)
        for what in ("top_k", "rank", "gate_rank", "seed"):
            value = getattr(self, what)
            if value is None:
                continue
            check_kind(what, value, 0)
            if value < (0 if what == "seed" else 1):
                raise GradmatchError(f"{what} is {value}; it must be at least 1", "out_of_range", what)
        if self.rank is not None and (self.level == "model" or self.router != "spectral"):
            raise GradmatchError(
                f"rank={self.rank} makes experts of merged weights and low-rank differences, which router='spectral' chooses at level='ffn' or "
                f"'block', not router={self.router!r} at level={self.level!r}",
                "bad_setting",
                "rank",
            )
        if isinstance(self.dense_layers, bool) or not isinstance(
            self.dense_layers, (int, list, tuple, range)
        ):
            raise GradmatchError(
                f"dense_layers is {self.dense_layers!r}; give a number of first layers, or a list of layers",
                "bad_setting",
                "dense_layers",
            )

    def experts_at_once(self, experts: int) -> int:
        """How many experts take part in an answer.

        Raises:
            GradmatchError: more than there are.
        """
        if self.top_k is not None and self.top_k > experts:
            raise GradmatchError(
                f"top_k is {self.top_k}, and there are {experts} experts; choose at most {experts}",
                "out_of_range",
                "top_k",
            )
        usual = 2 if self.level == "ffn" and self.rank is None else 1
        return self.top_k or min(usual, experts)

    def dense(self, layers: int) -> list[int]:
        """The layers that are merged, of a model with so many.

        Raises:
            GradmatchError: none is left to mix, or one that the model does not have.
        """
        given = (
            range(self.dense_layers) if isinstance(self.dense_layers, int) else sorted(set(self.dense_layers))
        )
        wrong = [one for one in given if not isinstance(one, int) or not 0 <= one < layers]
        if wrong or len(given) >= layers or (isinstance(self.dense_layers, int) and self.dense_layers < 0):
            raise GradmatchError(
                f"dense_layers is {self.dense_layers!r}, and the models have {layers} layers (0 to {layers - 1}); leave at least one to mix, "
                "or merge the models",
                "out_of_range",
                "dense_layers",
            )
        return list(given)
