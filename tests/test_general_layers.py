"""Layers without a rule of their own, built-in or of a user's making: exact, each inside a small model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Bare, check, exact_or_refused, scramble
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import perex

B, T, D = 3, 3, 4


def model(*layers: nn.Module, seed: int = 0) -> nn.Module:
    return scramble(nn.Sequential(*layers), seed)


# ---------------------------------------------------------------------- subclasses and parametrizations


class Scaled(nn.Embedding):
    """Scales its output, as several language models do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.5


class PositionTable(nn.Embedding):
    """Takes no ids, only a length."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(torch.arange(x.shape[1]))


class SamePad(nn.Conv1d):
    """Pads by itself, more on one side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv1d):
    """Standardises its weight before use."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        w = w / (w.var((1, 2), keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, w, self.bias)


class Squared(nn.Linear):
    """Adds something before calling its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.square()) + super().forward(x)


class Adapted(nn.Linear):
    """A low-rank adapter inside the layer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.a = nn.Parameter(torch.randn(2, self.in_features))
        self.b = nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.a.t()) @ self.b.t()


class ZeroCentred(nn.LayerNorm):
    """Its weight is an offset from one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Quiet(nn.Linear):
    """Leaves its bias out of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Doubling(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w.tanh()


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubling())
    return layer


WEIGHTS = {
    "subclass of Linear that squares": lambda: Squared(D, 5),
    "subclass of Linear with an adapter": lambda: Adapted(D, 5),
    "subclass of Linear without its bias": lambda: Quiet(D, 5),
    "subclass of LayerNorm": lambda: ZeroCentred(D),
    "subclass of Conv1d that pads": lambda: SamePad(T, 5, 3),
    "subclass of Conv1d that standardises": lambda: Standardised(T, 5, 3),
    "subclass of Embedding that adds positions": lambda: PositionTable(7, D),
    "parametrized Linear": lambda: parametrized(nn.Linear(D, 5)),
    "parametrized Conv1d": lambda: parametrized(nn.Conv1d(T, 5, 2)),
    "weight norm of Linear": lambda: parametrizations.weight_norm(nn.Linear(D, 5)),
    "weight norm of Conv1d": lambda: parametrizations.weight_norm(nn.Conv1d(T, 5, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(D, 5)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, D)),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_changed_weights(case):
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(D, D), WEIGHTS[case](), nn.Tanh()), (torch.randn(B, T, D),))


def test_cached_parametrization():
    layer = parametrized(nn.Linear(D, D))

    def twice(m, x):
        with parametrize.cached():
            return m.layer(m.layer(x))

    both = Bare(twice)
    both.layer = layer
    exact_or_refused(both, (torch.randn(B, T, D),))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("old", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_reparametrization_by_hooks(old):
    """The old way: a pre-forward hook computes the weight. Such a module cannot be copied."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, D), old(nn.Linear(D, 5))).eval()

    check(make, (torch.randn(B, T, D),))


def test_subclass_of_embedding_that_scales():
    check(model(Scaled(5, D), nn.Linear(D, 2)), (torch.randint(5, (B, T)),))


# ---------------------------------------------------------------------- built-in layers


class First(nn.Module):
    """The first of a layer's several results; `reads` says how x is handed over."""

    def __init__(self, layer: nn.Module, reads=lambda layer, x: layer(x)):
        super().__init__()
        self.layer, self.reads = layer, reads

    def forward(self, x: Tensor) -> Tensor:
        out = self.reads(self.layer, x)
        return out[0] if isinstance(out, tuple) else out


def time_first(layer, x):
    out = layer(x.transpose(0, 1))
    return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)


def attention(layer, x):
    return layer(x, x, x)


def attention_time_first(layer, x):
    x = x.transpose(0, 1)
    return layer(x, x, x, need_weights=False)[0].transpose(0, 1)


def causal(layer, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)


def cross(layer, x):
    return layer(x[:, :2], x, x.flip(1))


def cells(cell, x):
    h = None
    for step in x.unbind(1):
        h = cell(step, h)
    return h if torch.is_tensor(h) else h[0]


def last_state(layer, x):
    return layer(x)[1].transpose(0, 1)


E = {"d_model": D, "nhead": 2, "dim_feedforward": 5, "dropout": 0.0}
MUST = {  # name: (layer, how x of shape (B, T, D) is handed to it)
    "MultiheadAttention": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), attention),
    "MultiheadAttention without bias": (
        lambda: nn.MultiheadAttention(D, 2, bias=False, batch_first=True),
        attention,
    ),
    "MultiheadAttention, time first": (lambda: nn.MultiheadAttention(D, 2), attention_time_first),
    "MultiheadAttention, causal": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), causal),
    "MultiheadAttention, cross": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), cross),
    "MultiheadAttention, learned key": (
        lambda: nn.MultiheadAttention(D, 2, add_bias_kv=True, batch_first=True),
        attention,
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(**E, batch_first=True), None),
    "TransformerEncoderLayer, norm first": (
        lambda: nn.TransformerEncoderLayer(**E, batch_first=True, norm_first=True, activation="gelu"),
        None,
    ),
    "TransformerEncoderLayer, time first": (lambda: nn.TransformerEncoderLayer(**E), time_first),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**E, batch_first=True), 2, enable_nested_tensor=False),
        None,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(**E, batch_first=True),
        lambda layer, x: layer(x, x.flip(1)),
    ),
    "Transformer": (
        lambda: nn.Transformer(D, 2, 1, 1, 5, 0.0, batch_first=True),
        lambda layer, x: layer(x, x[:, :2]),
    ),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(dim=2), lambda layer, x: layer(x, x.flip(1))),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), None),
    "PixelShuffle": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, T)), nn.Conv2d(1, 4, 1), nn.PixelShuffle(2)),
        None,
    ),
    "Unfold": (lambda: nn.Sequential(nn.Unflatten(1, (1, T)), nn.Unfold(2), nn.Linear(6, 2)), None),
    "pooling": (
        lambda: nn.Sequential(
            nn.Conv1d(T, 4, 1), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)
        ),
        None,
    ),
    "upsampling": (
        lambda: nn.Sequential(nn.Conv1d(T, 2, 1), nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(2, 2, 3)),
        None,
    ),
    "gated linear unit": (lambda: nn.Sequential(nn.Linear(D, 6), nn.GLU(), nn.Linear(3, 2)), None),
    "softmax": (lambda: nn.Sequential(nn.Linear(D, 6), nn.LogSoftmax(-1), nn.Linear(6, 2)), None),
}
R = {"input_size": D, "hidden_size": 5}
MAY = {  # recurrent layers are one operator: exact or refused
    "LSTM": (lambda: nn.LSTM(**R, batch_first=True), None),
    "LSTM, time first": (lambda: nn.LSTM(**R), time_first),
    "LSTM, two layers, both ways, projected": (
        lambda: nn.LSTM(**R, num_layers=2, bidirectional=True, proj_size=2, batch_first=True),
        None,
    ),
    "GRU": (lambda: nn.GRU(**R, batch_first=True), None),
    "GRU, time first": (lambda: nn.GRU(**R), time_first),
    "GRU, last state": (lambda: nn.GRU(**R, batch_first=True), last_state),
    "RNN": (lambda: nn.RNN(**R, batch_first=True, nonlinearity="tanh"), None),
    "RNN without bias": (lambda: nn.RNN(**R, batch_first=True, bias=False), None),
    "LSTMCell": (lambda: nn.LSTMCell(D, 5), lambda cell, x: cell(x[:, 0])[1]),
    "GRUCell over time": (lambda: nn.GRUCell(D, 5), cells),
    "RNNCell over time": (lambda: nn.RNNCell(D, 5), cells),
}


def inside(case: tuple) -> nn.Module:
    build, reads = case
    torch.manual_seed(0)
    layer = First(build(), reads) if reads else First(build())
    return scramble(nn.Sequential(nn.Linear(D, D), layer, nn.Tanh()))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("case", MUST)
def test_built_in(case, batch):
    check(inside(MUST[case]), (torch.randn(batch, T, D),))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("case", MAY)
def test_recurrent(case, batch):
    exact_or_refused(inside(MAY[case]), (torch.randn(batch, T, D),))


def test_packed_sequence_is_exact_or_refused():
    """Rows of a packed batch belong to examples by length, not by place."""

    def packed(m, x, lengths):
        seq = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out = seq._replace(data=m.inner(seq.data))
        return nn.utils.rnn.pad_packed_sequence(m.rnn(out)[0], batch_first=True, total_length=x.shape[1])[0]

    net = Bare(packed)
    net.inner, net.rnn = nn.Linear(D, D), nn.GRU(D, 5, batch_first=True)
    exact_or_refused(scramble(net), (torch.randn(B, T, D), torch.tensor([1, 3, 2])))


class Routed(nn.Module):
    """A mixture of two experts: each token goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Linear(D, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = flat.new_zeros(len(flat), 5)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            out.index_add_(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view(*x.shape[:2], 5)


def test_mixture_of_experts_is_exact_or_refused():
    exact_or_refused(scramble(Routed()), (torch.randn(B, T, D),))


class Double(torch.autograd.Function):
    """An operator that no table of operators knows."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: Double.apply(x) @ m.w + m.a,
        lambda m, x: Double.apply(x @ m.w) + m.a,
        lambda m, x: x @ Double.apply(m.w),
        lambda m, x: Double.apply(m.a.expand(len(x), -1)) + x @ m.w,
    ],
    ids=["input", "activation", "parameter", "expanded parameter"],
)
def test_custom_autograd_function_is_exact_or_refused(function):
    for shape in ((2, 3, 4), (3, 3, 4)):
        exact_or_refused(Bare(function, w="45", a="5"), (torch.randn(*shape)[:, 0],))


def test_parameters_in_containers():
    def forward(m, x):
        for w in m.ws:
            x = torch.tanh(x @ w)
        return x * m.named["scale"] + m.named["shift"]

    net = Bare(forward)
    net.ws = nn.ParameterList([torch.randn(D, 5), torch.randn(5, 5), torch.randn(5, D)])
    net.named = nn.ParameterDict({"scale": torch.randn(D), "shift": torch.randn(())})
    check(net, (torch.randn(B, T, D),))


def test_lazy_layers_once_they_have_weights():
    net = nn.Sequential(nn.Linear(D, 3), nn.ReLU(), nn.LazyLinear(2))
    net(torch.randn(1, T, D))
    check(net, (torch.randn(B, T, D),))


def test_dropout_keeps_its_random_numbers():
    net, x = nn.Sequential(nn.Linear(D, 50), nn.Dropout(0.5), nn.Linear(50, 2)), torch.randn(B, T, D)
    torch.manual_seed(3)
    expected = net(x)
    for param_grads in (True, False):
        with perex.attach(net, param_grads=param_grads) as px:
            torch.manual_seed(3)
            out = net(x)
            out.sum((1, 2)).mean().backward()
            assert torch.equal(out, expected) and px.norms().shape == (B,)
