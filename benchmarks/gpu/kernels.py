"""Times of the ways to one layer's norms, for the layers of GPT-2, ViT-B/16 and ResNet-50: what plans are set by.

    python benchmarks/gpu/kernels.py --out kernels.json              on a GPU, some minutes
    python benchmarks/gpu/kernels.py --device cpu --small            does it run? Two tiny layers

Each layer's own weight gradient, of the whole batch at once, is the yardstick: `plain`. Triton's kernels are compiled
beforehand, in several processes. Every way's norms are compared with `plain`'s arithmetic in float64 for one example.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from perex.kernels import convolution, outer  # noqa: E402
from perex.kernels.geometry import Geometry, weight_gradient  # noqa: E402
from perex.kernels.products import product  # noqa: E402
from perex.kernels.spot import Spot, at  # noqa: E402
from perex.kernels.triton.tiles import Tile  # noqa: E402

Way = Callable[[], Tensor]

OUTER = {
    # B, T, m, n
    "GPT-2 small qkv": (8, 1024, 2304, 768),
    "GPT-2 small out": (8, 1024, 768, 768),
    "GPT-2 small mlp": (8, 1024, 3072, 768),
    "GPT-2 small head": (8, 1024, 50257, 768),
    "GPT-2 medium mlp": (4, 1024, 4096, 1024),
    "ViT-B out": (32, 197, 768, 768),
    "ViT-B mlp": (32, 197, 3072, 768),
    "GPT T=256 mlp": (4, 256, 2048, 512),
    "GPT T=64 mlp": (16, 64, 1024, 256),
}

CONVOLUTIONS = {
    # B, C_in, C_out, side, kernel, stride
    "stem": (32, 3, 64, 224, 7, 2),
    "1x1 64-256 56": (32, 64, 256, 56, 1, 1),
    "1x1 512-128 28": (32, 512, 128, 28, 1, 1),
    "1x1 1024-256 14": (32, 1024, 256, 14, 1, 1),
    "1x1 512-2048 7": (32, 512, 2048, 7, 1, 1),
    "1x1 256-512 56/2": (32, 256, 512, 56, 1, 2),
    "3x3 64 56": (32, 64, 64, 56, 3, 1),
    "3x3 128 28": (32, 128, 128, 28, 3, 1),
    "3x3 256 14": (32, 256, 256, 14, 3, 1),
    "3x3 512 7": (32, 512, 512, 7, 3, 1),
    "3x3 128 56/2": (32, 128, 128, 56, 3, 2),
}

DIRECT = {
    torch.bfloat16: [
        Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ],
    torch.float32: [
        Tile(128, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3), Tile(128, 256, 32, 8, 3), Tile(256, 128, 32, 8, 3),
        Tile(128, 128, 16, 4, 4), Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3),
    ],
}  # fmt: skip
GRAM = {
    torch.bfloat16: [
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 2), Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 128, 4, 3),
    ],
    torch.float32: [
        Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 4),
    ],
}  # fmt: skip
CHANNELS = {
    torch.bfloat16: [
        Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 5), Tile(64, 64, 128, 4, 5), Tile(128, 64, 64, 4, 5),
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 5), Tile(128, 128, 64, 4, 5), Tile(64, 16, 128, 4, 5),
    ],
    torch.float32: [
        Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 5), Tile(128, 64, 32, 4, 5), Tile(128, 128, 32, 8, 3),
        Tile(128, 128, 16, 4, 5), Tile(64, 16, 32, 4, 5),
    ],
}  # fmt: skip
PAIRS = [Tile(32, 32, 0, 4, 1), Tile(64, 64, 0, 4, 1)]


def named(way: str, tile: Tile) -> str:
    return f"{way} {'x'.join(map(str, tile[:3]))} w{tile.warps} s{tile.stages}"


def padded(x: Tensor) -> Tensor:
    """Rows begin at multiples of 16 elements; what is added is zero."""
    width = x.shape[-1]
    found = x.new_empty(*x.shape[:-1], -(-width // 16) * 16)
    found[..., width:].zero_()
    found[..., :width].copy_(x)
    return found


def whole_gram(left: Tensor, right: Tensor) -> Tensor:
    """Both Gram matrices by the backend, multiplied and added up: what `Triton Gram` competes with."""
    terms = product(left, left.mT).mul_(product(right, right.mT)).flatten(1)
    return terms.sum(1) + 0 * torch.linalg.vector_norm(terms, 1, dim=1)


def outer_ways(left: Tensor, right: Tensor, tuned: bool = True) -> Iterator[tuple[str, Way]]:
    """Ways for `(B, 1, T, m)` and `(B, 1, T, n)`."""
    from perex.kernels.triton import outer as fused

    if tuned:
        yield "plain", lambda: left.flatten(0, 2).T @ right.flatten(0, 2)
        yield "direct", lambda: outer.direct(left, right)
        yield "whole Gram", lambda: whole_gram(left, right)
        if left.shape[3] % 8:
            yield "padding alone", lambda: padded(left)
            yield "direct, padded", lambda: outer.direct(padded(left), right)
            yield "whole Gram, padded", lambda: whole_gram(padded(left), right)
    for tile in DIRECT[left.dtype]:
        yield named("Triton direct", tile), lambda tile=tile: fused.direct(left, right, tile=tile)
    for tile in GRAM[left.dtype]:
        yield named("Triton Gram", tile), lambda tile=tile: fused.gram(left, right, tile=tile)


def convolution_ways(x: Tensor, grads: Tensor, geometry: Geometry, tuned: bool = True) -> Iterator[tuple[str, Way]]:
    """Ways for `(B, 1, C_in, H, W)` and `(B, 1, C_out, H', W')`."""
    from perex.kernels.triton import convolution as fused

    positions = grads.shape[3:].numel()
    if tuned:
        yield "plain", lambda: weight_gradient(x.flatten(0, 1), grads.flatten(0, 1), geometry)
        yield "unfolded", lambda: convolution.unfolded(x, grads, geometry)
        yield "channels last alone", lambda: fused.pixels(x).contiguous()
        if max(geometry.weight_shape[2:]) == 1 and max(geometry.stride) == 1:
            left, right = (t.flatten(3).mT for t in (grads, x))  # (B, 1, P, C)
            yield "product", lambda: outer.direct(left, right)
            for tile in DIRECT[x.dtype]:
                run = partial(direct_of, left, right, tile)
                yield named("Triton product", tile), run
    for tile in CHANNELS[x.dtype]:
        yield named("Triton direct", tile), lambda tile=tile: fused.direct(x, grads, geometry, tile=tile)
    if positions <= 1024:
        for tile in PAIRS:
            yield named("Triton pixel Gram", tile), lambda tile=tile: fused.pixel_gram(x, grads, geometry, tile=tile)


def direct_of(left: Tensor, right: Tensor, tile: Tile) -> Tensor:
    from perex.kernels.triton import outer as fused

    return fused.direct(left, right, tile=tile)


def conv_of(
    batch: int, into: int, out: int, side: int, kernel: int, stride: int, dtype: torch.dtype, device: str
) -> Any:
    geometry = Geometry(
        torch.Size((out, into, kernel, kernel)), (stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), 1
    )
    after = (side + 2 * (kernel // 2) - kernel) // stride + 1
    x, grads = (
        torch.randn(batch, 1, into, side, side, device=device),
        torch.randn(batch, 1, out, after, after, device=device),
    )
    return x.to(dtype), grads.to(dtype), geometry


def layers(dtype: torch.dtype, device: str, small: bool) -> Iterator[tuple[str, Iterator[tuple[str, Way]]]]:
    """Each layer's ways."""
    sizes = {"tiny": (2, 20, 24, 16)} if small else OUTER
    for name, (batch, positions, m, n) in sizes.items():
        left, right = (torch.randn(batch, 1, positions, k, device=device).to(dtype) for k in (m, n))
        yield name, outer_ways(left, right)
    for name, shape in ({"tiny": (2, 3, 8, 9, 3, 1)} if small else CONVOLUTIONS).items():
        yield name, convolution_ways(*conv_of(*shape, dtype, device))


def warm(dtype: torch.dtype, share: int, of: int) -> None:
    """Compile a share of the kernels, on inputs so small that they take no time."""
    found: list[Way] = []
    for positions in (32, 33):
        left, right = (torch.randn(1, 1, positions, k, device="cuda").to(dtype) for k in (512, 512))
        found += [way for _, way in outer_ways(left, right, tuned=False)]
    left, right = (torch.randn(1, 1, k, 32 * 32, device="cuda").to(dtype).mT for k in (64, 64))
    found += [partial(direct_of, left, right, tile) for tile in DIRECT[dtype]]
    left, right = (torch.randn(1, 1, k, 49, device="cuda").to(dtype).mT for k in (64, 64))
    found += [partial(direct_of, left, right, tile) for tile in DIRECT[dtype]]
    for into, out in ((64, 64), (3, 64)):
        found += [way for _, way in convolution_ways(*conv_of(1, into, out, 8, 3, 1, dtype, "cuda"), tuned=False)]
    for way in found[share::of]:
        try:
            way()
        except Exception as reason:
            print("warming:", type(reason).__name__, str(reason)[:150], flush=True)


def seconds(way: Way, device: str, budget: float = 0.02) -> float:
    """The median time of a call, of as many as the budget allows."""
    if device == "cpu":
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    way()
    torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    hosted = time.perf_counter() - start
    torch.cuda.synchronize()
    times = []
    for _ in range(max(3, min(10, int(budget / (time.perf_counter() - start))))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(3e9 * hosted))  # so that the host is ahead, and only the device is timed
        begin.record()
        way()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times of the ways to one layer's norms.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which no further layer is begun")
    parser.add_argument("--warm", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    dtypes = {"bf16": torch.bfloat16, "tf32": torch.float32}
    if options.warm:
        warm(dtypes[options.warm[0]], int(options.warm[1]), int(options.warm[2]))
        return
    start = time.perf_counter()
    if options.device == "cuda" and options.processes:
        each = options.processes // 2
        command = [sys.executable, __file__, "--warm"]
        running = [
            subprocess.Popen([*command, name, str(share), str(each)], env=os.environ | {"OMP_NUM_THREADS": "1"})
            for name in dtypes for share in range(each)
        ]  # fmt: skip
        for process in running:
            process.wait()
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for precision, dtype in dtypes.items():
        for layer, found in layers(dtype, options.device, options.small):
            if time.perf_counter() - start > options.limit:
                print("out of time before", precision, layer, flush=True)
                break
            with at(Spot(options.device, dtype)):
                cells = cells_of(found, options.device)
            rows.append({"layer": layer, "precision": precision, "ms": cells})
            told(layer, precision, cells)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


def cells_of(found: Iterator[tuple[str, Way]], device: str) -> dict[str, Any]:
    """Milliseconds by way, or why there are none."""
    cells: dict[str, Any] = {}
    reference: Tensor | None = None
    for name, way in found:
        try:
            first = way()
            norms = first.dim() == 1
            reference = first if norms and reference is None else reference
            off = float(((first.double() - reference.double()) / reference.double()).abs().max()) if norms else 0.0
            cells[name] = 1e3 * seconds(way, device) if off < 2e-3 else f"wrong: {off:.2g}"
        except Exception as reason:
            cells[name] = f"{type(reason).__name__}: {str(reason)[:100]}"
    return cells


def told(layer: str, precision: str, cells: dict[str, Any]) -> None:
    """Print what is the fastest of each kind."""
    best: dict[str, tuple[float, str]] = {}
    for name, cell in cells.items():
        kind = re.sub(r" \d+x\d+x\d+ w\d+ s\d+", "", name)
        if isinstance(cell, float):
            best[kind] = min(best.get(kind, (1e9, "")), (cell, name[len(kind) :].strip()))
        else:
            print("  !", name, cell)
    print(f"{precision} {layer}: " + "; ".join(f"{k} {v:.3f} {n}".strip() for k, (v, n) in best.items()), flush=True)


if __name__ == "__main__":
    main()
