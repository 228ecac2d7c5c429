"""Do examples influence each other on the way back? Output gradients at the taps, under two weightings of the losses.

Backward is linear: with weight $w_b$ on the loss of example $b$, its rows of every gradient are $w_b$ times what they
are without, if they are the example's own. A custom autograd function or a gradient hook may break that, for
example with `g - g.mean(0)`, and no run of the forward shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Held, Single
from perex.capture.doubts import FAINT
from perex.capture.forward import Forward, Tapped
from perex.capture.precision import precision
from perex.errors import ExamplesMixError, PerexError, UnsupportedError
from perex.kernels.products import widen
from perex.rules.call import Call

LEAST = 2.0**-18
"""How far off an element may be where float16 has few digits left, or none."""

Print = tuple[Tensor, Tensor, float]
"""Projection and norm of each example's rows, `(B,)` each, and by how much they may be off."""

RUN = 2**16
"""How many random signs there are: those of further elements are these again, times one of them for each run."""

POWERS = 16
"""Weights are powers of two below 2 to the 16th, of either sign: rounding then is the same with and without."""


def weights_of(count: int, half: bool) -> Tensor:
    """`(N,)` weights that differ between any two of 32 neighbours, or of four where half precision has room for few."""
    numbers = torch.arange(count, device="cpu")
    places = (numbers + 13 * (numbers // (2 * POWERS))) % (2 * POWERS)  # so that those 32 apart differ as well
    powers = places % 2 if half else places % POWERS
    signs = places // 2 % 2 if half else (places + places // POWERS) % 2
    return (1.0 - 2.0 * signs) * 2.0**powers


def weighted(rows: Tensor, axis: Held, weights: Tensor) -> Tensor:
    """Rows of examples times the weight of each row's example."""
    if isinstance(axis, Single):
        return rows * weights[axis.example].to(rows)
    own = torch.cat([weights, weights.new_zeros(1)])[
        axis.ids(len(weights))
    ]  # a row of nobody's, -1, counts for nothing
    return rows * own.to(rows).reshape([-1 if dim == axis.dim else 1 for dim in range(rows.dim())])


class Probe:
    """What the taps got in a weighted backward, to be compared with what they get in another one.

    Of each example's output gradient $g_b$ at each tap it keeps $\\langle r, g_b \\rangle$ for one random $r$, and the
    norm, by which deviations are measured.

    Args:
        weights: for each forward, what the losses of its examples were multiplied by, `(B,)`.

    Attributes:
        weighted: whether the backward that is running is the weighted one.
        error: what the other one has shown, if anything.
        blank: whether a tap got nothing to compare: zeros, as behind a head that is zero at first, or no numbers.
    """

    def __init__(self, weights: Mapping[Forward, Tensor]) -> None:
        self.weights = weights
        self.half = any(forward.half for forward in weights)
        self.coarse = 0.0  # what the coarsest numbers resolve, on a GPU, where two runs add up in different orders
        self.weighted = True
        self.error: PerexError | None = None
        self.blank = False
        self.seen: dict[int, list[Print | None]] = {}
        self.signs: dict[tuple[Any, ...], Tensor] = {}

    def prints(self, call: Call, grads: Sequence[Tensor | None]) -> list[Print | None]:
        """What is kept of each output's gradient."""
        found: list[Print | None] = []
        for grad, axis in zip(grads, call.out_axes, strict=True):
            if grad is None or grad.is_sparse or not grad.numel():
                found.append(None)
                continue
            self.coarse = max(self.coarse, precision(grad, call.name) if grad.is_cuda else 0.0)
            rows = widen(axis.front(grad.detach(), call.batch)).resolve_conj()
            rows = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(len(rows), -1)
            found.append((self.projected(rows), rows.norm(dim=1), LEAST * rows.size(1) ** 0.5 if self.half else 0.0))
        return found

    def projected(self, rows: Tensor) -> Tensor:
        """The inner product of each row with random signs, which take no memory to speak of beside long rows."""
        key = rows.dtype, rows.device
        if key not in self.signs:
            random = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (RUN,), generator=random, dtype=torch.int8, device="cpu") * 2 - 1
            self.signs[key] = signs.to(rows)
        signs, total = self.signs[key], rows.new_zeros(len(rows))
        for number, run in enumerate(rows.split(RUN, 1)):
            total += run @ signs[: run.size(1)] * signs[number]
        return total

    def receive(self, tapped: Tapped, grads: Sequence[Tensor | None]) -> None:
        """Take what a tap got in the weighted backward; in the other, see whether it fits."""
        call = tapped.call
        if self.weighted:
            self.seen[id(tapped)] = self.prints(call, grads)
            return
        before = self.seen.pop(id(tapped), None)
        weights = self.weights.get(tapped.forward)
        if before is None or weights is None or self.error is not None:
            return
        for one, other in zip(before, self.prints(call, grads), strict=True):
            if one is None or other is None:
                continue
            self.blank = self.blank or not bool((other[1].isfinite() & (other[1] > 0)).any())
            if not fits(one, other, weights, call.examples, self.coarse):
                self.error = mixed_behind(call)


def fits(weighted: Print, plain: Print, weights: Tensor, examples: list[int] | None, coarse: float = 0.0) -> bool:
    """Whether projections under weights are the weights times those without, as far as the precision can tell."""
    (found, size, least), (once, norm, _) = weighted, plain
    own = (weights if examples is None else weights[examples]).to(once)
    eps = max(float(torch.finfo(torch.float16 if least else once.dtype).eps), coarse)
    slack = eps**0.5 * torch.maximum(size, own.abs() * norm) + eps * own.abs() * norm.nan_to_num(0, 0, 0).max()
    slack += least * own.abs()
    off = (found - own * once).abs() > slack  # false for NaN: what overflowed is no evidence
    return not bool((off & found.isfinite() & once.isfinite()).any())


def mixed_behind(call: Call) -> PerexError:
    """The error for a gradient that is not in proportion to its example's loss."""
    place = f"of module '{call.where}'" if call.where else "of the model's own parameters"
    return ExamplesMixError(
        f"Between the output {place} and the losses, the backward does not treat examples alone: the gradient that one "
        "gets there is not in proportion to its own loss. A custom autograd function or a gradient hook works across "
        "examples, or clips; or draws random numbers of its own. Then no example has a gradient of its own. Take it "
        "off; or, if it cannot run twice, attach(..., audit=False) does without this check"
    )


def watched(hook: Callable[[Tensor], Tensor | None], forward: Forward, axis: Held) -> Callable[[Tensor], Any]:
    """A gradient hook of the user's; an error if what it makes of a gradient is not each example's own.

    Args:
        hook: the user's. It is called twice where it changes the gradient.
        forward: in which it was registered.
        axis: of the tensor that it was registered on.
    """
    name = getattr(hook, "__qualname__", repr(hook))

    @functools.wraps(hook)
    def run(grad: Tensor) -> Tensor | None:
        if grad is None:  # of a result that the loss does not depend on, beside others that perex taps together
            return None  # type: ignore[unreachable]
        version = grad._version
        out = hook(grad)
        if grad._version != version:
            forward.refuse(
                UnsupportedError(
                    f"The gradient hook {name} changes the gradient in place, so perex cannot see whether it keeps "
                    "examples apart: let it return a new tensor"
                )
            )
        if out is None or out is grad or out.shape != grad.shape or forward.batch < 2:
            return out
        forward.changed = True
        if forward.strength > FAINT:  # it may hold a number that left torch
            forward.receiver.changed()
        weights = weights_of(forward.batch, grad.dtype == torch.float16)
        with torch.no_grad():
            again, expected = hook(weighted(grad, axis, weights)), weighted(out.detach(), axis, weights)
        largest = float(out.detach().abs().nan_to_num(0.0, 0.0).max()) if out.numel() else 0.0
        if again is None or not torch.allclose(again, expected, 1e-3, 1e-3 * largest, equal_nan=True):
            forward.refuse(
                ExamplesMixError(
                    f"The gradient hook {name} does not treat examples alone: what it makes of one's gradient is not "
                    "in proportion to that one's loss. It works across examples, or clips, or draws random numbers; "
                    "then no example has a gradient of its own. Take it off"
                )
            )
        return out

    return run


def closed_over(hook: Callable[..., Any]) -> list[Tensor]:
    """The tensors that a hook has from the function that it was written in."""
    cells = getattr(hook, "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells if cell != CellType()]  # an empty one is like it
    return [value for value in values if isinstance(value, Tensor)]


@contextmanager
def same_draws() -> Iterator[None]:
    """Put random states back afterwards, so that the next backward draws what this one did."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def watch_modules(hooks: Iterable[Any], forward: Forward) -> None:
    """Hear of it when hooks of modules change gradients."""

    def ran(inner: Sequence[Tensor | None], outer: Sequence[Tensor | None]) -> None:
        pairs = [(a, b) for a, b in zip(inner, outer, strict=True) if a is not b]
        if any(a is None or b is None or a.data_ptr() != b.data_ptr() for a, b in pairs):
            forward.hook_changed()

    for node in hooks:
        node.register_hook(ran)
