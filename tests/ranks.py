"""Two processes that run functions as the ranks of one gloo group, for tests of distributed training.

The processes are started once and serve all tests of a module: most of what such a test costs is the start. A function
that does not come back in time has hung in a collective, which is an error of its own: the processes are then replaced.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def serve(rank: int, path: str, connection: Any) -> None:
    """Join the group, then run what comes in until the pipe is closed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    warnings.simplefilter("error")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(rank, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """The running processes."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.starts = 0
        self.processes: list[Any] = []
        self.connections: list[Any] = []

    def start(self) -> None:
        context = mp.get_context("spawn")
        path = str(Path(self.folder.name) / f"group{self.starts}")
        self.starts += 1
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, path, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes, self.connections = [], []

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function, arguments))
        results: list[Any] = [None] * WORLD
        failures: list[str] = []
        waiting, end = dict(zip(self.connections, range(WORLD), strict=True)), time.monotonic() + seconds
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                failures += [f"rank {rank}: hung" for rank in waiting.values()]
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    done, results[rank] = connection.recv()
                except EOFError:
                    done, results[rank] = False, "died"
                if not done:
                    failures.append(f"rank {rank}: {results[rank]}")
                    end = min(end, time.monotonic() + 1)  # one that failed may leave the other waiting
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()
        self.folder.cleanup()
