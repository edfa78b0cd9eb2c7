"""Curvature that is written while a model is trained: a callback of transformers' Trainer, beside every checkpoint."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist
from transformers import TrainerCallback

from gradmatch.estimators.adam import from_adam
from gradmatch.estimators.blocks import check_count
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.estimation import estimate
from gradmatch.estimators.names import choose, first_line
from gradmatch.estimators.protocol import find_estimator
from gradmatch.estimators.published import FILE
from gradmatch.estimators.wrapped import unwrap

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.estimators.curvature import Curvature

HALF = (torch.float16, torch.bfloat16)


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `curvature.safetensors` into every checkpoint that a Trainer saves, so that whoever merges needs no data.

    The training is as it would be without: examples are drawn and labels sampled by generators of its own, the model is in
    its mode again afterwards. N is the number of examples of the training set. A model of peft is measured as a merge has
    it: with the adapter in the weights of its base, on a copy. Mixed precision's autocast is left aside, and weights in
    half precision are measured on a copy in float32. Under torch.distributed the processes share the work.

    Args:
        method: what `gradmatch.estimators.estimate` takes ("fisher", "kfac", ...); or "adam": the optimizer's second moments,
            free of charge, converted by the run's own files and, where these do not tell the scale, by `examples` rows.
        examples: of the training set, drawn at random anew by the same seed at every save; None: all.
        batch_size: of the measurement; None: the training's.
        seed: of the draw and of sampled labels.
        on: of an adapter: "weights" (its base's, with the update in them) or "factors" (A and B alone).
        filename: in the checkpoint's folder.
        **options: of `estimate`: samples, reduction, gradient, standard_error, likelihood, chunk, ...

    Attributes:
        curvature: the one written last.

    Raises:
        ValueError: an unknown method, or numbers that make no sense; at the start of the training: a data set without a length,
            a model whose parameters no process holds whole, Adam's moments for the weights of an adapter. What goes wrong at a
            save is a warning: it does not end the training.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[CurvatureCallback(examples=512)])  # doctest: +SKIP
        >>> trainer.train()                                                                                # doctest: +SKIP
        >>> Curvature.from_pretrained("out/checkpoint-500")                                                # doctest: +SKIP
    """

    def __init__(
        self,
        method: str = "fisher",
        examples: int | None = 256,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        on: str = "weights",
        filename: str = FILE,
        **options: Any,
    ) -> None:
        if method != "adam":
            find_estimator(method)
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        choose("on", on, ("weights", "factors"))
        if method == "adam" and options:
            raise GradmatchError(
                f"method='adam' reads the optimizer's state and takes no {', '.join(options)}", "bad_arguments", "method"
            )  # fmt: skip
        self.method, self.examples, self.batch_size, self.seed = method, examples, batch_size, seed
        self.on, self.filename, self.options = on, filename, options
        self.curvature: Curvature | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what cannot work, before hours of training."""
        model, loader = given["model"], given.get("train_dataloader")
        whole(model)
        if self.method == "adam" and is_adapted(model) and self.on == "weights":
            raise GradmatchError(
                "the optimizer of an adapter holds moments of its factors A and B, not of the weights that a merge weighs", "bad_arguments",
                "method", "pass on='factors', or a method that measures, such as 'fisher'",
            )  # fmt: skip
        if loader is not None:
            size_of(loader)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure, and write into the checkpoint that was just saved."""
        folder = saved_in(Path(args.output_dir), state.global_step)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # the first process has written its files
        try:
            with untouched(args.device):
                self.curvature = self.measure(given["model"], given["train_dataloader"], args, folder)
            if state.is_world_process_zero:
                self.curvature.save(folder / self.filename)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            warnings.warn(
                f"no curvature of {folder.name} was written, the training goes on: {first_line(error, 500)}",
                stacklevel=2,
            )

    def measure(self, model: nn.Module, loader: Any, args: Any, folder: Path) -> Curvature:
        """The curvature at the model's present weights."""
        count = size_of(loader)
        batches = drawn(loader, self.examples, self.batch_size or args.train_batch_size, self.seed)
        with measurable(model, self.on) as ready:
            if self.method != "adam":
                return estimate(
                    ready, batches, method=self.method, num_examples=count, seed=self.seed, progress=False, **self.options
                )  # fmt: skip
            try:
                return from_adam(folder, ready, num_examples=count)
            except GradmatchError as error:
                if error.code not in ("units", "batch_size"):
                    raise
            return from_adam(folder, ready, num_examples=count, calibrate=batches)


def whole(model: nn.Module) -> nn.Module:
    """The module inside its wrappers, whose parameters are all here.

    Raises:
        ValueError: FSDP or DeepSpeed's third stage have cut them.
    """
    model = unwrap(model)
    if any(hasattr(value, "ds_status") for value in model.parameters()):
        raise GradmatchError(
            "the model is sharded by DeepSpeed's third stage, so that no process holds its parameters whole: estimate the "
            "curvature of the saved checkpoint instead (gradmatch estimate)",
            "unsupported_model",
        )
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether peft's adapters are on it."""
    return hasattr(unwrap(model), "peft_config")


@contextmanager
def measurable(model: nn.Module, on: str) -> Iterator[nn.Module]:
    """The model as its curvature is measured: an adapter in the weights, no autocast, in float32."""
    model = whole(model)
    with without_autocast(model):
        adapted = is_adapted(model) and on == "weights"
        half = any(value.dtype in HALF for value in model.parameters())
        if adapted or half:
            model = copy.deepcopy(model)
        if adapted:
            merged: Any = model
            model = merged.merge_and_unload()
            for value in model.parameters():
                value.requires_grad_(value.is_floating_point())
        yield model.float() if half else model


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """The forward that accelerate put its autocast around, for a while."""
    wrapped, plain = vars(model).get("forward"), vars(model).get("_original_forward")
    if plain is None:
        yield
        return
    vars(model).pop("forward", None)
    if getattr(plain, "__func__", None) is not type(model).forward:
        vars(model)["forward"] = plain
    try:
        yield
    finally:
        vars(model)["forward"] = wrapped


def size_of(loader: Any) -> int:
    """Examples of the training set.

    Raises:
        ValueError: its data set has no length.
    """
    try:
        return len(loader.dataset)
    except TypeError as error:
        raise GradmatchError(
            "the training set is a stream without a length, so that N and a draw are not known: estimate the curvature of the "
            "saved checkpoint instead (gradmatch.estimate(..., num_examples=N))",
            "bad_data",
        ) from error


def drawn(loader: Any, examples: int | None, batch_size: int, seed: int) -> list[Any]:
    """Batches of examples of a loader's data set, drawn without its sampler, whose state belongs to the training."""
    count = len(loader.dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(order[: examples or count])
    collate = loader.collate_fn or torch.utils.data.default_collate
    parts = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return [collate([loader.dataset[place] for place in part]) for part in parts]


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Global random states as they were: collators that mask or cut draw from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def saved_in(output: Path, step: int) -> Path:
    """The checkpoint that was just saved; a search over hyperparameters has a folder a trial."""
    name = f"checkpoint-{step}"
    found = [path for path in (output / name, *output.glob(f"run-*/{name}")) if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=output / name)
