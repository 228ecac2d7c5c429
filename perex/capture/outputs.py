"""What a model returns: where the examples are in it, and in its graph."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from perex.capture.axis import Axis, Held, Lost, Single
from perex.capture.inputs import packed_in
from perex.capture.mode import Capture
from perex.capture.nest import map_tensors, tensors_of
from perex.capture.parameters import Parameters, Shared
from perex.capture.sharding import EXIT, Exit
from perex.capture.suspects import nodes
from perex.errors import UnsupportedError
from perex.rules.broadcast import returned


class Output(NamedTuple):
    """One that gradients come through.

    Attributes:
        edge: where it is in the graph.
        axis: where the examples are in it.
    """

    edge: GradientEdge
    axis: Held


class Place(NamedTuple):
    """What an output's node in the graph is told, for each of its results.

    Attributes:
        forward: the number of the forward that it is of.
        output: the output's number.
        axis: where the examples are in it.
    """

    forward: int
    output: int
    axis: Held


class Outputs:
    """Remembers the outputs of the latest forwards.

    Nodes of the graph are not held: a graph that nobody else holds goes, with all that it has saved. So what is known
    of an output is left with its node, as `node.metadata`, and found there by who comes from the losses.

    Args:
        parameters: the model's parameters.
        batch_dim: the dimension that holds the examples.
        key: under which nodes hold that.

    Attributes:
        labels: each output of the latest forward, and where the examples are in it.
        kinds: for each forward since the last backward (two at most), its outputs' nodes, by name, and these axes.
    """

    def __init__(self, parameters: Parameters, batch_dim: int, key: str) -> None:
        self.parameters = parameters
        self.batch_dim = batch_dim
        self.key = key
        self.labels: list[tuple[weakref.ref[Tensor], Held | Lost]] = []
        self.kinds: dict[int, list[tuple[str, Held]]] = {}

    # Where they are in the graph

    def place(self, node: Any, number: int) -> Place | None:
        """What is known of a node's result, if it is an output since the last backward."""
        known = None if node is None else node.metadata.get(self.key)
        found = None if known is None else known.get(number)
        return found if found is not None and found.forward in self.kinds else None

    def __contains__(self, result: tuple[Any, int]) -> bool:
        """Whether a node's result is an output since the last backward."""
        return self.place(*result) is not None

    def __getitem__(self, result: tuple[Any, int]) -> Held:
        """Where the examples are in a node's result that is an output."""
        place = self.place(*result)
        if place is None:
            raise KeyError(result)
        return place.axis

    def behind(self, losses: Tensor) -> dict[int, list[Output]]:
        """For each forward since the last backward, its outputs that losses depend on, in order."""
        found = [
            (place.forward, place.output, Output(GradientEdge(node, number), place.axis))
            for node in nodes([losses.grad_fn])
            for number in node.metadata.get(self.key, ())
            if (place := self.place(node, number)) is not None
        ]
        return {
            forward: [output for of, _, output in sorted(found, key=lambda one: one[1]) if of == forward]
            for forward in self.kinds
        }

    def finish(self, capture: Capture, out: Any) -> Any:
        """Take up what a model returns, and give out what it is to return in its place."""
        if any(isinstance(capture.labels.of(tensor), Shared) for tensor in tensors_of(out)):
            out = self.tap_shared(capture, out)
        if self.parameters.sharded:
            out = self.behind_hooks(capture, out)
        self.take(capture, out)
        return out

    def clear(self) -> None:
        """Forget them."""
        self.labels, self.kinds = [], {}

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

    def behind_hooks(self, capture: Capture, out: Any) -> Any:
        """What a sharded model returns, each tensor behind an `Exit`."""

        def behind(tensor: Tensor) -> Tensor:
            label = capture.labels.of(tensor)
            if not isinstance(label, (Axis, Single)) or not tensor.requires_grad:
                return tensor
            passed: Tensor = Exit.apply(tensor)
            capture.labels.mark(passed, label)
            return passed

        return map_tensors(behind, out)

    def take(self, capture: Capture, out: Any) -> None:
        """Remember where the examples are in the outputs; refuse those in which they are mixed, or may be."""
        self.labels = []
        kinds: list[tuple[str, Held]] = []
        number = capture.forward.number
        self.kinds = {**dict(list(self.kinds.items())[-1:]), number: kinds}
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
            if isinstance(label, (Axis, Single)) and tensor.grad_fn is not None and audited:
                node: Any = tensor.grad_fn
                node.metadata.setdefault(self.key, {})[tensor.output_nr] = Place(number, len(kinds), label)
                kinds.append((node.name(), label))
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
