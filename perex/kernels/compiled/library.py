"""The shared library of kernels in C: found and loaded on the first question, if it was built and this CPU can run it.

Its loops run on OpenMP's threads, which are torch's own: the library is linked to no OpenMP, so that its calls are
bound to the one that torch has loaded. Where there is none, loading fails, and other ways have to do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perex.kernels.large import in_memory

VERSION = 3
"""What `kernels.c` says of itself; one more with each change of what its functions take."""

NAMES = {torch.float32: "float", torch.float64: "double"}
"""What C calls the numbers that there are kernels for."""

BITS = {torch.float32: 32, torch.float64: 64}
"""How many bits a number has."""

SPARE = 2**23
"""Bytes that are kept from one kernel's run to the next, at most."""

RUN = 256
"""Examples that a kernel adds up one after the other: long sums of float32 numbers lose digits, sums of sums fewer."""

_spare: list[Tensor] = []


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built, is of another version, or knows no instructions of this CPU."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                fits = found.perex_version() == VERSION and found.perex_bits() > 0
            except (AttributeError, OSError):
                return None
            return found if fits else None
    return None


@functools.cache
def bits() -> int:
    """How many bits the widest vectors have that this CPU and the kernels know; 0 where there is no library."""
    found = library()
    return 0 if found is None else int(found.perex_bits())


def lanes(dtype: torch.dtype = torch.float32) -> int:
    """How many numbers a vector holds."""
    return bits() // BITS[dtype]


def kernel(name: str, dtype: torch.dtype) -> Any:
    """A kernel for numbers of some type."""
    return _kernel(name, dtype, bits())


@functools.cache
def _kernel(name: str, dtype: torch.dtype, bits: int) -> Any:
    return getattr(library(), f"{name}_{NAMES[dtype]}_{bits}")


def asked(name: str, dtype: torch.dtype, shape: Any, *further: int) -> int:
    """What a function in C that counts numbers says of a shape."""
    return _asked(name, dtype, bits(), bytes(shape), *further)


@functools.lru_cache(1024)
def _asked(name: str, dtype: torch.dtype, bits: int, shape: bytes, *further: int) -> int:
    count = _kernel(name, dtype, bits)
    count.restype = ctypes.c_int64
    return int(count(shape, *map(ctypes.c_int64, further)))


class room:
    """As much memory as a kernel asks for, before it is called with a shape; for as long as it runs.

    What is not large is kept for the next one: memory that is new to the process costs more than writing to it.
    """

    __slots__ = ("space",)

    def __init__(self, name: str, dtype: torch.dtype, shape: Any, *further: int) -> None:
        size = asked(f"{name}_room", dtype, shape, *further) * dtype.itemsize
        try:
            space = _spare.pop()  # by one thread or another
        except IndexError:
            space = None
        if space is None or space.numel() < size:
            space = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.space = space

    def __enter__(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.space.data_ptr())

    def __exit__(self, *error: object) -> None:
        if self.space.numel() <= SPARE:
            _spare.append(self.space)


def in_runs(
    squares: Callable[[Tensor, Tensor, Tensor | None], Tensor], left: Tensor, right: Tensor, shape: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Squared norms of all examples, and the sum of their gradients, in which those of `RUN` are added up at a time.

    Args:
        squares: gives `(b, P)`, and leaves in its last argument the sum, if there is one.
        left: `(B, ...)`.
        right: `(B, ...)`.
        shape: of the sum; None if it is not wanted.

    Returns:
        Tensors `(B, P)`, terms to be added up, and `shape`, or None.
    """
    if shape is None:
        return squares(left, right, None), None
    total = left.new_empty(shape)
    parts = [squares(left[:RUN], right[:RUN], total)]
    for start in range(RUN, len(left), RUN):
        further = torch.empty_like(total)
        parts.append(squares(left[start : start + RUN], right[start : start + RUN], further))
        total += further
    return parts[0] if len(parts) == 1 else torch.cat([part.sum(1, keepdim=True) for part in parts]), total


def seen(operator: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel as torch's operator, where somebody counts or watches operators; else as the function that it is.

    By way of the operator, a call takes 20 microseconds more.
    """
    return operator if torch._C._len_torch_dispatch_stack() else run


def runnable(*tensors: Tensor) -> bool:
    """Whether kernels read these tensors: in a CPU's memory, all of one type, none of which autograd follows.

    Not those whose sign is noted in place of being changed, nor zeros that have no memory.
    """
    dtype = tensors[0].dtype
    if dtype not in NAMES:
        return False
    for t in tensors:
        if t.dtype != dtype or not in_memory(t) or t.requires_grad or t.is_neg() or t._is_zerotensor():
            return False
    return True


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's numbers begin."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
