"""perex's own bookkeeping stays where it is, whatever device a user has made the default one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import perex

MAKERS = set("rand randn randint zeros ones arange tensor empty full eye linspace randperm as_tensor".split())


def unplaced(source: str) -> list[int]:
    """Lines on which a tensor is made without saying where."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [
        node
        for node in calls
        if isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in MAKERS
    ]
    return [node.lineno for node in named if not any(keyword.arg == "device" for keyword in node.keywords)]


def test_every_tensor_that_perex_makes_has_a_place():
    folder = Path(perex.__file__).parent
    found = {str(path): unplaced(path.read_text()) for path in folder.rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}
    assert unplaced("x = torch.zeros(3)") == [1]


class Table(nn.Module):
    """Ids, an embedding that is the head too, rows picked by a mask, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.linear = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h.masked_scatter((ids > 2)[..., None], self.linear(h[ids > 2]))
        return self.norm(h) @ self.table.weight.T


MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), lambda: torch.randn(4, 6)),
    "CNN": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), lambda: torch.randn(4, 3, 9, 9)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 80), nn.Linear(80, 5)), lambda: torch.randn(4, 40, 6)),
    "table": (Table, lambda: torch.randint(7, (4, 5))),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), lambda: torch.randn(4, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_the_same_under_another_default_device(name: str):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()

    def found() -> list[Tensor]:
        model.zero_grad()
        with perex.attach(model, perex.NoiseScale(), perex.Projections(4, seed=1), memory="high") as px:
            for _ in range(2):
                px.backward(model(x).flatten(1).square().sum(1))
                norms = px.norms()
            px.clip_(1.0)
            str(px.report())
            grads = [parameter.grad.clone() for parameter in model.parameters()]
            read = [norms, *grads, px.gradients().gram()]
        scores = perex.score(model, (x, x), lambda out, _: out.flatten(1).square().sum(1), batch_size=2, progress=False)
        assert perex.verify(model, (x, x), lambda out, _: out.flatten(1).square().sum(1))
        return [*read, torch.as_tensor(scores.norms, device="cpu")]

    expected = found()
    with torch.device("meta"):
        there = found()
    for one, other in zip(expected, there, strict=True):
        torch.testing.assert_close(one, other)
