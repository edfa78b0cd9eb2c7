"""Results of stages as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD = "data.json"  # what is said of prepared data: the classes of each domain, and of a view their counts


def write_json(path: Path, content: Any) -> None:
    """One result of a stage, in the folder that is renamed when all are there."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
