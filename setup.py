"""The compiled part of gradmatch; everything else of the build stands in pyproject.toml.

It is optional: without a C compiler the installation succeeds and torch does the work. The library carries a digest of each
of its sources, so that one built from other sources is never used (`gradmatch.estimators.native`).
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ("gradmatch/engine/blocks.c", "estimators/squares.c")
# For any processor of the kind; what newer ones can do is chosen at run time. Nothing may be fused: see blocks.c.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]


def digest(source: str) -> str:
    """Of a source's text."""
    return hashlib.sha256((Path(__file__).parent / source).read_bytes()).hexdigest()


setup(
    ext_modules=[
        Extension(
            "gradmatch._compiled",
            list(SOURCES),
            define_macros=[(f"{Path(s).stem.upper()}_SOURCE", f'"{digest(s)}"') for s in SOURCES],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
