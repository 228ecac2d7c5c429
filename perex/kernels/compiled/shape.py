"""What the kernels are told of a convolution: `Shape` of `shape.h`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from perex.kernels.compiled.library import lanes
from perex.kernels.geometry import Geometry

CACHED = 2**17
"""How many numbers of an image and its output gradient a thread packs at once: half of a common second-level cache."""

LONGEST = 32
"""The longest row of a convolution's kernel; as in `kernels.c`."""


def applies(geometry: Geometry) -> bool:
    """Whether there are kernels: for images with one or two spatial dimensions."""
    return lanes() > 0 and len(geometry.stride) in (1, 2) and geometry.weight_shape[-1] <= LONGEST


def oriented(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """What the kernel moves over, and what it leaves, both `(B, R, C, y, x)`."""
    both = (grads, x) if geometry.transposed else (x, grads)
    wide, narrow = (t.unsqueeze(3) if t.dim() == 4 else t for t in both)
    return wide, narrow


def shape_of(wide: Tensor, narrow: Tensor, geometry: Geometry, whole: bool = False) -> Any:
    """The integers of `Shape` in `shape.h`, for what `oriented` gives; with `whole`, all of an image is one band."""
    layout = wide.shape, wide.stride(), narrow.shape, narrow.stride()
    return _shape_of(*layout, geometry, whole, torch.get_num_threads(), 2 * lanes(wide.dtype), CACHED)


@functools.lru_cache(1024)
def _shape_of(
    wide: torch.Size,
    of_wide: tuple[int, ...],
    narrow: torch.Size,
    of_narrow: tuple[int, ...],
    geometry: Geometry,
    whole: bool,
    threads: int,
    tile: int,
    cached: int,
) -> Any:
    batch, images, channels, *sides = wide
    places = narrow[3:]
    missing = 2 - len(geometry.stride)
    kernel, step, spread = (
        (1,) * missing + tuple(values) for values in (geometry.weight_shape[2:], geometry.stride, geometry.dilation)
    )
    padding = (0,) * missing + geometry.padding
    rows = narrow[2] // geometry.groups
    units = geometry.groups * -(-rows // tile)
    parts = 1 if batch % threads == 0 or batch >= 8 * threads else min(units, -(-4 * threads // batch))
    width = (places[1] - 1) * step[1] + (kernel[1] - 1) * spread[1] + 1
    a_row = channels // geometry.groups * width * step[0] + tile * places[1]
    band = places[0] if whole else max(1, min(places[0], cached // a_row))
    tasks = batch * (geometry.groups if whole else parts)
    found = (
        *(max(1, min(threads, tasks)), parts, batch, images, geometry.groups, rows, channels // geometry.groups),
        *(*sides, *places, *kernel, *step, *spread, *padding, band, *of_wide, *of_narrow),
    )
    return (ctypes.c_int64 * len(found))(*found)
