"""Triton kernels: interpreted against float64, compiled for GPUs that are not there, and neither seen nor missed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import BUILT

from perex.factors import Outer
from perex.factors.outline import outline
from perex.kernels import outer
from perex.kernels.spot import Spot, at
from perex.kernels.strategies import Preferences, preferring
from perex.kernels.triton import available

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux only")


def fresh(*command: str, **environment: str) -> str:
    """The output of a fresh Python."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=settings, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("part", ["outer", "not outer"])
def test_interpreted(part):
    chosen = ["-q", "-p", "no:cacheprovider", "-k", part]
    print(fresh("-m", "pytest", *chosen, str(HERE / "triton_kernels.py"), TRITON_INTERPRET="1"))


@needs_triton
def test_compiled(tmp_path):
    """The interpreter takes code that the compiler refuses. It needs no GPU to compile for one."""
    lines = fresh(str(HERE / "triton_compiled.py"), "80", "90", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 2 * 3 * 9
    for line in lines:
        kernel, dtype, shared, on_tensor_cores = line.split()
        assert int(shared) <= 99 * 1024  # what the smallest of these GPUs have
        assert (on_tensor_cores == "True") == (kernel in ("direct_kernel", "gram_kernel") and dtype != "fp32")


def test_perex_imports_no_triton_and_none_for_tensors_on_a_cpu():
    """torch's own counter of operations, in which perex enters a formula, imports it: that is forgotten first."""
    code = """
import sys, torch, torch.utils.flop_counter
found = lambda: {name for name in sys.modules if name.partition(".")[0] == "triton"}
for name in found(): del sys.modules[name]
import perex
assert not found()
model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
for strategies in ([], ["Triton direct", "Triton Gram", "Triton segments"]):
    with perex.attach(model, strategies=strategies) as px:
        model(torch.zeros(3, 2).long()).sum((1, 2)).mean().backward()
        px.norms(), str(px.report())
assert not found()
print([row.way for row in px.report().rows])
"""
    ways = fresh("-c", code).strip()
    assert ways.startswith("['segments', ") and "Triton" not in ways


def test_perex_runs_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None
import torch, perex
model = torch.nn.Linear(4, 2)
with perex.attach(model, strategies="Triton direct") as px:
    model(torch.ones(3, 2, 4)).sum((1, 2)).mean().backward()
    print(len(px.norms()))
"""
    assert fresh("-c", code, TRITON_INTERPRET="1").strip() == "3"


def test_on_a_gpu_they_are_chosen_by_cost(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("importable", "compiles"):
        monkeypatch.setattr(available, name, lambda: True)
    shapes = [torch.Size((8, 1, 4096, 768)), torch.Size((8, 1, 4096, 3072))]
    expected = {
        Spot("cuda", torch.bfloat16): "Triton direct",
        Spot("cuda", torch.float64): "direct",
        Spot("cpu", torch.float32): "compiled direct" if BUILT else "direct",
        None: "compiled direct" if BUILT else "direct",
    }
    for spot, way in expected.items():
        with at(spot):
            assert outer.plan(*shapes).way == way
    with at(Spot("cuda", torch.bfloat16)), preferring(Preferences(("direct",))):
        assert outer.plan(*shapes).way == "direct"
    with at(Spot("cuda", torch.bfloat16)):
        assert outer.plan(torch.Size((32, 1, 64, 4096)), torch.Size((32, 1, 64, 4096))).way == "Triton Gram"


def test_an_outline_knows_where_its_tensors_were():
    factor = Outer(torch.empty(2, 5, 3, device="meta"), torch.empty(2, 5, 4, device="meta"), torch.Size((3, 4)))
    assert outline(factor).spot() == Spot("meta", torch.float32)
