"""Running the backward of losses, one an example: looked at beforehand, and run again where that saves memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from perex.audit import check_losses
from perex.backward import Backwards
from perex.capture.checks import refuse_recording
from perex.capture.forward import Forward
from perex.capture.inputs import about
from perex.capture.parameters import Entry
from perex.capture.probe import Probe, same_draws, weights_of
from perex.capture.retained import spared
from perex.capture.saved import UnseenError, kept_bytes, saved_bytes
from perex.capture.suspects import SINK, nodes
from perex.errors import LossError, NotReadyError, PerexError, UnsupportedError, anew
from perex.factors import Factor
from perex.result import Result

ONCE = "Trying to backward an extra time"
"""What torch says where a selective checkpoint has been run backward already."""

PART = 0.1
"""What part of plain training's memory `memory="low"` may take beyond that."""

BLANKS = 16
"""How many backwards are looked at again because they brought no gradients to some tap, in all."""


class Running(Backwards):
    """Also runs them.

    Args:
        arguments: of `Backwards`.

    Attributes:
        audited: what has been checked, by shapes and the like.
        blanks: how many backwards brought no gradients to some tap.
        retains: whether tensors of the user's retain their gradients; None before anybody has looked.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.audited: set[tuple[object, ...]] = set()
        self.blanks = 0
        self.retains: bool | None = None

    def run(self, losses: Tensor, mean: bool) -> None:
        """Run the backward of the mean or sum of losses; see `Tracker.backward`."""
        forwards = [forward for ref in self.pending if (forward := ref()) is not None]
        if self.latest is None or self.session.unseen is not None and not forwards:
            why = f"; {self.session.unseen}" if self.session.unseen else ""
            raise NotReadyError(f"backward: call the attached model first, with gradients enabled{why}")
        forwards = forwards or [self.latest]  # without one since, it is a second backward, of a graph that was retained
        count = len(losses)
        sizes = [forward.batch for forward in forwards]
        if count not in sizes and count != sum(sizes):
            of_one = " An input of one row beside others is taken for shared by all, unless a larger batch came before."
            raise LossError(
                f"losses: {count} losses for a forward of {' and '.join(map(str, sizes))} examples: there must be one "
                "loss an example. Average the losses of an example's own tokens or pixels; or is the batch axis "
                f"another than `batch_dim`?{of_one if count == 1 else ''}"
            )
        self.result = None
        if not losses.requires_grad:
            if any(forward.uses for forward in forwards):
                raise LossError("losses: they do not depend on the model's outputs, or were computed under no_grad")
            self.pending = []
            return  # no tracked parameter was used: norms are zero
        weight = torch.full_like(losses, 1 / count if mean and count else 1.0)
        probe, kinds = self.check(losses, weight, forwards)
        self.losses, self.probe = count, probe
        self.scale = count if mean and count else 1.0
        if mean and count and losses.dtype.itemsize < 4:  # which round the weight
            self.scale = 1 / float(torch.tensor(1 / count, dtype=losses.dtype, device="cpu"))
        self.fits = self.low and self.fitting(losses, forwards)
        again = self.low and not self.fits and not any(forward.once for forward in forwards)
        try:
            total = (self.scaled(losses) * weight).sum()
            total.backward(retain_graph=again)  # given gradients, torch would import sympy: 40 MB
        except (PerexError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            once = probe is not None or bool(kinds) and ONCE in str(error)
            if not once or "inplace operation" in str(error):  # which any backward would have met
                raise
            raise UnsupportedError(
                f"the backward raised {error!r}, after perex had run it with other weights on the losses, as a check. "
                "If it can only be run once, attach(..., audit=False) does without that"
            ) from error
        finally:
            self.losses, self.scale, self.probe, self.fits = None, None, None, False
        if probe is not None and probe.error is not None:
            raise self.denied(probe.error)
        if probe is not None and probe.blank and self.blanks < BLANKS:  # look again
            self.blanks += 1
        else:
            self.audited |= kinds
        if again:
            self.retain(total)
        if self.result is None and any(forward.uses for forward in forwards):
            raise LossError("losses: no gradient reached the attached model; are they of another's outputs?")

    def fitting(self, losses: Tensor, forwards: Sequence[Forward]) -> bool:
        """Whether gradients are kept, with `memory="low"`, and nothing has to run twice.

        Plain training holds the graph when its backward begins, and `.grad` when it ends. Gradients that are kept take
        the place of the graph, bit by bit, and the weighted sum comes to them: all of it is to take no more than the
        larger of the two and a tenth. With weight gradients there is no room; nor are gradients kept where what the
        graph holds cannot be looked at.
        """
        if self.param_grads or self.session.parameters.sharded or any(forward.sparing for forward in forwards):
            return False
        model, graph = self.session.parameters.model, [*nodes([losses.grad_fn])]
        own = sum(entry.parameter.nbytes for entry in self.session.parameters.tracked())
        try:
            saved = saved_bytes(graph, [*model.parameters(), *model.buffers()])
            return kept_bytes(graph) + own <= (1 + PART) * max(saved, own)
        except (UnseenError, NotImplementedError, RuntimeError):
            return False

    def retain(self, total: Tensor) -> None:
        """Keep what was run backward, and its graph, until the next forward."""
        if self.result is not None:
            self.result.total = total

    def again(self, result: Result, take: Callable[[Forward, Entry, Factor], None], last: bool = True) -> None:
        """Run a backward a second time, up to the taps.

        Args:
            result: what the first time brought.
            take: gets each use's gradients.
            last: whether to let go of the graph.
        """
        total = result.total
        assert total is not None
        if last:
            result.total = None
        self.taking = take
        try:
            sentinels = [forward.sentinel for forward in result.shares]
            with self.sparing_retained(list(result.shares)):
                torch.autograd.grad(total, sentinels, retain_graph=not last, allow_unused=True)
        except (PerexError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"memory='low' runs the backward a second time, and that raised {error!r}. If it can only be run once, "
                "as selective checkpoints are, memory='high' does with one"
            ) from error
        finally:
            self.taking = None

    @contextlib.contextmanager
    def sparing_retained(self, forwards: Sequence[Forward], *losses: Tensor) -> Iterator[None]:
        """Leave alone the gradients that tensors retain. To find all takes long: not where none is known to do so."""
        near = [*losses, *(tensor for ref, _ in self.session.outputs.labels if (tensor := ref()) is not None)]
        retains = any(forward.retains for forward in forwards) or any(tensor.retains_grad for tensor in near)
        if self.retains is False and not retains and not losses:  # nothing is new, as it is where losses are checked
            yield
            return
        with spared(None if retains else min(forwards, key=lambda forward: forward.number)) as tensors:
            self.retains = bool(tensors)
            yield

    def denied(self, error: PerexError) -> PerexError:
        """The last backward's numbers are wrong: the first reason for that."""
        if self.result is None:
            return error
        self.result.refuse(error)
        return anew(self.result.error or error)

    def scaled(self, losses: Tensor) -> Tensor:
        """Losses as the scaler wants them."""
        return losses if self.scaler is None else self.scaler.scale(losses)

    def check(
        self, losses: Tensor, weight: Tensor, forwards: Sequence[Forward]
    ) -> tuple[Probe | None, set[tuple[object, ...]]]:
        """Check that examples do not mix, when losses and outputs of these shapes are new.

        Returns:
            What the taps got when the losses were weighted, with which the backward to come is to be compared; and what
            will have been checked then.
        """
        outputs = self.session.outputs
        further = len(losses) == sum(forward.batch for forward in forwards)
        first, new = 0, list[tuple[tuple[object, ...], Forward, int]]()
        parts: dict[Forward, slice] = {}
        for forward in forwards:
            if self.audit:
                self.session.auditor.check(forward, self.session.parameters)
            place = about(first), about(len(losses)), further
            kind = *place, forward.shapes, *outputs.kinds.get(forward.number, ())
            if self.audit and kind not in self.audited:
                new.append((kind, forward, first))
            parts[forward] = slice(first, first + forward.batch)
            first += forward.batch if further else 0
        found = outputs.behind(losses) if new else {}
        outputs.kinds = {}
        if not new:
            return None, set()
        refuse_recording(losses)
        with self.sparing_retained(forwards, losses):
            self.looking = True
            try:
                for _, forward, first in new:
                    check_losses(losses, found.get(forward.number, []), forward.batch, first)
            except RuntimeError as raised:
                if ONCE not in str(raised):
                    raise
                raise UnsupportedError(
                    "a selective checkpoint between the model and the losses can go backward once only, and perex "
                    "runs losses backward several times, as a check: attach(..., audit=False) does without that"
                ) from raised
            finally:
                self.looking = False
            return self.weighted(losses, weight, parts), {kind for kind, *_ in new}

    def weighted(self, losses: Tensor, weight: Tensor, parts: dict[Forward, slice]) -> Probe | None:
        """What the taps get when losses are weighted otherwise, to be compared; None where that cannot be done."""
        forwards = list(parts)
        once = self.session.parameters.sharded or any(forward.once for forward in forwards)
        if once or len(losses) < 2 or any(node.name() == SINK for node in nodes([losses.grad_fn])):
            return None
        factors = weights_of(len(losses), any(forward.half for forward in forwards)).to(losses.device)
        probe = Probe({forward: factors[part] for forward, part in parts.items()})
        with same_draws():
            done = self.look(probe, (self.scaled(losses) * (weight * factors.to(weight))).sum(), forwards)
        for forward in forwards:
            if forward.changed and forward.compare is not None and (error := forward.compare()) is not None:
                forward.error = anew(error)
                raise error
        probe.weighted = False
        return probe if done else None

    def look(self, probe: Probe, total: Tensor, forwards: Sequence[Forward]) -> bool:
        """Run a backward as far as the taps, for a probe alone; whether that could be done."""
        self.probe, self.looking = probe, True
        try:
            sentinels = [forward.sentinel for forward in forwards]
            torch.autograd.grad(total, sentinels, retain_graph=True, allow_unused=True)
        except RuntimeError:  # reentrant checkpoints and some compiled code cannot be run for this: nor need they be
            return False
        finally:
            self.probe, self.looking = None, False
        return True
