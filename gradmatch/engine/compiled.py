"""The functions of `blocks.c` with their types, as ctypes calls them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_ssize_t, c_void_p
from pathlib import Path

from gradmatch.estimators import native

SOURCE = Path(__file__).with_name("blocks.c")


class Source(Structure):
    """Values in memory, or in a file from a byte on, where `data` is None."""

    _fields_ = (
        ("data", c_void_p),
        ("room", c_void_p),
        ("offset", c_int64),
        ("fd", c_int32),
        ("kind", c_int32),
    )


class Target(Structure):
    """Where merged values go, and what is measured of their rounding."""

    _fields_ = (
        ("data", c_void_p),
        ("first", c_int64),
        ("block", c_int64),
        ("every", c_int64),
        ("kind", c_int32),
        ("bad", c_int32),
        ("error", c_double),
        ("update", c_double),
    )


class CurvedTask(Structure):
    """A task of Eq. 12."""

    _fields_ = (
        ("theta", Source),
        ("mean", Source),
        ("alpha", c_float),
        ("examples", c_float),
        ("curved", c_int32),
    )


class Voter(Structure):
    """A task of TIES."""

    _fields_ = (("theta", Source), ("alpha", c_float), ("threshold", c_float), ("c", c_float))


class Histogram(Structure):
    """Counts of the bits of one task vector."""

    _fields_ = (("theta", Source), ("counts", c_void_p), ("prefix", c_int32))


class Kernels:
    """The library, its functions typed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        source, target = POINTER(Source), POINTER(Target)
        number, numbers, health, size, flag = c_float, POINTER(c_float), POINTER(c_double), c_ssize_t, c_int
        self.step: int = library.values_of_step()
        self.chunk: int = library.values_of_chunk()
        self.linear, self.eq12, self.ties = library.linear, library.eq12, library.ties
        self.count_bits = library.count_bits
        self.linear.argtypes = [size, size, source, numbers, source, target]
        task = POINTER(CurvedTask)
        self.eq12.argtypes = [size, size, task, source, source, number, number, number, target, health]
        voter = POINTER(Voter)
        self.ties.argtypes = [
            *(size, size, voter, source, number, number, number, flag, c_void_p),
            *(target, health),
        ]
        self.count_bits.argtypes = [size, size, POINTER(Histogram), source]


def kernels() -> Kernels | None:
    """The compiled functions, where they were built and `GRADMATCH_KERNEL` is not 0."""
    library = None if native.asked() is False else native.load(SOURCE)
    return Kernels(library) if library else None
