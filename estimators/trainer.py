"""What transformers' Trainer wrote beside an optimizer's state: its arguments, its log, and the model.

Nothing is unpickled into code: `training_args.bin` is read with weights_only, every class in it replaced by an inert
stand-in, and classes from outside of transformers, accelerate and torch are not read at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.fingerprint import edges
from gradmatch.estimators.names import first_line
from gradmatch.estimators.tensorfile import TensorFile

log = logging.getLogger(__name__)

ARGUMENTS, STATE = "training_args.bin", "trainer_state.json"
TRUSTED = ("transformers", "accelerate", "torch", "collections", "datetime", "pathlib")
OWN_ARGUMENTS = (
    "transformers.training_args.TrainingArguments",
    "transformers.training_args_seq2seq.Seq2SeqTrainingArguments",
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Run:
    """One run of the Trainer, as far as the files of a checkpoint tell.

    Attributes:
        folder: of the checkpoint.
        rows, accumulation, processes: examples a process and forward pass, passes a step, processes; a step has their product.
        max_grad_norm: the norm to which gradients were clipped, 0 for none; under DeepSpeed that of its own configuration.
        arguments: all training arguments by name.
        norms: step -> norm of the gradient before clipping, for the steps that were logged.
        steps: how many the run had made.
        epoch: how far through its data it was; 0 is unknown.
        version: of transformers, from the model's config; "" is unknown.
        unknown: what the files leave open, in words for an error.
    """

    folder: Path
    rows: int = 0
    accumulation: int = 1
    processes: int = 1
    max_grad_norm: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    epoch: float = 0.0
    version: str = ""
    unknown: list[str] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Examples a step; 0 is unknown."""
        return self.rows * self.accumulation * self.processes if self.arguments else 0


def read_run(folder: Path) -> Run | None:
    """The run whose checkpoint a folder is; None where no Trainer left its files there."""
    if not (folder / ARGUMENTS).is_file() and not (folder / STATE).is_file():
        return None
    config = folder / "config.json"
    made_by = read_json(config).get("transformers_version", "") if config.is_file() else ""
    run = Run(folder, version=str(made_by))
    if (folder / ARGUMENTS).is_file():
        _read_arguments(run)
    else:
        run.unknown.append(
            f"{STATE} lies there without {ARGUMENTS}, so that clipping and batch size are not known"
        )
    if (folder / STATE).is_file():
        _read_state(run)
    return run


def _read_arguments(run: Run) -> None:
    """Batch size, accumulation, processes and all that `training_args.bin` says."""
    kind, given = _arguments(run.folder / ARGUMENTS)
    if kind not in OWN_ARGUMENTS:
        run.unknown.append(
            f"{ARGUMENTS} is a {kind}, whose trainer may compute another loss than the model's own"
        )
    run.arguments = given
    counted = len(list(run.folder.glob("rng_state*.pth")))
    processes = getattr(given.get("distributed_state"), "num_processes", None) or counted
    engine = given.get("deepspeed")
    clip = engine.get("gradient_clipping", 0) if isinstance(engine, Mapping) else "auto"
    try:
        run.rows = int(given.get("per_device_train_batch_size") or 0) * max(1, int(given.get("_n_gpu") or 1))
        run.accumulation = max(1, int(given.get("gradient_accumulation_steps") or 1))
        run.processes = int(processes or 1)
        run.max_grad_norm = float(given.get("max_grad_norm") or 0) if clip == "auto" else float(clip)
    except (TypeError, ValueError) as error:
        raise GradmatchError(
            f"{run.folder / ARGUMENTS} holds a number that is none: {error}", "optimizer_state"
        ) from error
    if not processes:
        run.unknown.append("no file says how many processes there were")
    accelerator = getattr(given.get("accelerator_config"), "__dict__", {})
    strange = {
        "parallelism_config": given.get("parallelism_config") is not None,
        "split_batches": bool(accelerator.get("split_batches")) and run.processes > 1,
        "label_smoothing_factor": bool(given.get("label_smoothing_factor")),
        "deepspeed (its configuration is another file)": isinstance(given.get("deepspeed"), (str, Path)),
    }
    run.unknown.extend(
        f"{ARGUMENTS} sets {name}, which changes the gradients" for name, so in strange.items() if so
    )


class _Inert:
    """Stands for an object of any class in a file: what it was made with, and its attributes."""

    def __new__(cls, *given: Any, **named: Any) -> _Inert:
        made = object.__new__(cls)
        made.given = given
        return made

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given: tuple[Any, ...]


def _arguments(file: Path) -> tuple[str, dict[str, Any]]:
    """Class name and attributes of the object in a file; enumerations as their values."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        foreign = [name for name in names if name.split(".")[0] not in TRUSTED]
        if foreign:
            return foreign[-1], {}
        stand_ins: list[Any] = [(type(name, (_Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler trips over first
        raise GradmatchError(
            f"{file} cannot be read: {first_line(error)}",
            "unreadable_file",
            file,
        ) from error
    if not isinstance(loaded, _Inert):
        raise GradmatchError(
            f"{file} holds a {type(loaded).__name__}, not the arguments of a Trainer", "optimizer_state", file
        )
    given = {key: value for key, value in vars(loaded).items() if key != "given"}
    return type(loaded).__name__, {
        key: value.given[0] if isinstance(value, _Inert) and len(value.given) == 1 else value
        for key, value in given.items()
    }


def _read_state(run: Run) -> None:
    """Steps, epochs, the rows of a batch as they were, and the logged norms."""
    file = run.folder / STATE
    found = read_json(file) if file.is_file() else {}
    try:
        run.steps, run.epoch = int(found.get("global_step") or 0), float(found.get("epoch") or 0)
        run.rows = int(found.get("train_batch_size") or run.rows)  # what auto_find_batch_size ended with
        entries = [entry for entry in found.get("log_history", []) if entry.get("grad_norm") is not None]
        norms = {int(entry["step"]): float(entry["grad_norm"]) for entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GradmatchError(
            f"{file} is not what a Trainer writes: {type(error).__name__} {error}", "optimizer_state", file
        ) from error
    # others: steps that were skipped
    run.norms = {step: norm for step, norm in norms.items() if math.isfinite(norm)}


def check_beside(folder: Path, parameters: Mapping[str, Tensor]) -> str:
    """The model whose file lies beside the optimizer's state must be the model given; what was compared, in words.

    Up to 192 values of every tensor are compared, in the narrower of the two dtypes; tensors by their names, those of
    other names by their values. A file that holds tensors fused otherwise than the module leaves these uncompared.
    """
    files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors")) if "model" in path.name]
    where = {name: file for file in files for name in file}
    if not where:
        log.warning(
            "%s holds no safetensors file of a model: whether the state is the given model's is not checked",
            folder,
        )
        return f"no model in {folder.name} to compare with"
    compared, others = 0, []
    for name, value in parameters.items():
        stored = next((known for known in (name, name.replace(".default.", ".")) if known in where), None)
        if stored is None or where[stored][stored].dtype not in DTYPES:
            others.append(value)
            continue
        _check_same(where[stored], stored, value)
        compared += 1
    if others and not compared:
        compared = sum(_is_among(where, value) for value in others)
        if not compared:
            raise GradmatchError(
                f"the optimizer's state in {folder} is that of another model: none of the given model's {len(others)} trainable "
                f"tensors is in the model beside it; give the model of that folder",
                "optimizer_state",
                folder,
            )
    return f"{compared} of {len(parameters)} tensors are those of the model in {folder.name}"


def _check_same(file: TensorFile, name: str, value: Tensor) -> None:
    """Compare one tensor with the model's."""
    advice = (
        f"the optimizer's state beside {file.path} belongs to that model, and the given model is another, or the same at "
        "another step: give the model of that folder"
    )
    info = file[name]
    if info.shape != tuple(value.shape):
        raise GradmatchError(
            f"{name!r} has shape {list(info.shape)} in {file.path.name}, {list(value.shape)} here; {advice}",
            "optimizer_state",
            name,
        )
    for there, here in _samples(file, name, value):
        different = (there != here) & ~(there.isnan() & here.isnan())
        if bool(different.any()):
            place = int(different.nonzero()[0])
            raise GradmatchError(
                f"{name!r} holds {float(there[place]):.6g} in {file.path.name} where the given model has "
                f"{float(here[place]):.6g}; {advice}",
                "optimizer_state",
                name,
            )


def _samples(file: TensorFile, name: str, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Values at both ends and in the middle, of the file and of the tensor, in the narrower of their dtypes."""
    info, flat = file[name], value.detach().reshape(-1)
    kind = DTYPES[info.dtype]
    narrow = kind if kind.itemsize <= flat.dtype.itemsize else flat.dtype
    for first, last in edges(info.numel):
        raw = bytearray(file.read_bytes(name, first, last - first))
        there = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
        yield there.to(narrow), flat[first:last].to("cpu", narrow)


def _is_among(where: Mapping[str, TensorFile], value: Tensor) -> bool:
    """Whether a tensor has the shape and the values of any tensor of the file."""
    return any(
        file[name].shape == tuple(value.shape)
        and file[name].dtype in DTYPES
        and all(bool((there == here).all()) for there, here in _samples(file, name, value))
        for name, file in where.items()
    )
