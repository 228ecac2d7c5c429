"""When a batch is checked by running a few of its examples alone, and what is said if they differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from perex.capture.alone import replay, suspects_alone
from perex.capture.axis import Axis
from perex.capture.checks import refuse_recording
from perex.capture.doubts import STRONG, WEAK
from perex.capture.forward import Forward
from perex.capture.functions import in_sight
from perex.capture.inputs import kind_of
from perex.capture.labels import Labels
from perex.capture.nest import map_tensors, tensors_of
from perex.capture.parameters import Parameters
from perex.capture.probe import same_draws, watch_modules
from perex.capture.record import Record
from perex.capture.suspects import Suspect, Trial, compared, of_function, user_code
from perex.errors import ExamplesMixError, PerexError, UnsupportedError, anew

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
        functions: whether there were any.
        wanted: whether to record: not where losses are never handed over, and no forward leaves a doubt.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.running = False
        self.audited: set[object] = set()
        self.wanted = True
        self.strong = False
        self.looked: set[object] = set()
        self.functions = False

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
        inputs = tensors_of((args, kwargs))
        kinds = tuple(kind_of(tensor, forward.batch) for tensor in inputs), module.training
        forward.shapes = kinds if forward.shapes is None else (forward.shapes, kinds)
        if not self.enabled or parameters.sharded:  # then every process would have to run as many
            return None
        unlooked = self.functions and forward.shapes not in self.looked
        if not self.strong and not unlooked and (not self.wanted or forward.shapes in self.audited):
            return None
        refuse_recording(inputs[0])
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

    def go_on(self, forward: Forward, parameters: Parameters) -> None:
        """Check what has run of a forward before another part of the model does: each is run alone by itself."""
        if self.enabled and forward.record is not None:
            try:
                self.check(forward, parameters)
            except PerexError as error:
                forward.error = anew(error)
        forward.settled, forward.doubt, forward.strength = False, None, 0

    def look(self, forward: Forward, ends: Sequence[Any], parameters: Parameters) -> None:
        """Check a forward that leaves a doubt as soon as it is over, and remember what was found."""
        record, functions, forward.functions = forward.record, forward.functions, []
        if not self.enabled or forward.recomputed:
            return
        try:
            if forward.doubt is not None:
                self.check(forward, parameters)
        except PerexError as error:
            forward.error = anew(error)
        else:
            self.look_back(forward, ends, functions, parameters, record)

    def check(self, forward: Forward, parameters: Parameters) -> None:
        """Run what was recorded of a forward, if anything was.

        Raises:
            ExamplesMixError: an example gets something else when it is alone.
            UnsupportedError: that had to be seen, and could not.
        """
        if forward.error is not None:
            raise anew(forward.error)
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
        self.running, restore = True, in_sight()
        try:
            seen = replay(record, parameters)
        except Exception as error:
            if forward.doubt is not None:
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
        self,
        forward: Forward,
        ends: Sequence[Any],
        met: Sequence[Any],
        parameters: Parameters,
        record: Record | None,
    ) -> None:
        """If autograd functions of the user's own are in the graph, look whether their backward keeps examples apart.

        Any gradients will do for that, so it is known for `loss.backward()` too. Hooks may well count how often they
        run: for these it is left to `px.backward(losses)`, and done if they change gradients.
        """
        if forward.batch < 2 or forward.once or parameters.sharded or forward.shapes in self.looked:
            return
        functions, modules = user_code([*ends, *met])
        watch_modules(modules, forward)
        self.functions = self.functions or bool(functions)
        if functions and record is None:
            forward.error = UnsupportedError(
                f"{of_function(functions[0]).name} is in the graph for the first time: whether its backward keeps "
                "examples apart is looked at from the next forward on. Call the model again"
            )
        elif functions and record is not None:
            forward.error = self.compare([of_function(node) for node in functions], record, parameters)
            if forward.error is None:
                self.looked.add(forward.shapes)
        elif not forward.hooks and not modules:
            self.looked.add(forward.shapes)
        if record is not None and (forward.hooks or forward.module_hooks):
            forward.compare = partial(self.compare_hooks, forward.hooks, forward.module_hooks, record, parameters)

    def compare_hooks(
        self, hooks: Sequence[Suspect], of_modules: Sequence[Suspect], record: Record, parameters: Parameters
    ) -> PerexError | None:
        """Compare what hooks make of gradients with what they make of them for examples alone."""
        try:
            with same_draws():
                for hook in of_modules:
                    trial, single = Trial(hook), hook._replace(takes=hook.alone or hook.takes)
                    for example in record.examples[:FEW]:
                        if (error := compared([trial], [single], example, record.batch)) is not None:
                            return error
        except ExamplesMixError as error:
            return error
        return self.compare(hooks, record, parameters, hooks=True) if hooks else None

    def compare(
        self, suspects: Sequence[Suspect], record: Record, parameters: Parameters, hooks: bool = False
    ) -> PerexError | None:
        """Compare what functions make of gradients, or hooks, with what they make of them for examples alone."""
        self.running, restore = True, in_sight()
        try:
            with same_draws():
                trials = [Trial(suspect) for suspect in suspects]
            for example in record.examples[:FEW]:
                with suspects_alone(record, parameters, example) as found, same_draws():
                    error = compared(trials, found[hooks], example, record.batch)
                if error is not None:
                    return error
        except UnsupportedError:
            raise
        except ExamplesMixError as error:
            return error
        except Exception as error:
            return UnsupportedError(
                f"{suspects[0].name} is in the backward, and whether it keeps examples apart has to be seen by running "
                f"one alone; but then the model raises {error!r}. attach(..., audit=False) does without that check"
            )
        finally:
            restore()
            self.running = False
        return None
