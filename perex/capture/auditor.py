"""When a batch is checked by running a few of its examples alone, and what is said if they differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.alone import replay, replay_back
from perex.capture.axis import Axis
from perex.capture.checks import run_eagerly
from perex.capture.doubts import FAINT, STRONG, WEAK
from perex.capture.forward import Forward
from perex.capture.labels import Labels
from perex.capture.nest import map_tensors, tensors_of
from perex.capture.outputs import Output, Outputs
from perex.capture.parameters import Parameters
from perex.capture.probe import Probe, same_draws, user_code, watch_modules, weighted, weights_of
from perex.capture.record import Record
from perex.errors import ExamplesMixError, PerexError, UnsupportedError

ALL, MANY, FEW, LATER = 16, 8, 4, 2
"""Of a first batch in doubt, all examples are run alone if there are up to 16, and 8 of more; without a doubt, 4. Of
later batches of other shapes, or in doubt again, 2, others each time."""


BLANKS = 16
"""Up to which forward a graph is looked through again if no gradient came to some tap."""


class Auditor:
    """Remembers which batches have been checked: the first one, and each whose inputs have new shapes.

    Args:
        enabled: whether to check at all.

    Attributes:
        running: whether examples are being run alone now.
        audited: inputs that have been checked, by their shapes.
        strong: whether a forward left more than a weak doubt: then every one is looked at.
        looked: inputs whose graph has been looked through for the user's own autograd functions.
        wanted: whether to record: not where losses are never handed over, and no forward leaves a doubt.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.running = False
        self.audited: set[object] = set()
        self.wanted = True
        self.strong = False
        self.looked: set[object] = set()

    def record(
        self,
        labels: Labels,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Parameters,
    ) -> Record | None:
        """A record for running some examples of this batch alone, if its inputs have shapes that are new."""
        inputs = list(tensors_of((args, kwargs)))
        forward.shapes = tuple((tuple(t.shape), t.dtype) for t in inputs), module.training
        if not self.enabled or parameters.sharded:  # then every process would have to run as many
            return None
        if not self.strong and (not self.wanted or forward.shapes in self.audited):
            return None
        batch = forward.batch
        if self.audited:  # others each time
            examples = sorted({(forward.number + place * batch // LATER) % batch for place in range(LATER)})
        else:
            examples = list(range(batch)) if batch <= ALL else [(batch - 1) * k // (MANY - 1) for k in range(MANY)]

        def of(example: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def rows(tensor: Tensor) -> Tensor:
                axis = labels.of(tensor)
                if not isinstance(axis, Axis):
                    return tensor
                own = (axis.ids(forward.batch) == example).nonzero().flatten()
                return tensor.detach().index_select(axis.dim, own.to(tensor.device))

            return map_tensors(rows, args), map_tensors(rows, kwargs)

        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
        record = Record(examples, forward.batch, inner, of)
        record.versions = parameters.versions()
        return record

    def look(self, forward: Forward, outputs: Outputs, parameters: Parameters) -> None:
        """Check a forward that leaves a doubt as soon as it is over, and remember what was found."""
        record = forward.record
        if not self.enabled or forward.recomputed:
            return
        try:
            if forward.doubt is not None:
                self.check(forward, parameters)
        except PerexError as error:
            forward.error = error
        else:
            self.look_back(forward, dict(outputs.edges).get(forward.number, []), parameters, record)

    def check(self, forward: Forward, parameters: Parameters) -> None:
        """Run what was recorded of a forward, if anything was.

        Raises:
            ExamplesMixError: an example gets something else when it is alone.
            UnsupportedError: that had to be seen, and could not.
        """
        if forward.error is not None:
            raise forward.error
        if forward.settled:
            return
        record, forward.record = forward.record, None
        if record is None:
            self.wanted = True
            if forward.strength == STRONG or forward.strength == WEAK and forward.shapes not in self.audited:
                self.strong = self.strong or forward.strength == STRONG
                way = "is not done under fully_shard, where all processes would have to run as many"
                again = "is done with a batch of these shapes from the next forward on: call the model again"
                raise UnsupportedError(f"{forward.doubt}. That {way if parameters.sharded else again}")
            return
        self.strong = self.strong or forward.strength == STRONG
        if forward.doubt is None and len(record.examples) > FEW:
            last = len(record.examples) - 1
            record.examples = [record.examples[last * k // (FEW - 1)] for k in range(FEW)]
        self.running, restore = True, run_eagerly()
        try:
            seen = replay(record, parameters)
        except Exception as error:
            if forward.strength > FAINT:
                raise UnsupportedError(f"{forward.doubt}; but alone, the model raises {error!r}") from error
            seen = None  # it cannot be run on one example: labels alone have to vouch for it
        finally:
            restore()
            self.running = False
        if seen is not None:
            place = f"In module '{seen.where}'" if seen.where else "In the model's output"
            raise ExamplesMixError(
                f"{place}, an example gets something else when it is alone in the batch. So examples influence each "
                "other there or in a step before it that perex cannot follow (numbers that leave torch, a branch on "
                "the batch's values, compiled code), and none has a gradient of its own. If that is an effect of "
                "rounding, attach(..., audit=False) does without this check"
            )
        self.audited.add(forward.shapes)
        forward.settled = True

    def look_back(
        self, forward: Forward, outputs: Sequence[Output], parameters: Parameters, record: Record | None
    ) -> None:
        """If autograd functions of the user's own are in the graph, look whether their backward keeps examples apart.

        Any gradient of the outputs will do for that. So it is known for `loss.backward()` too, which comes without
        losses of examples. Where there are only hooks, which may well count how often they run, it is left to
        `px.backward(losses)`, and done if they change gradients.
        """
        unsuitable = forward.batch < 2 or forward.once or parameters.sharded
        if unsuitable or forward.shapes in self.looked or len(self.looked) >= MANY:
            return
        functions, hooks = user_code([output.edge.node for output in outputs])
        watch_modules(hooks, forward)
        forward.hooked = forward.hooked or bool(hooks)
        if functions:
            self.compare_backwards(forward, outputs, parameters, record)
        elif forward.hooked:
            forward.compare = partial(self.compare_backwards, forward, outputs, parameters, record)
        else:
            self.looked.add(forward.shapes)

    def compare_backwards(
        self, forward: Forward, outputs: Sequence[Output], parameters: Parameters, record: Record | None
    ) -> None:
        """Compare what comes to the taps with other weights, and to examples that are alone."""
        weights = weights_of(forward.batch, forward.half)
        probe, edges = Probe({forward: weights}, record), [output.edge for output in outputs]
        with same_draws():
            grads = [torch.randn_like(output.like, device=output.device) for output in outputs]
        scaled = [weighted(grad, output.axis, weights) for grad, output in zip(grads, outputs, strict=True)]
        with same_draws():
            if not forward.receiver.look(probe, edges, scaled, [forward]):
                return
        probe.weighted = False
        with same_draws():
            before = torch.get_rng_state()
            if not forward.receiver.look(probe, edges, grads, [forward]):
                raise UnsupportedError(
                    "the model's graph holds an autograd function of your own whose backward can be run once only, and "
                    "perex ran it to see whether it keeps examples apart: attach(..., audit=False) does without that"
                )
            drawn = not torch.equal(before, torch.get_rng_state())
        if probe.error is None and (not probe.blank or forward.number > BLANKS):
            self.looked.add(forward.shapes)
        forward.error = forward.error or probe.error
        if record is not None and forward.error is None and not drawn:
            for grad, output in zip(grads, outputs, strict=True):
                record.outputs[output.place].full = record.rows(grad, output.axis)
            forward.error = self.compare_back(record, parameters)

    def compare_back(self, record: Record, parameters: Parameters) -> PerexError | None:
        """Run examples alone and back; the error if one gets another gradient than in the batch."""
        self.running, restore = True, run_eagerly()
        try:
            seen = replay_back(record, parameters)
        except Exception:
            return None  # it cannot be run on one example, or its graph not for this
        finally:
            restore()
            self.running = False
        if seen is None:
            return None
        place = f"of module '{seen.where}'" if seen.where else "of the model's own parameters"
        return ExamplesMixError(
            f"Between the output {place} and the losses, the backward gives an example another gradient when it is "
            "alone in the batch. A custom autograd function or a gradient hook uses something of all examples there, "
            "such as a mean that it kept from the forward, or the batch's size. Then no example has a gradient of its "
            "own. Take it off; or, if that is an effect of rounding, attach(..., audit=False) does without this check"
        )
