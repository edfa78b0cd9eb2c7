"""Interrupted runs: the sums so far in a safetensors file beside the result, from which the same call goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradmatch.estimators import distributed
from gradmatch.estimators.batches import Batch
from gradmatch.estimators.convergence import Convergence
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import replacing
from gradmatch.estimators.problem import Problem


class Journal:
    """Saves the state of a run now and then, and finds it again.

    Args:
        path: the file; ranks append their number to it.
        identity: everything that must agree for the sums to be added to (model, method, options).
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        rank, world = distributed.place()
        self.path = Path(f"{os.fspath(path)}.{rank}" if world > 1 else os.fspath(path))
        self.identity = {**identity, "processes": str(world)}
        self.last: tuple[int, str] | None = (
            None  # examples up to the last batch that was done, and its digest
        )

    def save(self, problem: Problem, convergence: Convergence, batches: int, last: Batch) -> None:
        """Write aside and rename, so that an interruption here loses nothing.

        Args:
            problem: whose sums are saved.
            convergence: its groups so far.
            batches: how many are done, on all ranks.
            last: the last of them; the run that goes on must meet it at the same place.
        """
        from safetensors.torch import save_file

        state = {
            "batches": batches,
            "seen": end(last),
            "last": digest(last),
            "counts": problem.counts,
            "label_kind": problem.label_kind,
            "columns": problem.columns,
            "draws": problem.draws,
            "likelihood": problem.likelihood_name,
            "notes": problem.notes,
            "convergence": vars(convergence),
        }
        sums = {key: value.contiguous() for key, value in problem.sums.items()}
        metadata = {"identity": json.dumps(self.identity), "state": json.dumps(state)}
        with replacing(self.path) as aside:
            save_file(sums, aside, metadata=metadata)

    def load(self, problem: Problem, convergence: Convergence) -> int:
        """Restore what was saved; how many batches are done, 0 without a file."""
        if not self.path.exists():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                sums = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found, state = json.loads(metadata["identity"]), json.loads(metadata["state"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise GradmatchError(
                f"{self.path} holds no interrupted estimate ({error}); remove it or name another file",
                "other_weights",
                self.path,
            ) from error
        different = [key for key in self.identity if found.get(key) != self.identity[key]]
        if different:
            key = different[0]
            raise GradmatchError(
                f"{self.path} belongs to another run: its {key} is {found.get(key)}, here it is {self.identity[key]}; remove "
                "it, or name another file",
                "other_weights",
                self.path,
            )
        for key, value in sums.items():
            device = problem.sums[key].device if key in problem.sums else problem.device
            problem.sums[key] = value.to(device).clone()  # aligned memory: the same rounding as without
        problem.counts.update(state["counts"])
        problem.label_kind, problem.likelihood_name = state["label_kind"], state["likelihood"]
        problem.columns, problem.draws = state["columns"], state["draws"]
        self.last = state["seen"], state["last"]
        problem.notes.update(state["notes"])
        vars(convergence).update(state["convergence"])
        return int(state["batches"])

    def check(self, batch: Batch) -> None:
        """The last batch that was done before the interruption must be the one that it was then."""
        seen = end(batch)
        if self.last is not None and self.last != (seen, digest(batch)):
            raise GradmatchError(
                f"{self.path} was saved after batch {batch.index}, which ended with example {self.last[0]:,}; here it ends with "
                f"example {seen:,}{' and holds other data' if self.last[0] == seen else ''}. Give the same batches in the same order (no "
                "reshuffling), or remove the file to start again",
                "other_weights",
                self.path,
            )

    def remove(self) -> None:
        """The run is complete."""
        self.path.unlink(missing_ok=True)


def end(batch: Batch) -> int:
    """Examples of the whole run up to and with this batch."""
    return batch.first + batch.stride * batch.size


def digest(batch: Batch) -> str:
    """Of everything in a batch: inputs and labels."""
    hashed = hashlib.sha256()
    for value in pytree.tree_leaves((batch.args, batch.kwargs, batch.labels)):
        if isinstance(value, Tensor):
            hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def identity(
    problem: Problem, method: str, fingerprint: str, likelihood: Any, backend: str = "engine"
) -> dict[str, str]:
    """What two runs must share for one to continue the other."""
    return {
        "method": method,
        "backend": backend,
        "model fingerprint": fingerprint,
        "likelihood": likelihood if isinstance(likelihood, str) else described(likelihood),
        **{
            option: str(getattr(problem, option))
            for option in (
                "samples",
                "seed",
                "standard_error",
                "gradient",
                "reduction",
                "labels",
                "kfac_form",
            )
        },
    }


def described(likelihood: Any) -> str:
    """A likelihood given as an object: its class and its numbers, such as the variance of the noise."""
    plain = {
        key: value
        for key, value in getattr(likelihood, "__dict__", {}).items()
        if isinstance(value, (int, float, str))
    }
    return " ".join([type(likelihood).__name__, *(f"{key}={plain[key]}" for key in sorted(plain))])
