"""Model-GLUE's whole recipe: the best merge of each family of a zoo, and these side by side with a router."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.answers import check_answers
from gradmatch.mixture.mixing import mix
from gradmatch.mixture.told import Made
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task
from gradmatch.models.views import as_module
from gradmatch.output.publishing import check_absent, place
from gradmatch.zoo.planfile import PlanFile
from gradmatch.zoo.planning import run
from gradmatch.zoo.selecting import Selection


def run_side_by_side(
    made: PlanFile,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> tuple[list[Selection], Made]:
    """Merge each family of a plan as `gradmatch.zoo.planning.run` does, and mix the merges and the models that are alone.

    Args:
        made: the plan; its `mixture` holds arguments of `gradmatch.mixture.mix`.
        out: the folder of the mixture.
        overwrite: replace a mixture that stands there.
        progress: show progress bars.
        **options: of `run`.

    Returns:
        A `Selection` a family, and the report of the mixture; models that cannot answer with the others are left out, with a note.

    Raises:
        GradmatchError: fewer than two experts, or what `run` and `mix` refuse.
        FileExistsError: `out` exists.
    """
    check_absent(place(out), overwrite)
    base, notes = as_module(open_checkpoint(made.base)), []
    singles = []
    for one in made.singles:
        name = one.name or Path(one.model).name
        try:
            check_answers(base, as_module(open_checkpoint(one.model, base=base)), name)
        except GradmatchError as error:
            notes.append(f"left out of the mixture: {error}")
            continue
        singles.append(Task(one.model, name=name))
    if len(made.families) + len(singles) < 2:
        said = "; ".join(notes) or "no model is alone"
        raise GradmatchError(
            f"the plan has {len(made.families)} families and {len(singles)} models beside them ({said}), and a mixture needs two experts; "
            "run it without `mixture:`, or lower the zoo's threshold",
            "bad_tasks",
            "mixture",
        )
    place(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gradmatch-", dir=place(out).parent) as folder:
        merged = Path(folder) / "merged"
        found = run(made, merged, progress=progress, **options) if made.families else []
        several = len(made.families) > 1
        folders = [merged / f"family-{n}" if several else merged for n in range(1, len(made.families) + 1)]
        families = [Task(str(one), name=f"family {n}") for n, one in enumerate(folders, 1)]
        arguments = {"level": "model", "routing": "sample", **made.mixture}
        report: Made = mix(
            made.base, [*families, *singles], out=out, overwrite=overwrite, progress=progress, **arguments
        ).report
    report.notes += notes
    return found, report
