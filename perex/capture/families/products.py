"""Products of tensors: matmul, einsum and their kin."""

from __future__ import annotations

from torch import Tensor

from perex.capture.axis import Axis, Label
from perex.capture.carry import Operation, dims_of, family, result_tensor
from perex.capture.families.elementwise import aligned

SECOND = {"mm": "mat2", "bmm": "mat2", "mv": "vec", "dot": "tensor"}
"""What products call their second argument, if not `other`."""


@family("matmul mm bmm mv dot vdot")
def matmul(op: Operation) -> Label:
    """`(..., m, k) @ (..., k, n)`; one-dimensional arguments lose the dimension they lend."""
    x, y = op.arg(0, "input"), op.arg(1, SECOND.get(op.name, "other"))
    x, y = (y, x) if op.name == "rmatmul" else (x, y)
    if op.name in ("vdot", "dot"):
        agrees = len({axis for _, axis in op.batched()}) == 1
        return op.contracted() if agrees and x.dim() == 1 == y.dim() else op.unknown()
    out = result_tensor(op)
    places = set()
    for tensor, other, contracted, row in ((x, y, -1, -2), (y, x, -2, -1)):
        axis = op.axis(tensor)
        if axis is None:
            continue
        back = axis.dim - tensor.dim()
        if tensor.dim() == 1 or back == contracted:
            facing = op.axis(other)
            place = -1 if other.dim() == 1 or contracted == -2 else -2
            agrees = facing is None or (facing.dim - other.dim() == place and facing.moved(0) == axis.moved(0))
            return op.contracted() if agrees else op.mixed("pairs examples with each other")
        if back == row:
            places.add(axis.moved(out.dim() - 1 if row == -1 or other.dim() == 1 else out.dim() - 2))
        else:
            lent = 1 if other.dim() == 1 else 0  # the missing dimension is gone from the result
            places.add(axis.moved(out.dim() + back + lent))
    return places.pop() if len(places) == 1 else op.mixed("pairs examples with each other")


@family("vecdot")
def vecdot(op: Operation) -> Label:
    """`(x * y).sum(dim)`, x and y broadcast against each other."""
    x, y, dim = op.arg(0, "input"), op.arg(1, "y"), op.arg(2, "dim", -1)
    ndim = max(x.dim(), y.dim())
    gone = dim % ndim
    places = {axis.moved(axis.dim - tensor.dim() + ndim) for tensor, axis in op.batched()}
    if len(places) != 1:
        return op.mixed("pairs examples with each other")
    axis = places.pop()
    return op.contracted() if axis.dim == gone else axis.moved(axis.dim - (axis.dim > gone))


@family("addmm addmv baddbmm addbmm")
def matmul_with_bias(op: Operation) -> Label:
    """`input + x @ y`, where the batch axis of the product decides."""
    if op.name.startswith("addbmm"):
        return op.unknown("sums over its first dimension")
    names = ("mat", "vec") if op.name == "addmv" else ("batch1", "batch2") if op.name == "baddbmm" else ("mat1", "mat2")
    bias, x, y = op.arg(0, "input"), op.arg(1, names[0]), op.arg(2, names[1])
    inputs = [(tensor, op.label(tensor)) for tensor in (x, y)]  # where the bias may be, too
    product = Operation("matmul", (x, y), {}, op.out, op.results, inputs, op.batch)
    if not product.batched():
        return aligned(op)
    label = matmul(product)
    own = op.axis(bias)
    if own is not None and aligned(op, [(bias, own)]) != label:
        return op.mixed("pairs examples with each other")
    return label


@family("_grouped_mm grouped_mm")
def grouped_mm(op: Operation) -> Label:
    """`(N, d_in)` rows in groups, each with a weight of `(E, d_in, d_out)`: row by row."""
    x = op.args[0]
    axis = op.axis(x)
    return axis if axis is not None and axis.dim == 0 and x.dim() == 2 and op.only(x) else op.mixed()


@family("tensordot")
def tensordot(op: Operation) -> Label:
    """`tensordot(x, y, dims)`: what is left of x, then what is left of y."""
    x, y = op.args[:2]
    dims = op.arg(2, "dims", 2)
    if isinstance(dims, int):
        dims = (range(x.dim() - dims, x.dim()), range(dims))
    if isinstance(dims, Tensor) or len(op.batched()) != 1:
        return op.unknown()
    contracted = [dims_of(list(d), t.dim()) if len(d) else [] for d, t in zip(dims, (x, y), strict=True)]
    first = op.axis(x) is not None
    axis, taken = op.batched()[0][1], contracted[0 if first else 1]
    if axis.dim in taken:
        return op.contracted()
    before = 0 if first else x.dim() - len(contracted[0])
    return axis.moved(before + axis.dim - sum(d < axis.dim for d in taken))


@family("inner")
def inner(op: Operation) -> Label:
    """`inner(x, y)`: the last dimensions contracted; what is left of x, then what is left of y."""
    x, y = op.args[:2]
    if len(op.batched()) != 1 or x.dim() == 0 or y.dim() == 0:
        return op.unknown()
    tensor, axis = op.batched()[0]
    if axis.dim == tensor.dim() - 1:
        return op.contracted()
    return axis if op.axis(x) is not None else axis.moved(axis.dim + x.dim() - 1)


@family("cdist")
def cdist(op: Operation) -> Label:
    """`(..., P, d)` and `(..., R, d)` to `(..., P, R)`."""
    x, y = op.args[:2]
    out = result_tensor(op)
    places = set()
    for tensor, place in ((x, -2), (y, -1)):
        axis = op.axis(tensor)
        if axis is not None:
            back = axis.dim - tensor.dim()
            if back == -1:
                return op.contracted()
            places.add(axis.moved(out.dim() + (place if back == -2 else back)))
    return places.pop() if len(places) == 1 else op.mixed("pairs examples with each other")


@family("einsum")
def einsum(op: Operation) -> Label:
    """The letter of the batch axis must be one letter everywhere and survive into the result."""
    equation, operands = op.args[0], list(op.args[1:])
    if not isinstance(equation, str):
        return op.unknown("is called without an equation string")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    left, _, right = equation.replace(" ", "").partition("->")
    out = result_tensor(op)

    def letters(term: str, ndim: int) -> list[str]:
        """One name a dimension; the dimensions of an ellipsis are named from the right."""
        before, dots, after = term.partition("...")
        hidden = ndim - len(before) - len(after)
        return list(before) + ([f".{hidden - i}" for i in range(hidden)] if dots else []) + list(after)

    terms = left.split(",")
    if "->" not in equation:
        flat = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    names = set()
    found: set[Axis] = set()
    for term, operand in zip(terms, operands, strict=True):
        axis = op.axis(operand)
        if axis is not None:
            named = letters(term, operand.dim())
            names.add(named[axis.dim])
            found.add(axis.moved(0))
            if named.count(named[axis.dim]) > 1:
                return op.mixed("takes a diagonal of the batch axis")
    named = letters(right, out.dim())
    if len(names) != 1 or len(found) != 1:
        return op.mixed("pairs examples with each other")
    name = names.pop()
    return found.pop().moved(named.index(name)) if name in named else op.contracted()
