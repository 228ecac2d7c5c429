"""Single precision, as models are used: layers whose kernels differ between precisions, against the loop."""

import pytest
import torch
from torch import Tensor, nn

import perex


class First(nn.Module):
    """A recurrent or attention layer whose first result counts."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.times)[0]


MODELS = {
    "LSTM": lambda: First(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), 1),
    "LSTM with projections": lambda: First(nn.LSTM(4, 5, batch_first=True, proj_size=3), 1),
    "GRU": lambda: First(nn.GRU(4, 5, batch_first=True), 1),
    "RNN": lambda: First(nn.RNN(4, 5, batch_first=True), 1),
    "attention": lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 3),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "convolution": lambda: nn.Sequential(nn.Conv1d(7, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(8, 3, 2)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(7, 7), nn.RMSNorm(4)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("param_grads", [True, False])
def test_norms_in_float32(name, param_grads):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(3, 7, 4)
    with perex.attach(model, param_grads=param_grads) as px:
        px.backward(model(x).sin().flatten(1).sum(1))
    for b in range(3):
        grads = torch.autograd.grad(model(x[b : b + 1]).sin().sum(), list(model.parameters()))
        expected = torch.stack([grad.norm() for grad in grads]).norm()
        torch.testing.assert_close(px.norms()[b], expected, rtol=1e-4, atol=0)
