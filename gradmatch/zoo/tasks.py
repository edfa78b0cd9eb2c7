"""Scores of lm-evaluation-harness' tasks (`pip install gradmatch[lm-eval]`), without its traps."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.measure.opening import module_of
from gradmatch.models.loading import fill
from gradmatch.models.opening import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Told:
    """One task and how it counts.

    Attributes:
        name: of lm-eval's.
        metric: as lm-eval spells it: "acc,none".
        weight: in the sum over the tasks; negative where lower is better.
    """

    name: str
    metric: str = "acc,none"
    weight: float = 1.0


class OnTasks:
    """The weighted sum of metrics of lm-eval's tasks.

    Nothing is cached between candidates. A task that fixes its number of shots refuses another, a limit draws examples by the seed over the whole
    set instead of its head, outputs that are NaN or infinite raise instead of counting as the first choice, and a metric that is not there
    is an error that lists those that are.

    Args:
        model: the base: a folder or hub id with config and tokenizer.
        tasks: names, or `Told`s.
        include: a folder of task files beside lm-eval's own.
        limit: examples of each task; None: all.
        shots: examples in the prompt; None: as each task says.
        seed: of the draw of examples and of shots.
        chat: use the tokenizer's chat template.
        multiturn: with it, each shot is a turn of its own.
        batch_size: of the model's runs.

    Attributes:
        label: what it is called in logs: tasks, settings, and a hash of the task files.
        drawn: task -> numbers of the examples that are scored on, where there is a limit.

    Raises:
        GradmatchError: an unknown task, or shots that a task does not take.
        ImportError: lm-eval is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tasks: Sequence[str | Told],
        *,
        include: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        shots: int | None = None,
        seed: int = 0,
        chat: bool = False,
        multiturn: bool = True,
        batch_size: int = 8,
    ) -> None:
        if find_spec("lm_eval") is None:
            raise ImportError(
                "lm-eval is not installed; pip install 'gradmatch[lm-eval]', or score by a file of examples"
            )
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import AutoTokenizer

        self.tasks = [one if isinstance(one, Told) else Told(one) for one in tasks]
        if not self.tasks:
            raise GradmatchError("no tasks: name at least one of lm-eval's", "bad_arguments")
        names = {one.name for one in self.tasks}
        own: Any = TaskManager(include_path=str(include), include_defaults=False) if include else None
        # lm-eval's own thousands of task files are read where they are needed alone: that takes seconds
        enough = own is not None and names <= set(own.all_tasks)
        self.manager: Any = own if enough else TaskManager(include_path=str(include) if include else None)
        for one in self.tasks:
            if one.name not in self.manager.all_tasks:
                raise GradmatchError(
                    f"lm-eval knows no task {one.name!r}{nearest(one.name, self.manager.all_tasks)}; `lm-eval ls tasks` lists them, a folder of "
                    "own task files is given as include",
                    "unknown_name",
                    one.name,
                )
        self.shots, self.limit, self.seed, self.chat, self.multiturn = shots, limit, seed, chat, multiturn
        opened = open_checkpoint(model)
        self.module = module_of(model, opened).eval()
        self.module.register_forward_hook(_finite)
        words = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        self.runner = HFLM(pretrained=self.module, tokenizer=words, batch_size=batch_size)
        self.drawn = self._draw()
        files = sorted(Path(include).rglob("*")) if include else []
        content = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[
            :12
        ]
        listed = ", ".join(f"{one.name} {one.metric} x {one.weight:g}" for one in self.tasks)
        self.label = f"lm-eval {listed}; limit {limit}, shots {shots}, seed {seed}, chat {chat}{'' if multiturn else ' in one turn'}, files {content}"

    def _draw(self) -> dict[str, list[int]]:
        """Which examples of each task are scored on; refuses shots that a task does not take."""
        drawn: dict[str, list[int]] = {}
        loaded = self.manager.load([one.name for one in self.tasks])
        for name, task in _leaves(loaded["tasks"]):
            fixed = task.config.num_fewshot
            if self.shots is not None and fixed is not None and fixed != self.shots:
                raise GradmatchError(
                    f"task {name!r} fixes its shots at {fixed}, and {self.shots} are asked for; leave shots out, or edit the task",
                    "bad_choice",
                    name,
                )
            count = len(list(task.eval_docs))
            if self.limit is not None and self.limit < count:
                drawn[name] = sorted(random.Random(f"{self.seed} {name}").sample(range(count), self.limit))
        return drawn

    def each(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Task -> its metric.

        Raises:
            GradmatchError: a metric that a task does not have, or outputs that are not finite.
        """
        from lm_eval.evaluator import simple_evaluate

        fill(self.module, open_checkpoint(weights))
        found = simple_evaluate(
            model=self.runner,
            tasks=[one.name for one in self.tasks],
            task_manager=self.manager,
            num_fewshot=self.shots,
            samples=self.drawn or None,
            cache_requests=False,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=self.chat,
            fewshot_as_multiturn=self.multiturn,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
            verbosity="ERROR",
        )
        results = {**found.get("groups", {}), **found["results"]}
        scores = {}
        for one in self.tasks:
            held = results.get(one.name, {})
            if not isinstance(held.get(one.metric), (int, float)):
                known = ", ".join(
                    key
                    for key, value in held.items()
                    if isinstance(value, (int, float)) and "," in key and "stderr" not in key
                )
                raise GradmatchError(
                    f"task {one.name!r} has no metric {one.metric!r}; it has {known or 'none of its own, name the tasks of the group'}",
                    "unknown_name",
                    one.name,
                )
            scores[one.name] = float(held[one.metric])
        return scores

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """The weighted sum."""
        found = self.each(weights)
        return sum(one.weight * found[one.name] for one in self.tasks)

    def __repr__(self) -> str:
        return f"OnTasks({self.label})"


def _finite(module: Any, given: Any, output: Any) -> None:
    """A forward hook: refuse logits that are NaN or infinite.

    Raises:
        GradmatchError: they are.
    """
    import torch

    logits = getattr(output, "logits", output)
    if isinstance(logits, torch.Tensor) and not bool(torch.isfinite(logits).all()):
        raise GradmatchError("its outputs are NaN or infinite, so it has no score", "not_finite")


def _leaves(tasks: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The tasks of a table of lm-eval, those of groups too."""
    found = []
    for name, task in tasks.items():
        found += _leaves(task) if isinstance(task, Mapping) else [(str(name), task)]
    return found


def parse_told(text: str) -> Told:
    """NAME[,metric=M][,weight=W] of a command line.

    >>> parse_told("hellaswag,metric=acc_norm,none,weight=2")
    Told(name='hellaswag', metric='acc_norm,none', weight=2.0)

    Raises:
        GradmatchError: a weight that is no number.
    """
    name, _, rest = text.partition(",")
    rest, _, weight = rest.partition("weight=")
    metric = rest.removeprefix("metric=").rstrip(",")
    try:
        return Told(name, metric or "acc,none", float(weight or 1))
    except ValueError as error:
        raise GradmatchError(f"--tasks {text!r}: the weight is no number", "bad_arguments", text) from error
