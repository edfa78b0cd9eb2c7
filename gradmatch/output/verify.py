"""Checks of a completed output before it is put into place: what was promised is what the files hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.structure import architecture

if TYPE_CHECKING:
    from gradmatch.plan.step import Plan


def verify(checkpoint: Checkpoint, made: Plan) -> None:
    """Compare names, shapes, dtypes and ties with the plan; with verify="reload", let transformers load the folder too.

    Values were checked for NaN and Inf as they were written.

    Raises:
        ValueError: the files do not hold what was planned, or transformers finds tensors missing or unexpected.
    """
    planned = {step.name: step.spec for step in made.steps}
    held = {name: checkpoint.spec(name) for name in checkpoint.store}
    if held != planned:
        wrong = sorted(name for name in {*held, *planned} if held.get(name) != planned.get(name))
        name = wrong[0]
        raise GradmatchError(
            f"{checkpoint.path}: {name!r} is {held.get(name)}, planned was {planned.get(name)}; the output is not put into place",
            "bad_output",
            checkpoint.path,
        )
    if made.request.verify == "reload":
        reload(checkpoint)


def reload(checkpoint: Checkpoint) -> None:
    """Build the architecture of the config and load the folder into it.

    Raises:
        ValueError: no config, or tensors that the architecture lacks or misses.
    """
    if checkpoint.config is None:
        raise GradmatchError(
            f"{checkpoint.path} has no config.json, so transformers cannot load it; leave verify='files'",
            "bad_output",
            checkpoint.path,
        )
    import transformers

    loader = architecture(checkpoint.config) or transformers.AutoModel
    _, info = loader.from_pretrained(checkpoint.path, output_loading_info=True, trust_remote_code=False)
    problems = {
        key: sorted(info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }
    if problems:
        raise GradmatchError(
            f"{checkpoint.path}: transformers reports {problems}; the output is not put into place",
            "bad_output",
            checkpoint.path,
        )
