"""The models of a mixture, opened under the base's names: what is merged of them, what each expert keeps, what is lost of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.merging import merge
from gradmatch.mixture.request import Prompts
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import Renamed, Spec, Table, equal, renamed
from gradmatch.models.task import Task
from gradmatch.models.views import as_module, like
from gradmatch.plan.opened import task_names

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.stores import Store
    from gradmatch.models.task import Model

SPAN = 2**22
# Keys of a config that say nothing of what a model computes
SILENT = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label",
        "initializer_range", "initializer_factor", "label2id", "model_type", "pad_token_id", "pretraining_tp", "problem_type",
        "torch_dtype", "transformers_version", "use_cache", "attention_dropout", "hidden_dropout_prob", "classifier_dropout",
        "attention_probs_dropout_prob", "gradient_checkpointing",
    }
)  # fmt: skip


@dataclass(eq=False)
class Expert:
    """One model of a mixture.

    Attributes:
        name: how reports call it.
        model: its weights; under the base's names where it is of the base's architecture.
        task: as it was given, for its weight and curvature.
        prompts: what shall be routed to it, or None.
        noise_scale: standard deviation of noise that is added to its ffns.
        residual_scale: factor on the output projection of its ffns.
    """

    name: str
    model: Checkpoint
    task: Task
    prompts: Prompts | None = None
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(eq=False)
class Sources:
    """Base and experts, opened."""

    base: Checkpoint
    experts: list[Expert]
    shared: Expert | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def prints(self) -> dict[str, str]:
        """Expert -> fingerprint of its weights."""
        return {one.name: fingerprint(list(one.model), one.model.sample) for one in self.experts}

    @property
    def digest(self) -> str:
        """One text for all experts in their order: a router belongs to it."""
        return hashlib.sha256("".join(self.prints.values()).encode()).hexdigest()[:32]

    @property
    def names(self) -> list[str]:
        """Of the experts, in the order of a router's rows."""
        return [one.name for one in self.experts]


def open_sources(
    base: Model | Checkpoint,
    experts: Sequence[Model | Task],
    prompts: Sequence[Any] | None = None,
    *,
    alike: bool = True,
    settings: Sequence[Mapping[str, float]] | None = None,
    shared: Model | None = None,
) -> Sources:
    """Open everything; nothing but headers is read.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: the models; a Task brings a weight, a curvature and a name along.
        prompts: one entry an expert (see `Prompts.of`), and one for `shared` at the end where it has some.
        alike: the experts have the base's architecture.
        settings: of each expert: noise_scale, residual_scale.
        shared: an expert that takes part in every answer.

    Raises:
        GradmatchError: fewer than two experts, prompts for other numbers of them, a base without a config, models of another
            architecture or other sizes, a head that the config ties to the embeddings and that differs from them.
        FileNotFoundError: a model that is not there.
    """
    if isinstance(experts, (str, os.PathLike, Mapping, Task)) or len(experts) < 2:
        count = 1 if isinstance(experts, (str, os.PathLike, Mapping, Task)) else len(experts)
        raise GradmatchError(
            f"a mixture has at least two experts, got {count}; give a list of models", "bad_tasks", "experts"
        )
    opened = named_kind(as_module(open_checkpoint(base)))
    if not opened.config:
        raise GradmatchError(
            f"{opened.where} has no config.json, and a mixture is built from it; give the base as a folder, a hub id or a module of transformers",
            "bad_model",
            opened.where,
        )
    given = prompts if prompts is not None else []
    if prompts is not None and len(given) not in (len(experts), len(experts) + (shared is not None)):
        raise GradmatchError(
            f"prompts has {len(given)} entries, and there are {len(experts)} experts; give one entry an expert",
            "bad_prompts",
            "prompts",
        )
    tasks = [one if isinstance(one, Task) else Task(one) for one in (*experts, *([shared] if shared else []))]
    names = [_plain(name) for name in task_names(tasks)]
    if shared is not None:
        names[-1] = "the shared expert"
    check_heads(opened)
    found = []
    for position, (name, task) in enumerate(zip(names, tasks, strict=True)):
        model = open_checkpoint(task.model, base=opened)
        model = like(model, opened) if alike else named_kind(as_module(model))
        check_heads(model)
        if alike:
            check_alike(model, name, opened)
        own = {
            key: value for key, value in (settings[position] if settings else {}).items() if value is not None
        }
        told = Prompts.of(given[position], name) if position < len(given) else None
        found.append(Expert(name, model, task, told, **own))
    notes = [note for one in (opened, *(expert.model for expert in found)) for note in one.original.notes]
    return Sources(opened, found[: len(experts)], found[-1] if shared is not None else None, notes)


def named_kind(model: Checkpoint) -> Checkpoint:
    """A module's config with the module's class, which a config that was never saved does not tell."""
    if model.module is None or not model.config or model.config.get("architectures"):
        return model
    config = {**model.config, "architectures": [type(model.module).__name__]}
    return model.seen(model.store, config=config)


def _plain(name: str) -> str:
    """A name that can be part of a report and of a path."""
    return name.replace("/", "-")


def check_heads(model: Checkpoint) -> None:
    """Refuse a stored head that the config ties to embeddings of other values: which one is meant?

    Raises:
        GradmatchError: such a head.
    """
    config = model.config or {}
    tied = config.get("tie_word_embeddings", False)
    if tied and "lm_head.weight" in model.store and "lm_head.weight" not in model.aliases:
        embeddings = next((name for name in model.store if name.endswith("embed_tokens.weight")), "")
        if embeddings and model.spec(embeddings).shape == model.spec("lm_head.weight").shape:
            if equal(model.store, embeddings, model.store, "lm_head.weight"):
                return
            raise GradmatchError(
                f"{model.where}: 'lm_head.weight' differs from {embeddings!r}, and its config ties them (tie_word_embeddings), so that "
                "transformers would drop the head; say tie_word_embeddings: false there, or remove the head",
                "tied",
                "lm_head.weight",
            )


def check_alike(model: Checkpoint, name: str, base: Checkpoint) -> None:
    """Refuse an expert of another architecture or of other sizes.

    Raises:
        GradmatchError: the first tensor that does not fit, with both shapes, and the level that can mix such models.
    """
    kinds = [(one.config or {}).get("model_type") for one in (base, model)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise GradmatchError(
            f"{name} is a {kinds[1]}, the base a {kinds[0]}: ffns and blocks are mixed of one architecture; level='model' mixes whole models",
            "models_differ",
            name,
        )
    labels = [
        {str(k): v for k, v in ((one.config or {}).get("id2label") or {}).items()} for one in (base, model)
    ]
    if all(labels) and labels[0] != labels[1]:
        raise GradmatchError(
            f"{name} has the labels {list(labels[1].values())[:5]}, the base {list(labels[0].values())[:5]}: outputs of other meaning are not "
            "merged; give models of the same labels in the same order",
            "models_differ",
            name,
        )
    embeddings = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_in", "embed_out")
    for tensor in base.store:
        if tensor in base.aliases:
            continue
        if tensor not in model:
            raise GradmatchError(
                f"{name} lacks {tensor!r} {base.spec(tensor)} of the base: ffns and blocks are mixed of one architecture and depth; "
                "level='model' mixes whole models",
                "models_differ",
                tensor,
            )
        shapes = base.spec(tensor).shape, model.spec(tensor).shape
        if shapes[0] != shapes[1]:
            if any(part in tensor for part in embeddings) and shapes[0][1:] == shapes[1][1:]:
                raise GradmatchError(
                    f"{tensor!r} has {shapes[0][0]} rows in the base and {shapes[1][0]} in {name}: their vocabularies differ; give all models "
                    "one vocabulary (resize_token_embeddings), as one set of token ids goes to all experts",
                    "vocabulary",
                    tensor,
                )
            raise GradmatchError(
                f"{tensor!r} has shape {list(shapes[0])} in the base and {list(shapes[1])} in {name}; ffns and blocks are mixed of one width; "
                "level='model' mixes whole models of any width",
                "shape_mismatch",
                tensor,
            )
    extra = next((tensor for tensor in model.store if tensor not in base), None)
    if extra is not None and extra not in model.aliases:
        raise GradmatchError(
            f"{name} has {extra!r} {model.spec(extra)}, which the base lacks; give a base of the same architecture, or level='model'",
            "models_differ",
            extra,
        )


class Noisy(Table):
    """Tensors of a store times a factor, with noise added first; as mergekit-moe treats the ffns of an expert."""

    def __init__(self, store: Store, changed: Mapping[str, float], noise: float, seed: int) -> None:
        self._table = {name: name for name in store}
        self._store, self._changed, self._noise, self._seed = store, changed, noise, seed

    def spec(self, name: str) -> Spec:
        """As stored."""
        return self._store.spec(name)

    def files(self, name: str) -> Any:
        """As stored."""
        return self._store.files(name)

    def block(self, name: str, first: int, last: int) -> Tensor:
        """Elements first to last; the noise of an element does not depend on how it is read."""
        import torch

        values = self._store.block(name, first, last)
        if name not in self._changed:
            return values
        if self._noise:
            seed = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:7], "big")
            drawn = torch.empty(self.spec(name).numel, dtype=values.dtype)
            drawn.normal_(generator=torch.Generator().manual_seed(seed))
            values = values + drawn[first:last] * self._noise
        return values * self._changed[name] if self._changed[name] != 1 else values


def merged_outside(
    sources: Sources, names: Sequence[str], method: str, folder: Path, **options: Any
) -> Checkpoint:
    """What is not mixed, merged by a rule; tensors that no expert changed are the base's, bit by bit.

    Args:
        sources: base and experts.
        names: tensors of the base that are merged.
        method: a name of RULES, or "base": the base's.
        folder: where the merge is written meanwhile, so that no model has to fit into memory.
        **options: of `gradmatch.merge`.
    """
    base = sources.base
    if method == "base":
        if options:
            raise GradmatchError(
                f"method='base' takes what is not mixed from the base, so {next(iter(options))} plays no role; leave it out, or choose a rule",
                "bad_setting",
                next(iter(options)),
            )
        return base
    changed = [
        name
        for name in names
        if base.spec(name).floating
        and any(
            not equal(base.store, name, one.model.store, held(one.model, name)) for one in sources.experts
        )
    ]
    if not changed:
        return base

    def part(model: Checkpoint) -> Checkpoint:
        return model.seen(
            renamed(model.store, {name: held(model, name) for name in changed}),
            aliases={},
            config=None,
            folder=None,
            tokenizer=None,
            path=None,
        )

    tasks = [
        Task(part(one.model), one.task.curvature, _weight(one.task, len(sources.experts)), one.name)
        for one in sources.experts
    ]
    made = merge(part(base), tasks, method=method, out=folder / "merged", **options)
    assert isinstance(made, Checkpoint)
    whole = {name: (base.store, name) for name in base.store}
    return base.seen(Renamed({**whole, **{name: (made.store, name) for name in changed}}))


def _weight(task: Task, count: int) -> Any:
    """A task's own weight, or its share."""
    return task.weight if task.weight != 1.0 else 1.0 / count


def held(model: Checkpoint, name: str) -> str:
    """The name that holds a tensor's values."""
    return model.aliases.get(name, name)
