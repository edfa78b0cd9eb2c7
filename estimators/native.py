"""C kernels: compiled once a machine into the user's cache, loaded by ctypes; where that fails torch does the work.

`GRADMATCH_KERNEL=0` switches all of them off, `GRADMATCH_KERNEL=1` on wherever they can be used; without it each has a rule
of its own. The compiler is `$CC`, or gcc.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from gradmatch.estimators.files import cache_folder

log = logging.getLogger(__name__)


def asked() -> bool | None:
    """Whether `GRADMATCH_KERNEL` asks for kernels (True) or against them (False); None where it is not set."""
    value = os.environ.get("GRADMATCH_KERNEL", "")
    return None if value == "" else value != "0"


def has_compiler() -> bool:
    """Whether a compiler can be found at all."""
    return shutil.which(_compiler()[0]) is not None


@lru_cache(maxsize=8)
def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of a source, compiled where it has not been yet; None where that fails, once with a warning that says why."""
    try:
        return ctypes.CDLL(str(compiled(source, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("%s: no kernel, torch does the work: %s", source.name, detail)
        return None


def compiled(source: Path, flags: tuple[str, ...]) -> Path:
    """The library of this source, compiler and processor, in the user's cache.

    Raises:
        OSError: no compiler, or no place to write.
        subprocess.CalledProcessError: the compiler's complaint.
    """
    compiler = _compiler()
    identity = [source.read_text(encoding="utf-8"), *compiler, *flags, _processor()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    folder = cache_folder()
    target = folder / f"{source.stem}-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "made.so"
            command = [*compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(made, target)
    return target


def _compiler() -> list[str]:
    """The words of the compiler's command."""
    return shlex.split(os.environ.get("CC", "")) or ["gcc"]


def _processor() -> str:
    """What the processor can do: a cache may be shared by machines, and the code is made for one kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    known = [line for line in lines if line.startswith(("flags", "Features"))]
    return "\n".join([platform.machine(), *known[:1]])
