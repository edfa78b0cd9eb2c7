"""Whether an adapter is expanded on the base that it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradmatch.common.warning import warn
from gradmatch.estimators.files import read_json
from gradmatch.models.adapter_config import CONFIG
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.hub import HUB_ID
from gradmatch.models.reference import hub_id, published
from gradmatch.models.views import like

CLOSE = 2**-7, 1e-7  # relative and absolute: what rounding to bfloat16 and float16 leaves


def base_notes(adapter: Path, base: Checkpoint, open_named: Callable[[], Checkpoint]) -> tuple[str, ...]:
    """What to say where an adapter was trained on another base than the one it is given; warns where that is known.

    Known it is where the named base is at hand and its weights differ, or where both are hub ids. The same folder by another path,
    a copy under another name, and the snapshot of a named hub id are the same base.

    Args:
        adapter: its folder.
        base: what it is expanded on.
        open_named: opens what the config names, from this machine alone.

    Returns:
        Notes; none where they are the same.
    """
    named = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        return ()
    called = hub_id(base.names[0]) or str(
        (base.config or {}).get("_name_or_path") or "" if base.module else ""
    )
    here = Path(named).expanduser()
    if called == named or (base.path is not None and here.resolve() == base.path.resolve()):
        return ()
    names = published(here) if here.is_absolute() or here.exists() else named, base.names[0]
    why, known = "", True
    try:
        trained = open_named()
    except (OSError, ValueError):
        if here.name in (base.names[0], called.rpartition("/")[2]):
            return ()
        known = all(HUB_ID.match(name) and not Path(name).exists() for name in (named, called))
        why = (
            ""
            if known
            else f"; whether these are the same could not be looked at, as {names[0]!r} is not here"
        )
    else:
        why = _first_difference(trained, base)
        if not why:
            return ()
    if known:
        warn(
            f"{adapter} was trained on {named!r}, and is expanded on {base.where}{why}; give it the base that it was trained on, "
            "unless that is meant"
        )
    return (f"{published(adapter)} was trained on {names[0]!r}, and is expanded on {names[1]!r}{why}",)


def _first_difference(trained: Checkpoint, base: Checkpoint) -> str:
    """The first tensor of both that differs in some sampled values, with the values; "" where there is none."""
    import torch

    twin = like(trained, base)
    for name in base.store:
        if name not in twin or twin.spec(name).shape != base.spec(name).shape:
            continue
        if any(one.spec(name).dtype not in ("F64", "F32", "F16", "BF16") for one in (twin, base)):
            continue
        samples = [model.sample(name)[1] for model in (twin, base)]
        if samples[0] == samples[1]:
            continue
        # rounded, so that copies in float32 and bfloat16 agree
        there, here = (torch.frombuffer(bytearray(one), dtype=torch.bfloat16).float() for one in samples)
        relative, absolute = CLOSE if twin.spec(name).dtype != base.spec(name).dtype else (0.0, 0.0)
        apart = ~torch.isclose(there, here, relative, absolute, equal_nan=True)
        if apart.any():
            at = int(apart.nonzero()[0])
            return f", whose weights differ (first {name!r}: {there[at]:.4g} there, {here[at]:.4g} here)"
    return ""
