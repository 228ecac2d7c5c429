"""The handle a user holds: attach, run forward and backward as usual, read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from perex.capture.parameters import Selection
from perex.capture.session import Session
from perex.clipping import Groups, bounds_of, clipped, groups_of, normalized, norms_of
from perex.errors import ArgumentError, LossError, NotReadyError, PerexError
from perex.gradients import Gradients, put
from perex.kernels.strategies import Preferences, preferring
from perex.quantities import Quantity, SquaredNorms, added_up
from perex.readings import Readings
from perex.running import Running
from perex.second import SecondRun
from perex.summing import ALIKE, Treatment, times

KEEPS = {"auto": None, "high": True, "low": False, "none": False}
"""What `memory` says about keeping gradients; None is to be found out."""

SPARED = (
    "unless told otherwise, perex keeps those of the first backward, if they take at most 32 MiB and nothing is "
    "checkpointed, and those of later ones only if somebody has asked for them. That is noted now: from the next "
    "forward and backward on they are kept. attach(..., memory='high') keeps those of every backward"
)


class Tracker(Readings):
    """What `attach` returns; see there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        quantities: Sequence[Quantity],
        params: Selection,
        loss_reduction: Literal["mean", "sum"],
        batch_dim: int,
        param_grads: bool,
        forwards: Literal["same", "further"] | None,
        audit: bool,
        grad_scaler: torch.amp.GradScaler | None,
        preferences: Preferences,
        memory: str,
    ) -> None:
        self._quantities: list[Quantity] = [SquaredNorms(), *quantities]
        self._mean = loss_reduction == "mean"
        self._relation = forwards
        self._memory = memory
        self._backwards = Running(
            self._quantities, param_grads, audit, grad_scaler, preferences, KEEPS[memory], memory == "low"
        )
        self._session = Session(model, params, param_grads, batch_dim, self._backwards, audit)
        self._backwards.session = self._session
        tracked = {entry.name: entry.parameter for entry in self._session.parameters if entry.tracked}
        try:
            for quantity in quantities:
                quantity.attached(model, tracked)
        except PerexError:
            self.detach()
            raise

    # The contract

    def __repr__(self) -> str:
        names = [entry.name for entry in self._session.parameters if entry.tracked]
        state = "detached" if self._session.closed else f"attached; {len(names)} parameters tracked"
        return f"Tracker({state})"

    def __del__(self) -> None:
        """Let go of what the last backward left: it leads to itself through the graph, where no collector sees it."""
        backwards = vars(self).get("_backwards")
        if backwards is not None:
            backwards.let_go()

    def __copy__(self) -> Tracker:
        return self

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was found. Results stay readable; calling it again does nothing."""
        self._session.close()

    @property
    def forwards(self) -> int:
        """Number of forwards since perex was attached."""
        return self._session.forwards

    def backward(self, losses: Tensor) -> None:
        r"""Run the backward of per-example losses, so that no reduction has to be guessed.

        It is the backward of the losses' mean or sum, as `loss_reduction` says; norms are of each loss alone.

        Args:
            losses: `(B,)`, the loss of each example. With several forwards before it, their number tells
                whether these hold the same examples or further ones.

        Raises:
            LossError: `losses` is not one number an example.
            ExamplesMixError: a loss depends on other examples' outputs.
            NotReadyError: the model has not been called.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            what = f"of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise LossError(
                f"losses: expected a tensor (B,) with one loss an example, got {what}. "
                "Use a criterion with reduction='none', and average each example's own terms; `.squeeze(1)` a (B, 1)"
            )
        if self._session.closed:
            raise NotReadyError("backward: this tracker is detached")
        self._backwards.run(losses, self._mean)

    # Using the gradients

    def clip_(
        self,
        max_norm: float | Mapping[str, float],
        by: Groups = None,
        normalize: bool = False,
        stability: float = 0.01,
        scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
        careful: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        r"""Make `.grad` the sum of clipped gradients, $\sum_b \min(1, C / \|g_b\|) \, g_b$.

        $g_b$ is the gradient of example b's own loss. The sum comes from the backward that was run; each weight
        gradient is one more product, with the weights in it. What `.grad` held before the backward is added to, as a
        backward would: so micro-batches accumulate, and `zero_grad` begins anew. Attach with `param_grads=False`, and
        the backward itself computes no weight gradients. In a process group, the sum is of this process's examples.

        Args:
            max_norm: $C$, or one for each group by name.
            by: None to clip all tracked parameters together; `"parameter"` or `"module"` for each on its own; or
                groups of them, as a dict from a name to globs of parameters.
            normalize: divide by the norm always, $C / (\|g_b\| + \gamma)$, so that the bound no longer decides how many
                examples count in full: automatic clipping.
            stability: $\gamma$.
            scale: what the sum is multiplied by, such as 1/B for a mean.
            skip: booleans `(B,)`, of examples that are to have no part in the sum, whatever their gradients are.
            careful: have no example move the sum by more than $C$, whatever numbers are in it, but for $10^{-4} C$ of
                rounding: norms that overflow are computed again in float64, and examples whose terms cancel are
                multiplied out by themselves. It costs a pass over what gradients are made of.

        Returns:
            The norms before, `(B,)`, or a dict of them by group.

        Raises:
            NotReadyError: there was no backward since the last forward, or its gradients were not kept.
            ArgumentError: a bound is no positive number, a parameter is in no group, or `skip` is not one boolean an
                example.

        Example:
            >>> import torch, perex
            >>> model = torch.nn.Linear(3, 1, bias=False)
            >>> with perex.attach(model, param_grads=False) as px:
            ...     px.backward(model(torch.tensor([[0.0, 3.0, 4.0], [0.6, 0.0, 0.0]])).squeeze(1))
            >>> px.clip_(1.0), model.weight.grad
            (tensor([5.0000, 0.6000]), tensor([[0.6000, 0.6000, 0.8000]]))

        References:
            Abadi et al., "Deep Learning with Differential Privacy", 2016; Bu et al., "Automatic Clipping", 2022.
        """
        squares, apart = self._squares(careful)
        count = len(next(iter(squares.values())))
        if skip is not None and (not isinstance(skip, Tensor) or skip.dtype != torch.bool or skip.shape != (count,)):
            what = f"{tuple(skip.shape)} of {skip.dtype}" if isinstance(skip, Tensor) else type(skip).__name__
            raise ArgumentError(f"skip: expected a tensor of one boolean an example, ({count},), got {what}")
        groups = groups_of(by, list(squares))
        bounds = bounds_of(max_norm, groups)
        if normalize and (stability < 0 or not all(map(math.isfinite, bounds.values()))):
            raise ArgumentError(
                f"normalize=True divides by norms: max_norm is finite, and stability={stability!r} >= 0"
            )
        norms = norms_of(squares, groups)
        weights: dict[str, Tensor] = {}
        for group, names in groups.items():
            bound, norm = bounds[group], norms[group]
            own = normalized(norm, bound, stability) if normalize else clipped(norm, bound)
            weights.update(dict.fromkeys(names, times(own, scale)))
        limits = {name: bounds[group] * scale for group, names in groups.items() for name in names}
        self._put(weights, Treatment(skip, apart, limits if careful else None))
        return norms[""] if by is None else norms

    def unbounded(self) -> Tensor | None:
        """Whose gradients are not finite, so that no clipping bounds them: `(B,)` booleans, or None if all are finite.

        A sum of squares that overflows is computed again in float64: it says nothing yet.
        """
        squares, _ = self._squares(careful=True)
        finite = all_finite(squares.values())
        return None if bool(finite.all()) else ~finite

    def _squares(self, careful: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Squared norms by parameter; if `careful`, also whose were computed again, being no numbers: in float64."""
        squares: dict[str, Tensor] = self.read(self._quantities[0], by="parameter")
        if not careful or not squares or bool((finite := all_finite(squares.values())).all()):
            return squares, None
        numbers = (~finite).nonzero().flatten()
        again = self._multiplied_out(numbers.tolist())
        return {
            name: value.double().index_copy(0, numbers.to(value.device), again[name].to(value.device))
            for name, value in squares.items()
        }, ~finite

    def _multiplied_out(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """Squared norms of some examples by parameter, `(n,)` each, from gradients that are multiplied out."""
        runs_again = self._memory == "low" and not self._result().keep
        return (self._second() if runs_again else self.gradients()).squares_of(examples)

    def reweight_(self, weights: Tensor) -> None:
        r"""Make `.grad` a weighted sum, $\sum_b w_b g_b$: importance weights, or a choice of examples. See `clip_`.

        Args:
            weights: `(B,)`; negative ones are weights too, and $1/B$ each gives the gradient of the mean. With weight
                zero, an example has no part in it, even if its gradient is not finite.

        Raises:
            NotReadyError: there was no backward since the last forward, or its gradients were not kept.
            ArgumentError: there is not one weight an example.

        Example:
            >>> import torch, perex
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> with perex.attach(model, param_grads=False) as px:
            ...     px.backward(model(torch.tensor([[3.0], [5.0]])).squeeze(1))
            >>> px.reweight_(torch.tensor([1.0, 10.0]))
            >>> model.weight.grad
            tensor([[53.]])
        """
        squares = self.read(self._quantities[0], by="parameter")
        count = len(next(iter(squares.values())))
        if not isinstance(weights, Tensor) or weights.shape != (count,) or weights.is_complex():
            what = (
                f"a tensor {tuple(weights.shape)} of {weights.dtype}"
                if isinstance(weights, Tensor)
                else type(weights).__name__
            )
            raise ArgumentError(f"weights: expected a tensor of one number an example, ({count},), got {what}")
        spoilt = (weights == 0) & ~added_up(squares.values()).isfinite().to(weights.device)
        self._put(dict.fromkeys(squares, weights), Treatment(spoilt) if bool(spoilt.any()) else ALIKE)

    def gradients(self) -> Gradients:
        """The per-example gradients of the last backward, not multiplied out; they outlive the next forward.

        Raises:
            NotReadyError: there was no backward since the last forward, or its gradients were not kept.
        """
        result = self._result()
        if not result.keep:
            why = {"auto": SPARED, "low": "memory='low' keeps only what fits in where the graph was"}.get(
                self._memory, f"nothing is kept with memory={self._memory!r}"
            )
            if self._memory == "auto":
                self._backwards.keep = True
            raise NotReadyError(f"the per-example gradients of the last backward are not there any more: {why}")
        self._backwards.asked()
        with preferring(self._backwards.preferences):
            found = result.kept(self._relation)
        return Gradients(found, self.scale)

    def release(self) -> None:
        """Let go of the last backward's gradients, kept for `clip_` and the like; norms can still be read."""
        if self._backwards.result is not None:
            self._backwards.result.release()

    def _second(self) -> SecondRun:
        """The last backward, to be run again."""
        return SecondRun(self._backwards, self._result(), self._relation, self.scale)

    def pause(self) -> None:
        """Do not look at backwards, until `resume`: what is there to read stays."""
        self._backwards.looking = True

    def resume(self) -> None:
        """Look at backwards again."""
        self._backwards.looking = False

    def after_backward(self, action: Callable[[], None]) -> None:
        """Have a function called at the end of each backward, when its result can be read."""
        self._backwards.after.append(action)

    def _put(self, weights: Mapping[str, Tensor], treatment: Treatment) -> None:
        """Make `.grad` what it was before the backward, plus a weighted sum."""
        result = self._result()
        parameters = self._session.parameters.holders(result.tracked())
        accumulated = result.accumulated
        accumulated.remember(parameters)
        if self._memory == "low" and not result.keep:
            sums = self._second().weighted_sum(weights, treatment)
            for name, parameter in parameters.items():
                total = sums[name] if name in sums else torch.zeros(parameter.shape, device=parameter.device)
                put(parameter, total, accumulated.before(name, parameter), anew=False)
        else:
            gradients = self.gradients()
            for name, total in gradients.weighted_sums(weights, treatment):
                parameter, grad = parameters[name], parameters[name].grad
                anew = grad is not None and gradients.shares_memory(name, grad)
                put(parameter, total, accumulated.before(name, parameter), anew)
        accumulated.look(parameters)


def all_finite(values: Iterable[Tensor]) -> Tensor:
    """Of which examples all values are finite, `(B,)`."""
    finite = [value.isfinite() for value in values]
    return torch.stack([each.to(finite[0].device) for each in finite]).all(0)
