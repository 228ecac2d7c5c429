"""While perex is attached: begins and ends forwards, and knows which module is running."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from perex.capture.auditor import Auditor
from perex.capture.axis import Single
from perex.capture.checks import check_model, compiling, learns_graph, refuse_batch_statistics
from perex.capture.forward import Forward, Receiver
from perex.capture.functions import in_sight
from perex.capture.hooks import hook
from perex.capture.inputs import Layout, batch_size, input_label, packed_in, packed_label
from perex.capture.memo import Memo
from perex.capture.mode import Capture
from perex.capture.nest import tensors_of
from perex.capture.outputs import Outputs
from perex.capture.parameters import Parameters, Selection
from perex.capture.sharding import is_managed, leave_last, refuse_flat
from perex.capture.suspects import of_module_hook
from perex.errors import AttachError
from perex.rules.registry import MODULES, module_rule_for

_sessions = itertools.count()


@dataclasses.dataclass(eq=False, slots=True)
class Frame:
    """A module call that is running.

    Attributes:
        path: the module's path in the model.
        begins: whether this call began the forward.
    """

    path: str
    begins: bool = False


LAYOUTS = 64
"""How many layouts of inputs are remembered."""


class Session:
    """Watches the forwards of one attached model.

    Args:
        model: the model.
        params: which parameters to track.
        param_grads: whether `.grad` is computed too.
        batch_dim: the dimension of the inputs that holds the examples.
        receiver: who hears of new forwards, and gets what backwards bring.
        audit: whether to check batches by running some of their examples alone.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Selection,
        param_grads: bool,
        batch_dim: int,
        receiver: Receiver,
        audit: bool,
    ) -> None:
        check_model(model)
        self.key = f"_perex_{next(_sessions)}"
        self.batch_dim = batch_dim
        self.receiver: Receiver | None = receiver
        self.frames: list[Frame] = []
        self.capture: Capture | None = None
        self.running = False
        self.forwards = 0
        self.restore: Callable[[], object] = nothing  # lets compiled functions run as such again
        self.root: nn.Module | None = None  # whose call the running forward is
        self.consumed = False  # whether a backward came since the latest forward
        self.unseen: str | None = None  # why the latest call of the model began no forward, if so
        self.thread = threading.get_ident()
        self.caller: FrameType | None = None
        self.closed = False
        self.layouts: set[Layout] = set()  # of inputs of several examples, some of which they share
        self.auditor = Auditor(audit)
        self.memo = Memo()
        self.parameters = Parameters(model, params, param_grads, receiver.untapped)
        self.outputs = Outputs(self.parameters, batch_dim, self.key)
        try:
            self.undo = hook(model, self.enter, self.leave)
        except AttachError:
            self.parameters.release()
            raise

    def where(self) -> str:
        """The path of the module that is running."""
        return self.frames[-1].path if self.frames else ""

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a module's forward."""
        if self.auditor.running:
            return
        if compiling():
            name = f"module '{path}'" if path else "the model"
            raise AttachError(
                f"{name} is being compiled while perex is attached: perex cannot see into compiled code. Call the "
                "uncompiled model"
            )
        if self.running and threading.get_ident() != self.thread:
            if torch.is_grad_enabled():
                raise AttachError("the attached model runs in two threads at once: attach to a copy in each thread")
            return
        if self.running and self.frames and not self.still_runs():  # the last run was broken off, by Ctrl-C say
            self.abort()
        frame = Frame(path)
        if self.running:
            self.frames.append(frame)
        elif not torch.is_grad_enabled():
            self.unseen = "it was called under no_grad"
            return
        elif not self.parameters.param_grads and learns_graph(module):
            raise AttachError(
                "DistributedDataParallel(static_graph=True) learns in its first backward which parameters get "
                "gradients, and with param_grads=False none does: train one step first, or call the model inside, "
                "`ddp.module`"
            )
        elif torch.jit.is_tracing():
            raise AttachError("the model is being traced while perex is attached: detach first")
        elif not self.begin(frame, module, args, kwargs):
            return
        if is_managed(module) and not self.parameters.sharded:
            refuse_flat(self.parameters.model, [entry.parameter for entry in self.parameters.entries.values()])
            self.parameters.sharded = True
            if self.capture is not None:
                self.capture.record = self.capture.forward.record = None
        if frame.begins:
            self.root = module
            if not self.parameters.sharded:
                self.parameters.refuse_computed()
        if self.parameters.sharded and self.root is not None:
            leave_last(self.root)
        refuse_batch_statistics(path, module)
        if MODULES and self.capture is not None and self.capture.opaque is None:
            self.open_module(frame, module, args, kwargs)

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = None) -> Any:
        """After a module's forward, also when it raised; may replace what it returned."""
        if self.closed:  # meanwhile, by a hook of the user's, and torch has lost its way with the arguments
            return None
        other_thread = threading.get_ident() != self.thread
        if self.auditor.running or not self.running or other_thread or not self.frames or self.frames[-1].path != path:
            return None
        frame = self.frames[-1]
        capture = self.capture
        result = None
        try:
            if capture is not None and self.running and capture.opaque is frame:
                capture.opaque = None
                if out is not None:
                    result = self.close_module(capture, module, args, kwargs, out)
            if (
                capture is not None
                and out is not None
                and capture.active
                and module._backward_hooks
                and torch.is_grad_enabled()
            ):
                with torch._C.DisableTorchFunction():
                    capture.forward.module_hooks += [
                        of_module_hook(hook, module, path, args, out if result is None else result, capture.labels.held)
                        for hook in module._backward_hooks.values()
                    ]
            if frame.begins and capture is not None and out is not None:
                out = out if result is None else result
                with torch._C.DisableTorchFunction():  # nothing of it is the model's
                    returned = self.outputs.finish(capture, out)
                result = returned if returned is not out else result
                out = returned
        finally:
            self.frames.pop()
            if frame.begins:
                self.end()
        if frame.begins and capture is not None and out is not None:
            ends = [tensor.grad_fn for tensor in tensors_of(out) if (tensor.grad_fn, tensor.output_nr) in self.outputs]
            self.auditor.look(capture.forward, ends, self.parameters)
        return result

    def begin(self, frame: Frame, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Begin a forward with the outermost module call, or go on with one whose outputs are its inputs."""
        inputs = [tensor for tensor in tensors_of((args, kwargs)) if not isinstance(tensor, nn.Parameter)]
        packed = list(packed_in((args, kwargs)))
        batch = int(packed[0].batch_sizes[0]) if packed else batch_size(inputs, self.batch_dim, self.layouts)
        if batch is None:
            self.unseen = (
                f"its inputs hold no tensor with a dimension {self.batch_dim}, where `batch_dim` says the examples are"
            )
            return False
        recomputed = torch._C._current_graph_task_id() != -1
        if not recomputed and not self.parameters.holds(module):
            return False  # it was taken out of the model
        self.unseen = None
        capture = self.capture
        outputs = {id(t): label for ref, label in self.outputs.labels if (t := ref()) is not None}
        goes_on = capture is not None and not self.consumed and not recomputed and any(id(t) in outputs for t in inputs)
        if not goes_on:
            if not recomputed:
                self.parameters.begin()
                if self.parameters.gone:
                    self.parameters.gone = False
                    self.memo.forget()
                self.consumed = False
                self.forwards += 1
            tracked = self.parameters.tracked()
            number = -1 if recomputed else self.forwards
            assert self.receiver is not None
            forward = Forward(number, self.receiver, batch, frame.path, tracked)
            forward.task = torch._C._current_graph_task_id() if recomputed else None
            capture = Capture(self.parameters, forward, self.key, self.where, self.recomputing, self.memo)
            if not recomputed:
                self.receiver.began(forward)
        assert capture is not None
        self.capture = capture
        capture.kept = capture.labels.take_up() - set(map(id, inputs))
        capture.inputs = inputs
        capture.forward.fed = capture.forward.fed or any(tensor.grad_fn is not None for tensor in inputs)
        batch = capture.forward.batch
        for tensor in inputs:
            known = outputs.get(id(tensor)) if goes_on else None
            capture.labels.mark(tensor, known or input_label(tensor, inputs, batch, self.batch_dim))
        capture.doubts.made(inputs)
        for sequence in packed:
            for part in sequence[1:]:
                if part is not None:
                    capture.labels.mark(part, None)
                    capture.doubts.made([part])
            capture.labels.mark(sequence.data, outputs.get(id(sequence.data)) or packed_label(sequence))
        first = inputs[0]
        rows = first.size(self.batch_dim) if first.dim() > self.batch_dim else batch
        if rows not in (1, batch) and not packed and not goes_on:
            capture.forward.asks = (
                f"the first input has {rows} rows, and another one suggests {batch} examples: "
                "`px.backward(losses)`, with one loss an example, can tell. Or hand the batch over first"
            )
        if goes_on:
            self.auditor.go_on(capture.forward, self.parameters)
        capture.record = capture.forward.record = None
        if batch > 1 and not recomputed and not (goes_on and (capture.forward.hooks or capture.forward.module_hooks)):
            capture.record = capture.forward.record = self.auditor.record(
                capture.labels, capture.forward, module, args, kwargs, self.parameters
            )
        layout = tuple([tensor.shape if capture.labels.of(tensor) is None else None for tensor in inputs])
        if batch > 1 and layout[0] is None and len(set(layout)) > 1 and len(self.layouts) < LAYOUTS:
            self.layouts.add(layout)
        unlike = [t for t in inputs if t.dim() > self.batch_dim and capture.labels.of(t) is None]
        several = sorted({batch, *(tensor.size(self.batch_dim) for tensor in unlike)} - {1})
        capture.ambiguous = f"sizes {several}" if len(several) > 1 and not packed else None
        frame.begins = True
        self.frames = [frame]
        self.caller = sys._getframe(3)  # of this function, `enter` and the hook: torch's call of the module
        self.running = True
        self.thread = threading.get_ident()
        self.restore = in_sight()
        capture.__enter__()
        return True

    @contextlib.contextmanager
    def recomputing(self, forward: Forward, args: tuple[Any, ...]) -> Iterator[None]:
        """Run a checkpoint of `forward` again, with taps that save what the first ones did.

        Whose a row is does not matter any more: no gradient depends on it, only what is saved. So its arguments are
        taken for one example's, but for those that are constants.
        """
        again = Forward(-1, forward.receiver, forward.batch, forward.path, forward.tracked)
        capture = Capture(self.parameters, again, self.key, self.where, self.recomputing, self.memo)
        before = self.capture, self.running, self.frames, self.caller, self.thread
        restore = in_sight()
        # the backward of what is on a GPU runs in a thread of its own
        self.capture, self.running, self.frames, self.caller = capture, True, [], None
        self.thread = threading.get_ident()
        derived = {id(tensor): label for ref, label in forward.derived if (tensor := ref()) is not None}
        for tensor in [tensor for ref in forward.batched if (tensor := ref()) is not None]:
            capture.labels.mark(tensor, Single(0))
        for tensor in tensors_of(args):
            known = isinstance(tensor, nn.Parameter) or id(tensor) in self.parameters.entries
            if id(tensor) in derived:
                capture.labels.mark(tensor, derived[id(tensor)])
            elif not known and (tensor.is_floating_point() or forward.batch in tensor.shape):
                capture.labels.mark(tensor, Single(0))
        try:
            with capture:
                yield
        finally:
            restore()
            capture.labels.clean()
            self.capture, self.running, self.frames, self.caller, self.thread = before

    def end(self) -> None:
        """The outermost module has returned."""
        self.running, self.caller = False, None
        self.restore()
        self.restore = nothing
        if self.capture is not None:
            take_off(self.capture)  # first: it would see each look at a parameter below
            forward = self.capture.forward
            forward.tracked = self.parameters.tracked()
            if forward.record is not None and forward.record.versions != self.parameters.versions():
                forward.record = None  # it changes its own parameters, and would do so again
            self.capture.opaque = None
            self.capture.inputs = []
            self.capture.made.clear()
            if forward.sparing and not forward.recomputed:
                forward.derived = self.capture.labels.shared()
                forward.batched = self.capture.labels.batched()
            self.capture.labels.clean()
            if self.capture.forward.recomputed:
                self.capture = None

    def still_runs(self) -> bool:
        """Whether the call that began the running forward is among the callers of this one."""
        if self.caller is None:  # a recomputation, which cleans up after itself
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None

    def abort(self) -> None:
        """Clear up after a forward that never came to its end."""
        self.frames = []
        self.end()

    def open_module(self, frame: Frame, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """From here on a module with a rule of its own is one operator."""
        rule = module_rule_for(module)
        if rule is not None and self.capture is not None:
            own = {entry.name for entry in self.parameters.tracked()}
            names = [f"{frame.path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            if own.intersection(names):
                self.capture.opaque = frame

    def close_module(
        self, capture: Capture, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Tap the output of a module with a rule of its own."""
        rule = module_rule_for(module)
        assert rule is not None
        return capture.meeting.module(module, rule, args, kwargs, out)

    def close(self) -> None:
        """Take everything off the model."""
        for undo in self.undo:
            undo()
        self.undo, self.closed = [], True
        self.outputs.clear()
        if self.running:
            self.abort()
        self.parameters.release()
        self.memo.forget()
        self.capture = self.root = self.receiver = None  # who holds this


def nothing() -> None:
    """Do nothing."""


def take_off(capture: Capture) -> None:
    """Take a capture off the stack of function modes, wherever in it a broken run has left it."""
    above: list[Any] = []
    while any(mode is capture for mode in _get_current_function_mode_stack()):
        mode = _pop_mode()
        if mode is not capture:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
