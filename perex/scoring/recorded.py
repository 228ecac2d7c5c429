"""Steps on a GPU without the host's part in them: recorded once, as a CUDA graph, and replayed batch after batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.scoring.errors import ScoringError
from perex.scoring.nest import map_leaves, tensors

WARM = 2
"""How many batches of a form run as usual before one is recorded: the first are checked, and choose how to compute."""

Run = Callable[[Any, int | None], Any]  # of a batch, and B if known


class Recording(NamedTuple):
    """A step that was recorded.

    Attributes:
        graph: its kernels.
        inputs: the tensors that they read.
        results: what they write.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Any


class Recorded:
    """A function of a batch that runs from a recording, where there is one for batches of that form.

    What comes back is overwritten by the next batch. See `torch.cuda.CUDAGraph`: the function has to do the same for
    every batch of a form, whatever is in it.

    Args:
        run: the function; all tensors of a batch are on one GPU.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: Counter[Any] = Counter()
        self.recordings: dict[Any, Recording] = {}

    def __call__(self, batch: Any, size: int | None) -> Any:
        """What the function makes of a batch."""
        form = form_of(batch), size
        if form[0] is None:  # it holds what cannot be told from another of its kind
            return self.run(batch, size)
        recording = self.recordings.get(form)
        if recording is None:
            self.seen[form] += 1
            if self.seen[form] <= WARM:
                return self.run(batch, size)
            recording = self.recordings[form] = self.record(batch, size)
        for own, given in zip(recording.inputs, tensors(batch), strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.results

    def record(self, batch: Any, size: int | None) -> Recording:
        """Record the function at work on a copy of a batch."""
        own = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # where libraries make what they need on a stream of theirs
            self.run(own, size)
        try:
            with torch.cuda.graph(graph, stream=stream):
                results = self.run(own, size)
        except RuntimeError as error:
            raise ScoringError(
                f"this step cannot be recorded as a CUDA graph ({error}). Somewhere it waits for numbers: a branch, an "
                "index or a size that depends on them. Score with cuda_graphs=False"
            ) from error
        return Recording(graph, tensors(own), results)


def form_of(batch: Any) -> Any:
    """All of a batch but the numbers in its tensors; None if more than tensors, numbers and texts are in it."""
    try:
        return shape_of(batch)
    except TypeError:
        return None


def shape_of(tree: Any) -> tuple[Any, ...]:
    """The same of a part of it; keys and names, too, for tensors change places when these do."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, (int, float, bool, str, type(None))):
        return type(tree), tree
    if hasattr(tree, "to"):
        raise TypeError
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        return type(tree), *((name, shape_of(getattr(tree, name))) for name in names)
    if isinstance(tree, Mapping):
        return type(tree), *((key, shape_of(value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        return type(tree), *map(shape_of, tree)
    raise TypeError
