"""From a folder of fine-tunes to a merge: families, who is left out before anything is evaluated, and a search within a small budget.

`plan` looks (one pass over the weights), `run` evaluates and merges. The models of a family are ranked by what costs no evaluation; the merges
of the first k of them are scored for a few k, chosen from what is known so far, and the best is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task
from gradmatch.plan.printed import readable
from gradmatch.rules import find_rule
from gradmatch.zoo.alike import Similarity, similarity_of
from gradmatch.zoo.families import families_of
from gradmatch.zoo.finding import Found, find
from gradmatch.zoo.judge import Judge, OutOfBudget, Score, model_print
from gradmatch.zoo.pairs import aligned, layout
from gradmatch.zoo.planfile import Entry, PlanFile, Planned, ZooFile, checked, read_file
from gradmatch.zoo.screening import ranked, screened
from gradmatch.zoo.selecting import Selection

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

FIRST = (1.0, 0.6, 0.3)  # shares of a ranked family that are merged first


def plan(
    zoo: str | os.PathLike[str] | Mapping[str, Any] | ZooFile,
    *,
    dry_run: bool = False,
    mixture: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> PlanFile:
    """Decide what is merged with what, without an evaluation.

    Left out of a family are models whose update is far larger than the others' (an exploded learning rate), or that agrees with no other
    (noise, wrong labels): agreement is the cosine of a task vector with the sum of the others', each of length 1. The rest is ranked by the
    forecast of its curvature files where every model has one, else by agreement.

    Args:
        zoo: a file ZOO.yaml, or its content; see `ZooFile`.
        dry_run: look at headers alone: families by layers and vocabulary, and the price.
        mixture: settings of a mixture of the families' merges and of models that are alone, for `gradmatch zoo run`; None: no mixture.
        progress: show a progress bar.

    Returns:
        A PlanFile, to be written as YAML, edited and run.

    Raises:
        GradmatchError: a file with unknown keys, an unknown method, or no models.
        FileNotFoundError: no such file or model.

    >>> import torch
    >>> plan({"models": ["nowhere"], "base": "nowhere", "budgt": 3})
    Traceback (most recent call last):
    ...
    gradmatch.estimators.errors.GradmatchError: the zoo: unknown key 'budgt' (did you mean 'budget'?); known are models, ...
    """
    if isinstance(zoo, ZooFile):
        asked = zoo
    elif isinstance(zoo, Mapping):
        asked = checked(zoo, ZooFile, "the zoo")
    else:
        asked = read_file(zoo, ZooFile).located(Path(zoo).expanduser().parent)
    for method in asked.methods:
        find_rule(method)
    base = open_checkpoint(asked.base)
    found = find([Task(one.model, one.curvature, name=one.name) for one in asked.models], base)
    made = PlanFile(
        base=asked.base,
        score=asked.score,
        budget=asked.budget,
        methods=asked.methods,
        options=asked.options,
        skipped=found.skipped,
    )
    if dry_run:
        _by_headers(made, found, base)
    else:
        _by_weights(made, found, base, asked.threshold, progress)
    if mixture is not None:
        made.mixture = dict(mixture)
        made.singles = [_entry(found, name) for name in made.alone if name in found.tasks]
    made.price = price(made, found)
    return made


def _by_headers(made: PlanFile, found: Found, base: Checkpoint) -> None:
    """Families by layers alone."""
    kinds: dict[object, list[str]] = {}
    own = tuple(sorted(layout(base).items()))
    for name, model in aligned(found.opened, base).items():
        kinds.setdefault(tuple(sorted(layout(model).items())), []).append(name)
    for kind, names in kinds.items():
        if kind == own and len(names) > 1:
            made.families.append(
                Planned(
                    members=[_entry(found, name) for name in names],
                    ranked_by="nothing: a dry run reads headers alone",
                )
            )
        else:
            why = "no other model has its layers" if kind == own else "its layers are not the base's"
            made.alone |= dict.fromkeys(names, why)


def _by_weights(made: PlanFile, found: Found, base: Checkpoint, threshold: float, progress: bool) -> None:
    alike = similarity_of(found, base, "weights", progress)
    divided = families_of(alike, base, threshold)
    why = {name: one.why for one in divided.apart for name in one.members}
    for family in divided.families:
        kin = _kin_of(base, family, alike)
        if len(family) < 2 or not kin:
            made.alone |= {
                name: why.get(
                    name, "no other model is of its family" if kin else "it descends from another base"
                )
                for name in family
            }
            continue
        harmful = screened(family, alike)
        left = [name for name in family if name not in harmful]
        if len(left) < 2:
            made.alone |= {
                name: harmful.get(name, "all others of its family are left out") for name in family
            }
            continue
        order, by = ranked(left, alike, found, base)
        made.families.append(
            Planned(
                members=[_entry(found, name) for name in order],
                left_out=harmful,
                ranked_by=by,
                fingerprints={name: model_print(found.opened[name]) for name in order},
            )
        )


def _kin_of(base: Checkpoint, family: Sequence[str], alike: Similarity) -> bool:
    """Whether the base has the layers and about the weights of a family."""
    pairs = alike.pairs
    assert pairs.base_dot is not None
    assert pairs.base_square is not None
    rows = [alike.names.index(name) for name in family]
    scale = np.sqrt(pairs.base_square[rows] * pairs.square[rows, rows])
    return bool(
        np.median(np.where(scale > 0, pairs.base_dot[rows] / np.where(scale > 0, scale, 1), 0.0)) > 0.5
    )


def _entry(found: Found, name: str) -> Entry:
    task = found.tasks[name]
    return Entry(model=str(task.model), curvature=str(task.curvature) if task.curvature else None, name=name)


def price(made: PlanFile, found: Found) -> dict[str, Any]:
    """What a run costs, from headers: evaluations, bytes that their merges read at most, bytes that are written."""
    size = {name: sum(model.spec(one).nbytes for one in model.store) for name, model in found.opened.items()}
    evaluations = sum(min(made.budget, _most(len(family.members), made.methods)) for family in made.families)
    once = [sum(size[one.name] for one in family.members) for family in made.families]
    reads = sum(
        min(made.budget, _most(len(f.members), made.methods)) * own
        for f, own in zip(made.families, once, strict=True)
    )
    writes = sum(max(size[one.name] for one in family.members) for family in made.families)
    return {"evaluations": evaluations, "reads at most": readable(reads), "writes": readable(writes)}


def _most(members: int, methods: Sequence[str]) -> int:
    """How many evaluations a family can take at all."""
    return members + len(methods) - 1


def run(
    planned: str | os.PathLike[str] | PlanFile,
    out: str | os.PathLike[str],
    *,
    score: Score | None = None,
    log: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Selection]:
    """Evaluate and merge what a plan says.

    Args:
        planned: PLAN.yaml, or what `plan` returned.
        out: the folder of the merge; with several families, of their folders family-1, family-2, ...
        score: in place of the plan's: state dict -> a number, larger is better.
        log: JSON lines, to go on with; of further families with their number behind the name.
        overwrite: replace merges that stand there.
        progress: show progress bars.

    Returns:
        A `Selection` a family; they are written.

    Raises:
        GradmatchError: nothing to merge, no score, models that are not what they were when the plan was made, or no candidate that has a score.
        FileExistsError: `out` exists.
    """
    made = planned if isinstance(planned, PlanFile) else read_file(planned, PlanFile)
    if not made.families:
        why = "; ".join(f"{name}: {reason}" for name, reason in made.alone.items())
        raise GradmatchError(f"the plan has no family to merge ({why or 'no models'})", "bad_tasks")
    if score is None and made.score is None:
        raise GradmatchError(
            "the plan has no score; write `score: {data: {NAME: FILE}}` into it, or pass score=...",
            "bad_choice",
        )
    from gradmatch.output.publishing import check_absent, place

    several = len(made.families) > 1
    outs = [Path(out) / f"family-{n}" if several else Path(out) for n in range(1, len(made.families) + 1)]
    for one in outs:
        check_absent(place(one), overwrite)
    base = open_checkpoint(made.base)
    opened = [_opened(family, base) for family in made.families]
    judged = score if score is not None else made.score.score(made.base)  # type: ignore[union-attr]
    results = []
    for number, (family, tasks, folder) in enumerate(zip(made.families, opened, outs, strict=True), 1):
        place_ = None if log is None else f"{log}.{number}" if several else log
        found = searched(base, tasks, judged, family, made, place_)
        found.merge(folder, overwrite=overwrite, progress=progress, **made.options)
        results.append(found)
    return results


def _opened(family: Planned, base: Checkpoint) -> dict[str, Task]:
    """The members by name, opened, after a check that they are what they were.

    Raises:
        GradmatchError: one has changed, or two have one name.
    """
    tasks: dict[str, Task] = {}
    for one in family.members:
        name = one.name or Path(one.model).name
        if name in tasks:
            raise GradmatchError(
                f"two members are called {name!r}; give each a name of its own", "bad_tasks", name
            )
        model = open_checkpoint(one.model, base=base)
        stored = family.fingerprints.get(name)
        if stored is not None and stored != (here := model_print(model)):
            raise GradmatchError(
                f"{name} is another model than when the plan was made (fingerprint {stored}, now {here}); plan again",
                "other_weights",
                name,
            )
        tasks[name] = Task(model, one.curvature, name=name)
    return tasks


def searched(
    base: Checkpoint, tasks: Mapping[str, Task], score: Score, family: Planned, made: PlanFile, log: Any
) -> Selection:
    """The best mean of the first k members, by the first method; then the other methods on it."""
    names = list(tasks)
    judge = Judge(
        base,
        tasks,
        score,
        method=made.methods[0],
        options=made.options,
        budget=made.budget,
        log=log,
        about={"search": "plan"},
    )
    complete, method = True, made.methods[0]

    def evaluated(count: int) -> float | None:
        values = judge(dict.fromkeys(names[:count], 1 / count))
        if values is not None and len(values) > 1:
            raise GradmatchError(f"the score is {len(values)} numbers; a plan goes by one", "bad_choice")
        return None if values is None else values[0]

    try:
        tried: dict[int, float | None] = {}
        share = max(1, made.budget - len(made.methods) + 1)
        counts = best_count(len(names), evaluated, share, tried)
        best, value = counts, tried[counts]
        for other in made.methods[1:] if value is not None else ():
            if judge.spent >= made.budget:
                complete = False
                break
            rival = Judge(base, tasks, score, method=other, options=made.options)
            values = rival(dict.fromkeys(names[:best], 1 / best))
            judge.journal.add("method", method=other, score=values and list(values))
            if values is not None and value is not None and values[0] > value:
                method, value = other, values[0]
    except OutOfBudget:
        complete = False
    if value is None:
        judge.journal.close()
        why = next((line["why"] for line in judge.journal.of("evaluation") if line["why"]), "")
        raise GradmatchError(f"no candidate has a score ({why})", "no_score")
    weights = dict.fromkeys(names[:best], 1 / best)
    left_out = {
        **family.left_out,
        **dict.fromkeys(names[best:], f"the merge of the first {best} scores best"),
    }
    judge.journal.add("result", weights=weights, score=value, method=method, left_out=left_out)
    judge.journal.close()
    return Selection(
        base=base, tasks=[replace(tasks[name], weight=1 / best) for name in weights], weights=weights, score=value, left_out=left_out,
        history=judge.journal.lines, evaluations=judge.spent + len(judge.journal.of("method")), complete=complete, strategy="plan", method=method,
        options={},
    )  # fmt: skip


def best_count(
    most: int,
    evaluated: Callable[[int], float | None],
    budget: int,
    tried: dict[int, float | None] | None = None,
) -> int:
    """How many of a ranked family to take: scores of a few counts, then halfway towards the neighbours of the best; ties go to more models.

    Args:
        most: size of the family.
        evaluated: count -> score of the mean of the first so many; None where it has none.
        budget: evaluations.
        tried: count -> score, filled.

    >>> tried = {}
    >>> best_count(12, lambda count: -abs(count - 5), 5, tried), list(tried)
    (5, [12, 7, 4, 2, 5])
    """
    tried = {} if tried is None else tried

    def best() -> int:
        return max(tried, key=lambda count: (-np.inf if tried[count] is None else tried[count], count))

    for share in FIRST:
        count = max(1, round(share * most))
        if count not in tried and len(tried) < budget:
            tried[count] = evaluated(count)
    while len(tried) < budget:
        here = best()
        below = max((count for count in tried if count < here), default=0)
        above = min((count for count in tried if count > here), default=here)
        gaps = sorted(((here - below, below), (above - here, here)), reverse=True)
        size, start = gaps[0]
        if size < 2:
            break
        count = start + size // 2
        tried[count] = evaluated(count)
    return best()
