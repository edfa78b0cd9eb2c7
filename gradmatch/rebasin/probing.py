"""A module, an example that it takes, and what it answers: what a search for symmetries runs, and its proof compares."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.wrapped import unwrap
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.loading import load
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.structure import architecture, structure
from gradmatch.models.views import by_module
from gradmatch.rebasin.symmetry import Symmetry, symmetry_of
from gradmatch.rebasin.tracing import trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.models.task import Model

LENGTH, ROWS = (
    7,
    2,
)  # of an example text: more than one token, as what moves within a head shows with two positions alone
NO_CACHE = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Call:
    """One forward pass: the arguments of the module."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def __call__(self, module: nn.Module) -> Any:
        """What the module answers."""
        return module(*self.args, **(self.kwargs or {}))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Call:
        """The same on another device, and floating inputs in another dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return Call(tree_map(moved, self.args), tree_map(moved, dict(self.kwargs or {})))


def call_of(batch: Any) -> Call:
    """A batch, as gradmatch takes it, as a forward pass; labels are left out."""
    if isinstance(batch, Mapping):
        return Call((), {key: value for key, value in batch.items() if key != "labels"})
    return Call((batch[0] if isinstance(batch, (tuple, list)) else batch,))


def batches_of(data: Iterable[Any]) -> Iterable[Any]:
    """Batches as they are given.

    Raises:
        TypeError: no batches but one, or a path.
    """
    if isinstance(data, (Mapping, torch.Tensor, str)):
        raise TypeError(
            f"data is a {type(data).__name__}; give a list (or any iterable) of batches, [batch] for a single one"
        )
    return data


def calls_of(data: Iterable[Any]) -> list[Call]:
    """All of some batches.

    Raises:
        ValueError: there are none.
        TypeError: see `batches_of`.
    """
    calls = [call_of(batch) for batch in batches_of(data)]
    if not calls:
        raise GradmatchError("data holds no batches; give at least one", "bad_data", "data")
    return calls


def module_with(model: Model | Checkpoint, checkpoint: Checkpoint) -> nn.Module:
    """The module that holds a model's weights: itself where it is one, else as its config describes it.

    Raises:
        ValueError: neither; or weights that leave a parameter without a value.
    """
    found = model if isinstance(model, torch.nn.Module) else checkpoint.module
    return unwrap(found) if isinstance(found, torch.nn.Module) else load(checkpoint)


def example(module: nn.Module) -> Call:
    """Inputs that a module takes, drawn at random: by its config, else by its first layer.

    Raises:
        ValueError: neither tells; pass data.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(module, "config", None)
    main = getattr(module, "main_input_name", "")
    if config is not None and main == "input_ids":
        texts = getattr(config, "get_text_config", lambda: config)()
        vocabulary = int(getattr(texts, "vocab_size", 0) or 0)
        special = {getattr(texts, f"{kind}_token_id", None) for kind in ("pad", "eos", "bos")}
        usual = [number for number in range(min(vocabulary, 10_000)) if number not in special] or [0]
        drawn = torch.randint(len(usual), (ROWS, LENGTH), generator=generator)
        ids = torch.tensor(usual)[drawn]
        extra = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        return Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra})
    if config is not None and main == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        return Call(
            (), {"pixel_values": torch.randn(1, config.num_channels, height, width, generator=generator)}
        )
    first = next((layer for layer in module.modules() if isinstance(layer, KNOWN)), None)
    if first is None:
        raise GradmatchError(
            f"{type(module).__name__}: its config and its layers do not tell what it takes; pass data=[batch] with one batch",
            "bad_data",
            type(module).__name__,
        )
    if isinstance(first, torch.nn.Linear):
        return Call((torch.randn(ROWS, first.in_features, generator=generator),))
    if isinstance(first, torch.nn.Embedding):
        return Call((torch.randint(first.num_embeddings, (ROWS, LENGTH), generator=generator),))
    sides = {torch.nn.Conv1d: 1, torch.nn.Conv2d: 2, torch.nn.Conv3d: 3}[type(first)]
    tried = [
        Call((torch.randn(ROWS, first.in_channels, *[size] * sides, generator=generator),)) for size in SIZES
    ]
    return next((call for call in tried if _takes(module, call)), tried[0])


def _takes(module: nn.Module, call: Call) -> bool:
    first = next(module.parameters())
    try:
        answer(module, call.to(first.device, first.dtype), "")
    except GradmatchError:
        return False
    return True


SIZES = (32, 28, 8, 64, 224)  # of images, until one fits the linear layers behind the convolutions
KNOWN = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def answer(module: nn.Module, call: Call, where: str) -> list[Tensor]:
    """The tensors that a module answers with.

    Raises:
        ValueError: it cannot be run on that.
    """
    with _quiet(module):
        try:
            out = call(module)
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
            raise GradmatchError(
                f"{where}: {type(module).__name__} cannot be run on the example ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                "pass data=[batch] with a batch that it takes",
                "bad_data",
                where,
            ) from error
    values = list(out.values()) if isinstance(out, Mapping) else [out]
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class _quiet:
    """Evaluation mode, no gradients and no cache of keys and values, which would be an output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        config = getattr(self.module, "config", None)
        self.cache = getattr(config, "use_cache", None)
        if self.cache:
            config.use_cache = False  # type: ignore[union-attr]
        self.grad = torch.no_grad()
        self.grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self.grad.__exit__(*error)
        if self.cache:
            self.module.config.use_cache = self.cache  # type: ignore[union-attr]
        for part, training in self.modes:
            part.training = training


def find_symmetry(module: nn.Module, call: Call | None = None) -> Symmetry:
    """The specification of a module, found by running it once.

    Args:
        module: with its weights, or on the meta device.
        call: what it is run on; None: an example that its config or first layer describes.

    Raises:
        ValueError: it cannot be run.

    >>> layers = torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4)
    >>> find_symmetry(torch.nn.Sequential(*layers)).dims["2.weight"]
    (((4,),), (('0',),))
    """
    first = next((one for one in module.parameters() if one.is_floating_point()), torch.empty(0))
    given = (call or example(module)).to(first.device, first.dtype)
    with _quiet(module):
        found = trace(module, lambda: answer(module, given, type(module).__name__))
    known = module.state_dict(keep_vars=True)
    unused = [name for name, tensor in known.items() if id(tensor) not in found.used and tensor.dim()]
    return symmetry_of(found, unused)


def symmetry_of_checkpoint(checkpoint: Checkpoint, call: Call | None = None) -> Symmetry:
    """The specification of a model by its module, or by its config with no weight read.

    Raises:
        ValueError: neither a module nor a config that names one; tensors that the module lacks.
    """
    known = structure(checkpoint)
    if known is None or known.module is None:
        raise GradmatchError(
            f"{checkpoint.where} is weights alone: which units they belong to is told by a module; pass the nn.Module, a folder with a "
            "config.json, or spec={tensor: [group or None for every dim]}",
            "bad_model",
            checkpoint.where,
        )
    try:
        found = find_symmetry(known.module, call)
    except GradmatchError:
        if checkpoint.module is not None or architecture(checkpoint.config) is None:
            raise
        found = find_symmetry(load(checkpoint), call)  # code that looks at values cannot run without any
    stray = next((name for name in by_module(checkpoint, known) if name not in known.tensors), None)
    if stray is not None:
        raise GradmatchError(
            f"{checkpoint.where}: {stray!r} is no tensor of {type(known.module).__name__}, so nobody knows what moves it; open the model as "
            "the class that it was saved as",
            "bad_spec",
            stray,
        )
    return found


def opened(model: Model | Checkpoint) -> Checkpoint:
    """A model of any form."""
    return open_checkpoint(model)


def double(module: nn.Module) -> nn.Module:
    """A copy in float64, in which rounding is no excuse."""
    return copy.deepcopy(module).double()
