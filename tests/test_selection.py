"""Some parameters tracked, others not: those are constants to perex, wherever they are used."""

import pytest
import torch
from oracle import check
from torch import Tensor, nn


class Mixed(nn.Module):
    """Bare parameters, a table read by constant ids, a derived weight and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.register_buffer("order", torch.arange(6).unsqueeze(0))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.places(self.order[:, : ids.shape[1]]) * self.gain.exp()
        h = torch.cat((self.token.expand(len(ids), -1, -1), h), 1)
        return self.head(h * self.gain).tanh() @ self.words.weight.t()


CHOICES = [
    "words.weight",
    "places.weight",
    "token",
    "gain",
    "head.bias",
    "head.parametrizations.weight.original0",
    "head.*",
    ["token", "places.*"],
]


@pytest.mark.parametrize("params", CHOICES, ids=str)
@pytest.mark.parametrize("size", [(3, 5), (5, 5), (1, 5)])
def test_a_few_of_many(params, size):
    torch.manual_seed(0)
    check(Mixed().double(), (torch.randint(9, size),), params=[params] if isinstance(params, str) else params)


@pytest.mark.parametrize("frozen", CHOICES[:5], ids=str)
def test_all_but_a_frozen_one(frozen):
    torch.manual_seed(0)
    model = Mixed().double()
    model.get_parameter(frozen).requires_grad_(False)
    check(model, (torch.randint(9, (3, 5)),))
