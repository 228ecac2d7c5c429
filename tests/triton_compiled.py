"""Compile all kernels for some kinds of GPUs, which need not be there; tests/test_triton.py runs this.

Prints for each: its name, dtype, bytes of shared memory, and whether it multiplies on tensor cores.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perex.kernels.triton import affine, convolution, outer, rows, turning
from perex.kernels.triton.tiles import LARGEST, LARGEST_PLAIN

READ = ("left", "right", "narrow", "wide", "grads", "x")
WRITTEN = ("out", "size", "mean", "variance", "weight", "bias", "terms", "values")
POINTERS = {"order": "*i64", "counts": "*i64", "table": "*i32", "wanted": "*u8", "doubts": "*u8"}
UNIT = ("left_m", "right_n", "grads_d", "narrow_c", "x_p", "grads_p", "x_d", "x_k")


PRODUCTS = (outer.direct_kernel, outer.gram_kernel, convolution.direct_kernel)
OTHERS = (
    outer.settling_kernel, convolution.shifted_kernel, rows.segments_kernel, affine.planes_kernel, affine.rows_kernel,
    turning.turning_kernel,
)  # fmt: skip


def compiled(kernel: Any, dtype: str, capability: int, **constants: Any) -> Any:
    signature, values, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in UNIT:
            signature[name], values[place,] = "constexpr", constants.get(name, 1)
            continue
        assert not (parameter.annotation_type and name[-2:-1] == "_"), "Triton would not look at this stride"
        pointer = POINTERS | dict.fromkeys(READ, f"*{dtype}") | dict.fromkeys(WRITTEN, "*fp32")
        signature[name] = pointer.get(name) or parameter.annotation_type or "i32"
        if not parameter.do_not_specialize:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    big = constants["COLUMNS"] == LARGEST
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8 if big else 4})


def main(capability: int) -> None:
    for dtype, precision, side, step in (
        ("bf16", "ieee", LARGEST, 64),
        ("fp32", "ieee", LARGEST_PLAIN, 16),
        ("fp32", "tf32", LARGEST, 32),
    ):
        constants = {"ROWS": side, "COLUMNS": side, "TILE": side, "STEP": step, "PRECISION": precision, "WIDEN": False}
        constants |= {"ALL": False, "SIDE": turning.TILE, "AT_ONCE": rows.AT_ONCE, "PLANES": 8, "CENTRED": True}
        for kernel in (*PRODUCTS, *OTHERS):
            found = compiled(kernel, dtype, capability, **constants)
            name = precision if precision == "tf32" else dtype
            print(kernel.__name__, name, found.metadata.shared, "mma" in found.asm["ptx"])


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        main(int(capability))
