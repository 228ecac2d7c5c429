"""What a model returns: where the examples are in it, and in its graph."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from perex.capture.axis import Axis, Held, Lost, Single
from perex.capture.inputs import packed_in
from perex.capture.mode import Capture
from perex.capture.nest import map_tensors, tensors_of
from perex.capture.parameters import Parameters, Shared
from perex.capture.sharding import EXIT, Exit
from perex.errors import UnsupportedError
from perex.rules.broadcast import returned


class Output:
    """One that gradients come through.

    A node of a Python function is held weakly: a graph that nobody else holds goes, with all that it has saved.

    Args:
        tensor: what the model returned.
        axis: where the examples are in it.
    """

    __slots__ = "axis", "node", "number"

    def __init__(self, tensor: Tensor, axis: Held) -> None:
        self.axis, self.number = axis, tensor.output_nr
        self.node: Callable[[], Any]
        if issubclass(type(tensor.grad_fn), BackwardCFunction):
            self.node = weakref.ref(tensor.grad_fn)
        else:
            edge = get_gradient_edge(tensor)
            self.node = lambda: edge.node

    @property
    def edge(self) -> GradientEdge:
        """Where it is in the graph, as long as there is a graph."""
        return GradientEdge(self.node(), self.number)


class Outputs:
    """Remembers the outputs of the latest forwards.

    Args:
        parameters: the model's parameters.
        batch_dim: the dimension that holds the examples.

    Attributes:
        labels: each output of the latest forward, and where the examples are in it.
        edges: for each forward since the last backward (two at most), its number and its outputs in the graph; see
            `alive`.
    """

    def __init__(self, parameters: Parameters, batch_dim: int) -> None:
        self.parameters = parameters
        self.batch_dim = batch_dim
        self.labels: list[tuple[weakref.ref[Tensor], Held | Lost]] = []
        self.edges: list[tuple[int, list[Output]]] = []

    def finish(self, capture: Capture, out: Any) -> Any:
        """Take up what a model returns, and give out what it is to return in its place."""
        if any(isinstance(capture.labels.of(tensor), Shared) for tensor in tensors_of(out)):
            out = self.tap_shared(capture, out)
        if self.parameters.sharded or type(out) in (Tensor, tuple, dict):
            out = self.behind_exits(capture, out)
        self.take(capture, out)
        return out

    def alive(self) -> dict[int, list[Output]]:
        """Of each forward whose graph there still is, its outputs in there."""
        found = {number: [output for output in outputs if output.node() is not None] for number, outputs in self.edges}
        return {number: outputs for number, outputs in found.items() if outputs}

    def clear(self) -> None:
        """Forget them."""
        self.labels, self.edges = [], []

    def tap_shared(self, capture: Capture, out: Any) -> Any:
        """What a model returns, with outputs that derive from parameters alone tapped as rows of the examples.

        That each loss reads its own row only is for `px.backward(losses)` to check.
        """

        def tapped(tensor: Tensor) -> Tensor:
            label = capture.labels.of(tensor)
            if not isinstance(label, Shared) or not tensor.requires_grad or tensor.dim() <= self.batch_dim:
                return tensor
            if capture.forward.batch == 1 or tensor.size(self.batch_dim) != capture.forward.batch:
                return tensor
            capture.forward.asks = (
                "an output of the model derives from parameters alone, and has as many rows as there are examples: "
                "whether each example's loss reads its own row only, `px.backward(losses)` can tell"
            )
            with torch._C.DisableTorchFunction():
                return capture.meeting.rows(tensor, Axis(self.batch_dim), returned)

        return map_tensors(tapped, out)

    def behind_exits(self, capture: Capture, out: Any) -> Any:
        """What a model returns, with an `Exit` behind each tensor of a sharded one, and else where it does no harm.

        That is a node that can be held weakly; see `Output`.
        """
        tensors = tensors_of(out)
        uses = Counter(map(memory, tensors)) if len(tensors) > 1 else Counter()

        def behind(tensor: Tensor) -> Tensor:
            label = capture.labels.of(tensor)
            if not isinstance(label, (Axis, Single)) or not tensor.requires_grad:
                return tensor
            if not self.parameters.sharded and (uses[memory(tensor)] > 1 or not exits(tensor)):
                return tensor
            passed: Tensor = Exit.apply(tensor)
            capture.labels.mark(passed, label)
            return passed

        return map_tensors(behind, out)

    def take(self, capture: Capture, out: Any) -> None:
        """Remember where the examples are in the outputs; refuse those in which they are mixed, or may be."""
        self.labels = []
        edges: list[Output] = []
        self.edges = [*list(self.alive().items())[-1:], (capture.forward.number, edges)]
        packed = {id(sequence.data) for sequence in packed_in(out)}
        tensors = tensors_of(out)
        marks = [capture.labels.of(tensor) for tensor in tensors]
        labels = [mark for tensor, mark in zip(tensors, marks, strict=True) if tensor.requires_grad]
        first = capture.inputs[0]
        single_row = first.dim() > self.batch_dim and first.size(self.batch_dim) == 1
        elsewhere = any(isinstance(label, Axis) and label.dim != self.batch_dim for label in labels)
        alien = single_row and elsewhere and capture.forward.batch > 1
        if labels and (alien or not any(isinstance(label, (Axis, Single, Lost)) for label in labels)):
            capture.forward.asks = capture.forward.asks or (
                "no output of the model has rows of the examples: is one of its inputs with as many rows the batch, or "
                "something that all examples share? `px.backward(losses)`, with one loss an example, can tell"
            )
        singles = {label.example for label in marks if isinstance(label, Single)}
        if singles and len(singles) < capture.forward.batch:
            capture.forward.asks = (
                "an output of the model is of one example, and not every example has one: whether only that example's "
                "loss reads it, `px.backward(losses)` can tell"
            )
        for tensor, label in zip(tensors, marks, strict=True):
            if isinstance(label, Axis) and label.owners is not None and id(tensor) not in packed:
                if bool((label.owners.ids.diff() < 0).any()):
                    capture.forward.asks = (
                        "the rows of an output of the model are in another order than the examples: whether each has "
                        "the loss of its own example, `px.backward(losses)` can tell"
                    )
            if capture.forward.record is not None:
                capture.forward.record.returned(tensor, capture.labels.batch_label(tensor))
            audited = not self.parameters.sharded or tensor.grad_fn is not None and tensor.grad_fn.name() == EXIT
            if isinstance(label, (Axis, Single)) and tensor.requires_grad and audited:
                edges.append(Output(tensor, label))
            if isinstance(label, (Axis, Single, Lost)):
                self.labels.append((weakref.ref(tensor), label))
            if isinstance(label, Axis) and label.dim != self.batch_dim and capture.ambiguous is not None:
                raise UnsupportedError(
                    f"the model's inputs have {capture.ambiguous} along dimension {self.batch_dim}. perex took the "
                    f"first for the batch, {capture.forward.batch}, but the output has that at dimension {label.dim}: "
                    "hand the batch over first"
                )
            if not isinstance(label, Lost) or not tensor.requires_grad:
                continue
            if label.kind == "reduced" and (tensor.dim() or capture.doubts.counted is not None):
                why = label if capture.doubts.counted is None else capture.doubts.counted
                capture.watch(tensor, why, always=True)


def memory(tensor: Tensor) -> int:
    """What tells one piece of memory from others."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def exits(tensor: Tensor) -> bool:
    """Whether an output's node has to be held, so that another one is better, and can be put behind it."""
    node = tensor.grad_fn
    if node is None or issubclass(type(node), BackwardCFunction) or type(tensor) is not Tensor or tensor._is_view():
        return False
    return tensor.layout == torch.strided and not torch._C._are_functorch_transforms_active()
