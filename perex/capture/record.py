"""What is kept of a batch while the model runs, so that some of its examples can be run alone and compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perex.capture.axis import Axis, Held, Label, Single
from perex.capture.labels import Labels, plain_name
from perex.capture.parameters import Entry, Shared
from perex.capture.precision import precision
from perex.capture.state import State
from perex.rules.call import Call

MOST = 4096
"""Of how many elements of a tensor an example's values are kept for comparison."""


class Sample(NamedTuple):
    """Some elements of a tensor, evenly spread: mixing shows in many, and memory is short."""

    shape: torch.Size
    values: Tensor


def sampled(tensor: Tensor) -> Sample:
    """Take a sample, a copy: the tensor may be changed in place."""
    flat = tensor.detach().reshape(-1)
    step = len(flat) // MOST | 1  # odd, so that all columns of a matrix of even width have their turn
    return Sample(tensor.shape, flat[::step].clone())


Rows = dict[int, Tensor]
"""What an example has of a tensor, in the shape that it has alone, by the example's number."""

Samples = dict[int, Sample]
"""Samples of that."""

DRAWS = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout bernoulli rand randn randint randperm
    rand_like randn_like randint_like normal uniform exponential geometric cauchy log_normal random multinomial poisson
    rrelu scaled_dot_product_attention native_dropout
    """.split()
)
"""Operators that may draw random numbers."""


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator call draws random numbers."""
    name = plain_name(func)
    if name not in DRAWS:
        return False
    if "dropout" in name or name == "rrelu":
        last = {"rrelu": (3, "training", False)}.get(name, (2, "training", name in ("dropout",)))
        training = args[last[0]] if len(args) > last[0] else kwargs.get("train", kwargs.get(last[1], last[2]))
        return bool(training) and not (name != "rrelu" and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) == 0)
    if name == "scaled_dot_product_attention":
        return bool((args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0)
    return True


@dataclass
class Seen:
    """What the examples had at one place.

    Attributes:
        where: the module.
        key: the parameters that met them there.
        rows: what they had.
    """

    where: str
    key: tuple[str, ...]
    rows: Samples


@dataclass
class Draw:
    """What a random operator gave: rows of examples, or one tensor for all; and the rows it was given.

    Attributes:
        name: of the operator.
        given: the rows of its arguments.
        rows: the rows of its results.
    """

    name: str
    given: list[Seen]
    rows: list[Rows | Tensor]


class Record:
    """Keeps what a few examples of a batch have, while the model runs.

    Args:
        examples: their numbers.
        batch: number of examples in the batch, B.
        module: the module whose call it is.
        inputs: its `(args, kwargs)` for an example alone.
    """

    def __init__(
        self,
        examples: Sequence[int],
        batch: int,
        module: nn.Module,
        inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        self.examples = examples
        self.batch = batch
        self.module = module
        self.inputs = {b: inputs(b) for b in examples}
        self.seen: list[Seen] = []
        self.draws: list[Draw] = []
        self.outputs: list[Seen] = []
        self.versions: list[int] = []  # of the parameters before
        kinds = {p.device.type for p in module.parameters()} | {"cpu"}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self.precision = 0.0  # of the coarsest numbers that were seen: what comes after them is no finer
        self.state = random.getstate(), np.random.get_state()
        self.before = State(module, copies=True)

    def rows(self, tensor: Tensor, held: Held) -> Rows:
        """The rows of the recorded examples in a tensor."""
        return {b: rows.clone() for b, rows in self.each(tensor.detach(), held)}

    def samples(self, tensor: Tensor, held: Held) -> Samples:
        """Samples of these rows."""
        if tensor.is_floating_point() or tensor.is_complex():
            self.precision = max(self.precision, float(torch.finfo(tensor.dtype).eps))
        return {b: sampled(rows) for b, rows in self.each(tensor.detach(), held)}

    def each(self, tensor: Tensor, held: Held) -> Iterator[tuple[int, Tensor]]:
        """The examples that have rows in a tensor, with these: views where they lie side by side."""
        if isinstance(held, Single):
            if held.example in self.examples:
                yield held.example, tensor
            return
        ids = held.ids(self.batch)
        for b in self.examples:
            where = (ids == b).nonzero().flatten()
            first, last = (int(where[0]), int(where[-1])) if len(where) else (0, -1)
            if last - first + 1 == len(where):
                rows = tensor.narrow(held.dim, first, len(where))
            else:
                rows = tensor.index_select(held.dim, where.to(tensor.device))
            if rows.numel():
                yield b, rows

    def met(self, call: Call, results: Sequence[Tensor], axes: Sequence[Held]) -> None:
        """Parameters have met examples."""
        if any(isinstance(source, Shared) for source in call.slots.values()):
            return
        key = tuple(sorted(source.name for source in call.slots.values() if isinstance(source, Entry)))
        self.precision = max(self.precision, precision(results[0], call.name))
        self.seen.append(Seen(call.where, key, self.samples(results[0], axes[0])))

    def noticed(self, tensor: Tensor) -> None:
        """An operator has given a tensor: what comes after it is no finer, whether or not a parameter was in it."""
        if tensor.is_floating_point() or tensor.is_complex():
            self.precision = max(self.precision, float(torch.finfo(tensor.dtype).eps))

    def given(self, where: str, labels: Labels, tensors: list[Tensor]) -> list[Seen]:
        """What a random operator is given."""
        return [Seen(where, (), {} if (held := labels.held(t)) is None else self.samples(t, held)) for t in tensors]

    def drew(self, func: Any, given: list[Seen], out: list[tuple[Tensor, Label]]) -> None:
        """Random numbers have been drawn."""
        rows: list[Rows | Tensor] = [
            self.rows(t, held) if isinstance(held, (Axis, Single)) else t.detach().clone() for t, held in out
        ]
        self.draws.append(Draw(plain_name(func), given, rows))

    def returned(self, tensor: Tensor, label: Label) -> None:
        """An output of the model."""
        held = label if isinstance(label, (Axis, Single)) and tensor.is_floating_point() else None
        rows = {} if held is None else self.samples(tensor, held)
        self.outputs.append(Seen("", (), rows))


def close(batched: Sample, single: Sample, coarse: float = 0.0) -> bool:
    """Whether two tensors agree as far as their precision, or a coarser one, can tell after many operators."""
    if batched.shape != single.shape:
        return True  # not comparable, as where one path flattens and the other does not
    rows, alone = batched.values, single.values
    size = max(float(rows.nan_to_num(0, 0, 0).abs().max()), float(alone.nan_to_num(0, 0, 0).abs().max()), 1e-30)
    slack = size * max(float(torch.finfo(rows.dtype).eps), coarse) ** 0.5
    return torch.allclose(rows, alone.to(rows), rtol=0.0, atol=slack, equal_nan=True)
