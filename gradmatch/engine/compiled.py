"""The functions of `blocks.c` with their types, as ctypes calls them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_ssize_t, c_void_p


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
        ("data", c_void_p), ("first", c_int64), ("block", c_int64), ("every", c_int64), ("kind", c_int32), ("bad", c_int32),
        ("error", c_double), ("update", c_double),
    )  # fmt: skip


class CurvedTask(Structure):
    """A task of Eq. 12."""

    _fields_ = (
        ("theta", Source), ("mean", Source), ("alpha", c_float), ("examples", c_float), ("alpha_examples", c_float),
        ("curved", c_int32),
    )  # fmt: skip


class Voter(Structure):
    """A task of TIES."""

    _fields_ = (("theta", Source), ("weight", c_float), ("excluded", c_float), ("votes", c_int32))


class Window(Structure):
    """One threshold that is looked for."""

    _fields_ = (
        ("theta", Source), ("inside", c_void_p), ("above", c_int64), ("held", c_int64), ("low", c_float), ("high", c_float),
    )  # fmt: skip


class Kernels:
    """The library, its functions typed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        source, target, numbers, doubles = (
            POINTER(Source),
            POINTER(Target),
            POINTER(c_float),
            POINTER(c_double),
        )
        self.step: int = library.values_of_step()
        self.linear, self.eq12, self.ties, self.windows = (
            library.linear, library.eq12, library.ties, library.count_windows,
        )  # fmt: skip
        self.linear.argtypes = [c_ssize_t, c_ssize_t, source, numbers, source, target]
        self.eq12.argtypes = [
            c_ssize_t, c_ssize_t, POINTER(CurvedTask), source, source, c_float, c_float, c_float, target, doubles,
        ]  # fmt: skip
        self.ties.argtypes = [
            c_ssize_t, c_ssize_t, POINTER(Voter), source, c_ssize_t, numbers, c_float, c_float, c_int, c_float, target, doubles,
        ]  # fmt: skip
        self.windows.argtypes = [c_ssize_t, c_ssize_t, POINTER(Window), source]
