"""Stage: diagnose every case of one seed, and note what came out on top."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.diagnosis import tiny
from experiments.diagnosis.cases import CASES, VARIANTS, Case
from gradmatch import diagnose


def diagnose_cases(out: Path, *, seed: int, cases: Sequence[str]) -> None:
    """Build each case in a world of this seed, diagnose it with data, and write `out/cases.json`."""
    torch.manual_seed(seed)
    world = tiny.make_world(seed)
    known = {**CASES, **VARIANTS}
    rows = [
        diagnose_case(name, known[name], world) | {"variant": name in VARIANTS}
        for name in tqdm(cases, desc=f"diagnosing, seed {seed}")
    ]
    (out / "cases.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def diagnose_case(name: str, case: Case, world: Any) -> dict[str, Any]:
    """Build a case, diagnose it, and note what came out on top."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the faults are deliberate
        arguments = case.build(world)
        start = time.perf_counter()
        result = diagnose(**arguments)
    first = result.causes[0] if result.causes else None
    return {
        "case": name,
        "expected": case.expected,
        "found": first.name if first else "",
        "subject": first.subject if first else "",
        "right": (first.name if first else "") == case.expected,
        "right_subject": first is not None and case.subject in first.subject,
        "causes": [[cause.name, cause.subject, cause.cost] for cause in result.causes],
        "seconds": round(time.perf_counter() - start, 2),
    }
