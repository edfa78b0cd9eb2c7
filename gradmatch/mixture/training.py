"""Training of what a mixture or a stack adds and of nothing else: routers, new blocks; in place, atomically, and it can be interrupted."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.loading import load
from gradmatch.mixture.scoring import balance_loss, listening, loss_of
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.structure import Structure
from gradmatch.output.folder import replace_tensors
from gradmatch.output.publishing import lock, place

if TYPE_CHECKING:
    from torch import Tensor, nn

ROUTERS = re.compile(r"(?:^|\.)(?:router|gate|shared_expert_gate)\.")
STATE = "training.safetensors"  # Adam's moments and how far it came, beside the weights
ENDS = 10  # steps whose mean loss is told at the beginning and at the end


@dataclass
class Trained:
    """What a training did.

    Attributes:
        steps: taken in all, those of an interrupted run too.
        first: mean loss of the first steps of this run; last: of the last ones.
        weights: numbers that were trained.
        names: of their tensors.
    """

    steps: int
    first: float
    last: float
    weights: int
    names: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """For people.

        >>> print(Trained(100, 0.7, 0.4, 768, ["gate.router.weight"]).summary())
        100 steps: loss 0.7 -> 0.4; 768 weights in 1 tensors trained, all others are as they were
        """
        return (
            f"{self.steps} steps: loss {self.first:.4g} -> {self.last:.4g}; {self.weights:,} weights in {len(self.names)} tensors trained, "
            "all others are as they were"
        )


def train_router(
    folder: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]] | str | os.PathLike[str] | Sequence[str],
    steps: int = 100,
    *,
    rate: float = 1e-2,
    balance: float = 0.01,
    resume: bool = False,
    reading: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Trained:
    """Train the routers of a mixture by the task's loss; experts and all that is merged are frozen, and checked to be unchanged.

    The loss is the model's own and balance * E sum_e f_e P_e (Switch Transformers, Eq. 4): f_e the share of tokens that choose expert
    e, P_e its mean probability, over E experts; padding does not count. While a router of one choice is trained, every expert takes
    part by its probability, since one choice has no gradient.

    Args:
        folder: of `mix`; its routers are replaced in it when all steps are done.
        batches: inputs with labels, gone through again and again; or a file of examples or a
            list of them, read by the folder's tokenizer, a batch of each in turn.
        steps: of AdamW in all, those of an interrupted run included.
        rate: of learning.
        balance: weight of the balance loss.
        resume: go on where an interrupted (or shorter) training ended, as if it had not.
        reading: options of `gradmatch.measure.data.read`, for files.
        progress: show a bar.

    Raises:
        GradmatchError: no router that is trained (spectral ones are not), batches without labels, a loss that is not finite, or a
            state of another training to resume.

    >>> train_router("mixture", [{"input_ids": ids, "labels": ids}], steps=50)                # doctest: +SKIP
    """
    return train(
        folder,
        batches,
        steps,
        ROUTERS.search,
        "a router",
        rate=rate,
        balance=balance,
        resume=resume,
        reading=reading,
        progress=progress,
    )


def train(
    folder: str | os.PathLike[str],
    batches: Any,
    steps: int,
    wanted: Callable[[str], Any],
    what: str,
    *,
    rate: float,
    balance: float = 0.0,
    resume: bool = False,
    reading: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Trained:
    """Train the parameters whose names are wanted; arguments and errors as in `train_router`."""
    if steps < 1 or not 0 < rate < float("inf") or balance < 0:
        raise GradmatchError(
            f"steps={steps}, rate={rate}, balance={balance}: at least 1 step, a positive rate and a balance of at least 0 are needed",
            "out_of_range",
            "steps",
        )
    out = place(folder)
    module = load(out)
    trained = {name: p for name, p in module.named_parameters() if wanted(name)}
    if not trained:
        raise GradmatchError(
            f"{out} has no {what.removeprefix('a ')} that is trained (a spectral router is not)",
            "bad_model",
            out,
        )
    if isinstance(batches, (str, os.PathLike)):
        batches = [batches]
    if isinstance(batches, list) and batches and all(isinstance(one, (str, os.PathLike)) for one in batches):
        found = [read_for(out, module, one, **(reading or {})) for one in batches]
        longest = max(len(one) for one in found)  # in turns, a short file again and again
        batches = [
            one
            for turn in itertools.islice(
                zip(*(itertools.cycle(list(f)) for f in found), strict=False), longest
            )
            for one in turn
        ]
    held = lock(out)
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        before = digest(module, trained)
        optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
        settings = {"what": what, "rate": repr(rate), "balance": repr(balance)}
        done = restore(out / STATE, trained, optimizer, settings) if resume else 0
        losses: list[float] = []
        try:
            _steps(module, batches, done, steps, optimizer, balance, losses, progress)
        finally:
            if losses and all(map(_finite, losses)):
                if digest(module, trained) != before:
                    raise GradmatchError(
                        f"{out}: weights that are not trained have changed; nothing is written",
                        "changed",
                        out,
                    )
                keep(out / STATE, trained, optimizer, done + len(losses), settings)
                if done + len(losses) == steps:
                    replace_tensors(out, in_files(out, module, trained))
        count = sum(p.numel() for p in trained.values())
        some = losses or [float("nan")]
        first, last = (sum(part) / len(part) for part in (some[:ENDS], some[-ENDS:]))
        return Trained(done + len(losses), first, last, count, sorted(trained))
    finally:
        held.release()
        Path(held.lock_file).unlink(missing_ok=True)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _steps(
    module: nn.Module,
    batches: Any,
    done: int,
    steps: int,
    optimizer: Any,
    balance: float,
    losses: list[float],
    progress: bool,
) -> None:
    """Steps done + 1 to steps; `losses` grows by one a step."""
    from tqdm import tqdm

    endless = itertools.islice(_again(batches), done, steps)
    with listening(module, soft=True) as scores:
        for batch in tqdm(endless, total=steps - done, disable=not progress, desc="train"):
            scores.clear()
            loss = loss_of(module, batch)
            whole = loss + balance * balance_loss(scores) if balance else loss
            if not torch.isfinite(whole):
                losses.append(float("nan"))
                raise GradmatchError(
                    f"the loss is {float(whole.detach())} at step {done + len(losses)}; choose a smaller rate; nothing is written",
                    "not_finite",
                    "rate",
                )
            optimizer.zero_grad()
            whole.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))


def _again(batches: Any) -> Iterator[Any]:
    """Batches without end.

    Raises:
        GradmatchError: there are none.
    """
    kept = batches if hasattr(batches, "__len__") else list(batches)
    if not len(kept):
        raise GradmatchError("there are no batches to train on; give at least one", "bad_data", "batches")
    while True:
        yield from kept


def digest(module: nn.Module, but: Mapping[str, Any]) -> str:
    """One text for all values of a module but the given parameters."""
    whole = hashlib.blake2b()
    for name, value in module.state_dict().items():
        if name not in but:
            whole.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def in_files(out: Path, module: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained values under the names of the folder's files."""
    checkpoint = open_checkpoint(out)
    if all(name in checkpoint.store for name in trained):
        return {name: value.detach() for name, value in trained.items()}
    names = Structure(module).names(checkpoint).plain
    return {names[name]: value.detach() for name, value in trained.items()}


def keep(
    path: Path, trained: Mapping[str, Tensor], optimizer: Any, done: int, settings: Mapping[str, str]
) -> None:
    """Write how far a training has come."""
    from safetensors.torch import save

    from gradmatch.estimators.files import write_atomically

    held: dict[str, Tensor] = {}
    for name, value in trained.items():
        state = optimizer.state[value]
        held[f"value.{name}"] = value.detach().clone()
        held |= {f"{key}.{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    write_atomically(path, save(held, metadata={**settings, "steps": str(done)}))


def restore(path: Path, trained: Mapping[str, Tensor], optimizer: Any, settings: Mapping[str, str]) -> int:
    """Take over where a training has come to; returns its steps.

    Raises:
        GradmatchError: there is none, or one of other tensors or settings.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise GradmatchError(
            f"{path.parent} holds no training to resume ({path.name}); train without resume", "no_state", path
        )
    with safe_open(path, "pt") as file:
        told = file.metadata()
        other = [key for key, value in settings.items() if told.get(key) != value]
        if other or {k.partition(".")[2] for k in file.keys()} != set(trained):  # noqa: SIM118
            said = (
                f"{other[0]} {told.get(other[0])}, now it is {settings[other[0]]}"
                if other
                else "other tensors"
            )
            raise GradmatchError(
                f"{path} is of a training with {said}; train without resume, or with the same settings",
                "other_state",
                path,
            )
        done = int(told["steps"])
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(file.get_tensor(f"value.{name}"))
                optimizer.state[value] = {
                    "step": torch.tensor(float(done)),
                    **{key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")},
                }
    return done


def read_for(out: Path, module: Any, source: Any, **options: Any) -> Any:
    """Examples of a file for a mixture, by its own tokenizer."""
    from transformers import AutoTokenizer

    from gradmatch.measure.data import read

    tokenizer = AutoTokenizer.from_pretrained(out, config=module.config, trust_remote_code=False)
    return read(source, module, tokenizer=tokenizer, **options)
