"""How much is said while work goes on: one environment variable, and one default for progress bars."""

from __future__ import annotations

import os
import sys

from gradmatch.estimators.names import choose

VARIABLE = "GRADMATCH_VERBOSITY"
LEVELS = ("quiet", "normal", "verbose")


def verbosity() -> str:
    """What `GRADMATCH_VERBOSITY` says: "quiet" (warnings and results alone), "normal" (the default) or "verbose" (every log line).

    Raises:
        ValueError: another word.
    """
    level = os.environ.get(VARIABLE) or "normal"
    choose(VARIABLE, level, LEVELS)
    return level


def shown(progress: bool | None) -> bool:
    """Whether a progress bar is drawn: as asked; where nothing is asked, on a terminal or in a notebook, unless all is quiet.

    >>> shown(True), shown(False)
    (True, False)
    """
    if progress is not None:
        return progress
    return verbosity() != "quiet" and (sys.stderr.isatty() or "ipykernel" in sys.modules)
