"""The compiled extension, built when the package is installed where there is a C compiler; without it torch does the work.

`GRADMATCH_KERNEL=0` switches it off. What gives the same bits as torch is used wherever it is there; what does not is used
where `GRADMATCH_KERNEL=1` asks for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
from functools import lru_cache
from pathlib import Path

NAME = "gradmatch._compiled"

log = logging.getLogger(__name__)


def asked() -> bool | None:
    """Whether `GRADMATCH_KERNEL` asks for the extension (True) or against it (False); None where it is not set."""
    value = os.environ.get("GRADMATCH_KERNEL", "")
    return None if value == "" else value != "0"


@lru_cache(maxsize=8)
def load(source: Path) -> ctypes.CDLL | None:
    """The library with the functions of a source; None where it was not built, or was built from another text of the source.

    Args:
        source: the C file, which lies beside the Python file that calls it.

    Example:
        >>> library = load(Path(__file__).with_name("squares.c"))
        >>> library is None or library.values_of_chunk() > 0
        True
    """
    found = importlib.util.find_spec(NAME)
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        stamp = getattr(library, f"source_of_{source.stem}")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, AttributeError) as error:
        log.warning("%s: torch does the work: %s", found.origin, error)
        return None
    stamp.restype = ctypes.c_char_p
    if stamp().decode() != digest:
        log.warning(
            "%s was built from another %s: torch does the work; install again", found.origin, source.name
        )
        return None
    return library
