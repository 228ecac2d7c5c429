"""The errors of capture: each names the running module, says why, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perex.capture.axis import Label, Lost
from perex.capture.forward import Forward
from perex.errors import ExamplesMixError, PerexError, UnsupportedError


class Refusals:
    """Makes and raises errors that name the running module.

    Args:
        where: gives its path.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where

    def place(self, where: str | None = None) -> str:
        """A module, for messages: the running one if none is given."""
        where = self.where() if where is None else where
        return f"module '{where}'" if where else "the model's own forward"

    def placed(self, label: Lost) -> Lost:
        """A label that knows where it came to be."""
        return label._replace(where=self.where()) if label.where is None else label

    def mixed(self, label: Label) -> None:
        """Raise where a layer's setting mixes examples."""
        if isinstance(label, Lost) and label.kind == "refused":
            raise self.error(label)

    def error(self, label: Lost) -> PerexError:
        """The error for a value of which perex cannot say whose it is, if a loss depends on it."""
        if label.kind in ("mixed", "refused"):
            return ExamplesMixError(
                f"In {self.place(label.where)}, {label.why}. Examples of a batch must not influence each other, or "
                "none has a gradient of its own."
            )
        if label.kind == "unknown":
            return UnsupportedError(
                f"In {self.place(label.where)}, {label.why}, so perex cannot tell the examples apart, and the loss "
                "depends on it. Rewrite that step, or do it outside the model's forward."
            )
        return ExamplesMixError(
            f"In {self.place(label.where)}, {label.why}. The loss depends on it, so it is no sum or mean of a loss of "
            "each example: compute one loss an example, and run `px.backward(losses)`"
        )

    def taken_out(self, label: Lost, func: Any) -> PerexError:
        """The error for a number over the batch that leaves torch."""
        return ExamplesMixError(
            f"In {self.place()}, {label.why}, and `{func.__name__}` takes the outcome out of torch, where perex "
            "cannot follow whether it goes back to the examples. Do it outside the model's forward"
        )

    def doubt(self, name: str, lost: Lost) -> str:
        """What is open after a number over several examples had a say in what the examples get."""
        return (
            f"In {self.place()}, {lost.why}, and `{name}` makes use of that: whether an example gets something else in "
            "another batch shows only when examples are run alone"
        )

    def when_differentiated(self, forward: Forward, label: Lost) -> Callable[[], None]:
        """What to do when a loss turns out to depend on a value whose examples cannot be told apart: an error."""
        error = self.error(label)
        return lambda: forward.refuse(error)

    def lost(self, label: Lost, func: Any) -> PerexError:
        """The error for a parameter that meets rows of which perex lost track."""
        kind = ExamplesMixError if label.kind != "unknown" else UnsupportedError
        name = getattr(func, "__name__", str(func))
        return kind(
            f"In {self.place(label.where)}, {label.why}. So perex cannot tell the examples apart in what "
            f"{self.place()} uses together with a tracked parameter, in `{name}`. Leave the parameter out with "
            "`params=`, or rewrite that step."
        )

    def unsupported(self, func: Any, why: str) -> PerexError:
        """The error for an operator that perex does not follow."""
        return UnsupportedError(f"In {self.place()}, `{getattr(func, '__name__', func)}` {why}.")

    def stranger(self, func: Any) -> PerexError:
        """The error for a tensor of unknown origin."""
        return self.unsupported(
            func,
            "reads a tensor that requires grad but comes from code perex cannot see into: a scripted or compiled "
            "function, a function transform, or something computed outside the model's forward. Compute it in "
            "plain operators, or detach it",
        )

    def random(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise where the general path would draw other random numbers than the forward did."""
        name = getattr(func, "__name__", "")
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if name == "rrelu" or name == "scaled_dot_product_attention" and dropout > 0:
            raise self.unsupported(func, "draws random numbers together with a parameter")
