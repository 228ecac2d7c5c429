"""Score a pool: one pass over any data, one batched backward for each batch, two numbers kept per example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import chain
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from perex.attaching import attach
from perex.errors import LossError, PerexError
from perex.quantities import Quantity
from perex.scoring.data import open_pool
from perex.scoring.errors import ScoringError
from perex.scoring.losses import PerExampleLosses
from perex.scoring.nest import tensors, to_device
from perex.scoring.recorded import Recorded
from perex.scoring.scores import Scores, writer
from perex.scoring.state import Mode, frozen, prepared
from perex.tracker import Tracker

Step = Callable[[nn.Module, Any], Tensor]
Further = dict[str, tuple[Quantity, Tensor]]  # columns of a batch, each with whose it is
Compute = Callable[[nn.Module, Any, int | None], Tensor]  # model, batch and B if known, to losses (B,)


def score(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    ids: Sequence[Any] | np.ndarray | Tensor | None = None,
    params: Any = None,
    by: Literal["module", "parameter"] | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    mode: Mode = "eval",
    progress: bool = True,
    out: str | PathLike[str] | None = None,
    step: Step | None = None,
    audit: bool = True,
    cuda_graphs: bool = False,
) -> Scores:
    """Compute the loss and the gradient norm of every example in a pool.

        loss[i] = loss_fn(model(x[i:i+1]), y[i:i+1])
        norm[i] = || d loss[i] / d parameters ||

    The pool is streamed: beyond the result, memory holds one batch. The result is in the data's order
    whatever a loader does: its `shuffle` and `drop_last` are set aside, and a sampler only decides which
    examples are scored. The model is left as it was found, after an error too: the mode of every submodule,
    devices, `requires_grad` and `.grad`.

    Args:
        model: any module; called as `model(x)`.
        data: a Dataset, an IterableDataset, a DataLoader, or tensors `(X, y)` of shapes `(N, ...)`. With
            `loss_fn`, its batches are pairs `(x, y)`.
        loss_fn: a criterion `(output, target) -> Tensor`, with any `reduction` or none. The loss of an
            example is what it returns on that example alone, as a batch of one; several numbers, as
            `reduction="none"` may give, are summed. Output and target may be tuples, mappings or dataclasses
            of tensors `(B, ...)`.
        ids: one whole number or string for each example of the data; None for 0 to N-1.
        params: which parameters to track, as in `attach`; None for all that require grad.
        by: `"module"` or `"parameter"` to keep the norm of each one's gradient too, in `Scores.parts`.
        quantities: further statistics to keep of each example, by the name of their column: `{"val": perex.Dots(g)}`
            gives `Scores.extra["val"]` and its cosines `["val/cosine"]`. What a `perex.NoiseScale` says is in that
            object afterwards.
        batch_size: None for the loader's own, or 64.
        device: where to compute; None for where the model is.
        autocast: the dtype of mixed precision, such as `torch.bfloat16`; None for none.
        mode: `"eval"`, `"train"`, or None to leave each submodule's mode as it is.
        progress: show a progress bar with a rate, where tqdm is installed.
        out: a file to write the scores to as well; see `Scores.save` for the suffixes.
        step: instead of `loss_fn`, for models called in another way: `step(model, batch)` returns the losses
            `(B,)`, where `batch` is what the loader yields, on the device.
        audit: whether batches of new shapes are checked for examples that influence each other; see `attach`.
        cuda_graphs: on a GPU, record the step on the third batch of a shape, and replay it for those after it: several
            times faster where steps are short. Model and loss must run the same operators on every batch: a branch in
            Python, once recorded, is taken always. Where what is left of cancelling terms would have to be computed
            in another way, for a tied embedding, the norm is NaN. Not together with `quantities`.

    Returns:
        `Scores`: ids, losses and norms `(N,)`.

    Raises:
        ScoringError: an argument cannot be used as given, the pool is empty, or the size of a batch disagrees
            with what the model returns.
        LossError: a loss is not one number for each example.
        PerexError: see `attach`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> scores = score(model, (torch.randn(10, 3), torch.arange(10) % 2), nn.CrossEntropyLoss())
        >>> len(scores), scores.norms.shape
        (10, torch.Size([10]))
        >>> def step(model, batch):
        ...     return (model(batch["x"]).squeeze(1) - batch["y"]).square()
        >>> score(nn.Linear(3, 1), {"x": torch.randn(4, 3), "y": torch.zeros(4)}, step=step).losses.shape
        torch.Size([4])
    """
    if not isinstance(model, nn.Module):
        raise ScoringError(f"model is of type {type(model).__name__}; pass an nn.Module")
    if (loss_fn is None) == (step is None):
        raise ScoringError("pass either loss_fn, or step=lambda model, batch: losses")
    if by not in (None, "module", "parameter"):
        raise ScoringError(f'by must be "module", "parameter" or None, not {by!r}')
    if not isinstance(autocast, torch.dtype | None):
        raise ScoringError(f"autocast must be a dtype such as torch.bfloat16, or None, not {autocast!r}")
    if quantities is not None and not isinstance(quantities, Mapping):
        raise ScoringError(
            f"quantities is a {type(quantities).__name__}; pass a dict from a column's name to a quantity, such as "
            '{"cosine": perex.Dots(direction)}'
        )
    _check_names(quantities or {})
    if cuda_graphs and quantities:
        raise ScoringError("cuda_graphs=True is for losses and norms: further quantities count batches as they run")
    write = None if out is None else writer(out)
    names = _names(ids)
    pool = open_pool(data, batch_size)
    if names is not None and pool.length not in (None, len(names)):
        raise ScoringError(f"ids: there are {len(names)} for {pool.length} examples; pass one for each")
    home = torch.device(device) if device is not None else _device_of(model)
    if home.type == "cuda" and not torch.cuda.is_available():
        raise ScoringError(f"device={device!r}: torch finds no GPU here")
    if cuda_graphs and home.type != "cuda":
        raise ScoringError(f"cuda_graphs=True needs a GPU, and the model is on {home}")
    compute = _by_step(step) if step is not None else _by_criterion(PerExampleLosses(loss_fn))  # type: ignore[arg-type]

    further = dict(quantities or {})
    columns = _Columns()
    memory: Any = "high" if any(quantity.keeps for quantity in further.values()) else "none"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        prepared(model, mode, home if device is not None else None),
        frozen(loss_fn),
        attach(model, *further.values(), params=params, param_grads=False, audit=audit, memory=memory) as px,
        _bar(progress, pool.size) as advance,
    ):

        def run(batch: Any, size: int | None) -> tuple[Tensor, Any, Any]:
            with torch.autocast(home.type, autocast) if autocast is not None else nullcontext():
                losses = compute(model, batch, size)
            px.backward(losses)
            return losses.detach(), px.norms(), {} if by is None else px.norms(by)

        scored = Recorded(run) if cuda_graphs else run
        for positions, batch in pool.batches:
            losses, norms, parts = scored(to_device(batch, home), None if positions is None else len(positions))
            columns.add(positions, losses, norms, parts, further_columns(px, further))
            advance(len(losses))
            if names is not None and pool.length is None and columns.count > len(names):
                raise ScoringError(f"ids: there are {len(names)}, but more examples; pass one for each")
    if not columns.count:
        raise ScoringError("data is empty: there is no example to score")
    if names is not None and pool.length is None and columns.count < len(names):
        raise ScoringError(f"ids: there are {len(names)} for {columns.count} examples; pass one for each")
    scores = columns.scores(names)
    if write is not None:
        write(scores, out)
    return scores


def _by_criterion(losses_of: PerExampleLosses) -> Compute:
    """Make the function from a batch `(x, y)` to losses `(B,)`."""

    def compute(model: nn.Module, batch: Any, size: int | None) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            raise ScoringError(
                f"with loss_fn, data must yield pairs (x, y), but it yields a {what}; "
                "pass step=lambda model, batch: losses"
            )
        x, y = batch
        if size is None:
            size = next((len(tensor) for tensor in tensors(batch) if tensor.dim()), 0)
        try:
            output = model(x)
        except TypeError as error:
            raise _says(error, "model(x)", type(x).__name__) from error
        try:
            return losses_of(output, y, size)
        except (TypeError, AttributeError) as error:
            raise _says(error, "loss_fn(output, target)", type(output).__name__) from error

    return compute


def _says(error: Exception, call: str, given: str) -> Exception:
    """An error of the model's or the criterion's, with what else can be done."""
    if isinstance(error, PerexError):
        return error
    return ScoringError(
        f"{call} raised {type(error).__name__}: {error}. It was given a {given}; where the model takes or returns "
        "something else than one tensor, pass step=lambda model, batch: losses, which calls both in your way"
    )


def _by_step(step: Step) -> Compute:
    """Make the function from any batch to losses `(B,)`, checked."""

    def compute(model: nn.Module, batch: Any, size: int | None) -> Tensor:
        losses = step(model, batch)
        if not isinstance(losses, Tensor):
            raise LossError(f"step returned a {type(losses).__name__}; return a tensor, one loss per example")
        if losses.dim() != 1 or size not in (None, len(losses)):
            needed = "(B,)" if size is None else f"({size},)"
            raise LossError(
                f"step returned losses of shape {tuple(losses.shape)}, but the batch needs {needed}: one for "
                'each example. Use reduction="none" in the criterion, then average all axes but the first; a loss that '
                "the model itself returns is of the whole batch, so compute the losses from its outputs (`.logits`)"
            )
        return losses

    return compute


class _Columns:
    """The result as it grows: positions, losses and norms of the batches so far, on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.positions: list[np.ndarray] = []
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}
        self.extra: dict[str, tuple[Quantity, list[Tensor]]] = {}

    def add(self, positions: Sequence[int] | None, losses: Tensor, norms: Any, parts: Any, extra: Further) -> None:
        """Append a batch; a part that is missing from some batch has no gradient there: norm zero."""
        size = len(losses)
        zeros = torch.zeros_like(norms, device="cpu")
        if parts:  # one copy from the device for all of them
            rows = torch.stack([part.to(norms) for part in parts.values()]).cpu()
            parts = dict(zip(parts, rows, strict=True))
        for name in parts:
            self.parts.setdefault(name, [zeros.new_zeros(self.count)])
        for name, chunks in self.parts.items():
            chunks.append(parts.get(name, zeros))
        for name, (quantity, values) in extra.items():
            self.extra.setdefault(name, (quantity, []))[1].append(values.detach().cpu())
        counted = range(self.count, self.count + size)
        self.positions.append(np.array(counted if positions is None else positions))
        self.losses.append(losses.to("cpu", torch.promote_types(losses.dtype, torch.float32)))
        self.norms.append(norms.cpu())
        self.count += size

    def scores(self, names: np.ndarray | None) -> Scores:
        """Put the examples in the data's order, and name them."""
        positions = np.concatenate(self.positions)
        order = np.argsort(positions, kind="stable")
        rows = torch.from_numpy(order)
        ids = positions[order] if names is None else names[positions[order]]
        parts = {name: torch.cat(chunks)[rows] for name, chunks in self.parts.items()}
        extra = {name: quantity.pooled(chunks, rows) for name, (quantity, chunks) in self.extra.items()}
        return Scores(ids, torch.cat(self.losses)[rows], torch.cat(self.norms)[rows], parts, extra)


TAKEN = ("id", "loss", "norm", "file", "allow_pickle")
"""Names of columns that there are, and of arguments of NumPy, which writes them."""


def _check_names(quantities: Mapping[str, Quantity]) -> None:
    """Raise if a statistic's column would take another one's place."""
    for name, quantity in quantities.items():
        if not isinstance(name, str) or name in TAKEN or name.startswith("norm/"):
            raise ScoringError(f"quantities: {name!r} is no name for a further column; give it another one")
        for other, same in quantities.items():
            if other != name and other.startswith(f"{name}/"):
                raise ScoringError(f"quantities: {other!r} may be a column of {name!r}; give one of them another name")
            if other != name and same is quantity:
                raise ScoringError(f"quantities: {name!r} and {other!r} are one object, which would see all twice")


def further_columns(px: Tracker, quantities: Mapping[str, Quantity]) -> Further:
    """What the further statistics say of a batch, `(B, ...)` each, by the name of its column."""
    found: Further = {}
    for name, quantity in quantities.items():
        for rest, values in quantity.columns(px).items():
            found[f"{name}/{rest}" if rest else name] = quantity, values
    return found


def _names(ids: Any) -> np.ndarray | None:
    """Turn the user's ids into an array `(N,)` of whole numbers or strings."""
    if ids is None:
        return None
    names = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(list(ids))
    if names.ndim != 1 or (names.dtype.kind not in "iuU" and len(names)):
        raise ScoringError("ids must be whole numbers or strings, one for each example; try [str(i) for i in ids]")
    return names


def _device_of(model: nn.Module) -> torch.device:
    """Tell where a model expects its input: where its first parameter or buffer is."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def _bar(wanted: bool, total: int | None) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar where tqdm is installed; yields the function that moves it on."""
    if not wanted or find_spec("tqdm") is None:
        yield lambda examples: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="scoring", unit=" examples") as bar:
        yield bar.update
