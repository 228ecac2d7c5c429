"""perex on a GPU, against a loop over batches of one in float64 on the same GPU. Skipped where there is none."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import perex

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

B = 5


@pytest.fixture(autouse=True)
def on_gpu():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with torch.device("cuda"):
        yield
    torch.set_float32_matmul_precision("highest")


def losses_of(output: Any, examples: Tensor) -> Tensor:
    """One loss an example, weighted so that no two examples and entries are alike."""
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    flat = output.double().flatten(1)
    weights = torch.sin(1 + 0.7 * examples[:, None] + 1.3 * torch.arange(flat.shape[1]))
    return (weights * torch.sin(flat)).sum(1)


def by_loop(model: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Any]) -> dict[str, Tensor]:
    """`(B, *shape)` gradients of each parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for b in range(len(x)):
        loss = losses_of(forward(model, x[b : b + 1]), torch.tensor([b])).sum()
        found.append(torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True))
    return {name: torch.stack(each).double() for name, each in zip(names, zip(*found, strict=True), strict=True)}


def called(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def squares(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.flatten(1).square().sum(1) for name, each in gradients.items()}


def near(found: Tensor, expected: Tensor, rtol: float, what: str, least: float = 0.0) -> None:
    scale = max(float(expected.abs().max()), least)
    off = float((found.double() - expected).abs().max())
    assert off <= rtol * scale, f"{what}: off by {off:.3g} of {scale:.3g}"


def check(model: nn.Module, x: Tensor, rtol: float = 2e-5, forward: Callable[..., Any] = called) -> None:
    """Norms by parameter and `.grad`, of both ways of running the backward, against the loop."""
    exact = copy.deepcopy(model).double()
    gradients = by_loop(exact, x.double() if x.is_floating_point() else x, forward)
    expected, examples = squares(gradients), torch.arange(len(x))
    least = 1e-3 * float(sum(expected.values()).max())  # below this, a parameter's own rounding is not looked at
    for param_grads in (False, True):
        with perex.attach(model, param_grads=param_grads) as px:
            for _ in range(2):  # the second with what the first found out
                model.zero_grad(set_to_none=True)
                px.backward(losses_of(forward(model, x), examples))
                norms = px.squared_norms(by="parameter")
            total = px.squared_norms()
            str(px.report())
        for name, each in expected.items():
            near(norms[name], each, 2 * rtol, name, least)
        near(total, sum(expected.values()), 2 * rtol, "all")
        for name, parameter in model.named_parameters():
            assert param_grads or parameter.grad is None
            if param_grads and parameter.grad is not None:
                near(parameter.grad, gradients[name].mean(0), 10 * rtol, f"{name}.grad", 0.1 * least**0.5)


class Conv1D(nn.Module):
    """As Hugging Face's."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self, vocabulary: int = 11, d: int = 6) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(vocabulary, d), nn.Linear(d, d)
        self.positions = nn.Parameter(torch.randn(7, d))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.positions[: ids.shape[1]]
        return F.linear(h + self.hidden(h).tanh(), self.embedding.weight)


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: self.second(self.first(h).tanh()), x, use_reentrant=False)


def network(name: str, **options: Any) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).eval()


@dataclass
class Case:
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]


def real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape)


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, (B, *shape))


CASES = {
    "linear, 2-d": Case(lambda: nn.Linear(33, 17), real(33)),
    "linear, 3-d": Case(lambda: nn.Linear(33, 17), real(9, 33)),
    "linear, 4-d": Case(lambda: nn.Linear(33, 17), real(3, 4, 33)),
    "linear, long": Case(lambda: nn.Linear(64, 160), real(300, 64)),
    "linear, wide": Case(lambda: nn.Linear(640, 1031), real(33, 640)),
    "MLP": Case(lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(inplace=True), nn.Linear(30, 4)), real(20)),
    "Conv1D": Case(lambda: Conv1D(24, 48), real(10, 24)),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), real(6, 21)),
    "conv2d": Case(lambda: nn.Conv2d(16, 32, 3, padding=1), real(16, 14, 13)),
    "conv2d, many positions": Case(lambda: nn.Conv2d(3, 16, 7, stride=2, padding=3), real(3, 64, 60)),
    "conv2d, few positions": Case(lambda: nn.Conv2d(64, 96, 3, padding=1), real(64, 4, 4)),
    "conv2d, one by one": Case(lambda: nn.Conv2d(32, 48, 1, bias=False), real(32, 9, 8)),
    "conv2d, strided one by one": Case(lambda: nn.Conv2d(32, 48, 1, stride=2), real(32, 9, 8)),
    "conv3d": Case(lambda: nn.Conv3d(3, 4, (2, 3, 2), padding=1), real(3, 5, 6, 4)),
    "conv2d, groups": Case(lambda: nn.Conv2d(12, 24, 3, groups=3, padding=1), real(12, 8, 8)),
    "conv2d, depthwise": Case(lambda: nn.Conv2d(12, 12, 3, groups=12, padding=1), real(12, 8, 8)),
    "conv2d, dilated": Case(lambda: nn.Conv2d(5, 7, 3, dilation=2, stride=2, padding=2), real(5, 15, 14)),
    "conv2d, circular": Case(lambda: nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular"), real(5, 9, 8)),
    "conv2d, same": Case(lambda: nn.Conv2d(5, 7, 3, padding="same"), real(5, 9, 8)),
    "conv2d, transposed": Case(
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), real(6, 5, 6)
    ),
    "conv1d, transposed": Case(lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), real(6, 9)),
    "channels last": Case(
        lambda: nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(B, 8, 9, 9).to(memory_format=torch.channels_last),
    ),
    "embedding": Case(lambda: nn.Embedding(7, 12), ids(7, 20)),
    "embedding, padding": Case(lambda: nn.Embedding(7, 12, padding_idx=2), ids(7, 20)),
    "embedding bag": Case(lambda: nn.EmbeddingBag(7, 12, mode="mean"), ids(7, 6)),
    "tied": Case(Tied, ids(11, 7)),
    "layer norm": Case(lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16)), real(6, 12)),
    "group norm": Case(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)), real(3, 8, 8)),
    "rms norm": Case(lambda: nn.Sequential(nn.Linear(12, 16), nn.RMSNorm(16, eps=1e-5)), real(6, 12)),
    "instance norm": Case(lambda: nn.InstanceNorm2d(3, affine=True), real(3, 8, 8)),
    "batch norm": Case(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8)).eval(), real(3, 8, 8)),
    "LSTM": Case(lambda: First(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)), real(7, 5)),
    "GRU": Case(lambda: First(nn.GRU(5, 6, batch_first=True)), real(7, 5)),
    "attention": Case(Attention, real(9, 8)),
    "encoder layer": Case(lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), real(9, 8)),
    "checkpointed": Case(Checkpointed, real(4, 6)),
    "GPT-2": Case(
        lambda: network(
            "GPT2LMHeadModel", n_layer=2, n_embd=24, n_head=2, vocab_size=61, n_positions=20, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        ),
        ids(61, 17),
    ),
    "BERT": Case(
        lambda: network(
            "BertForSequenceClassification", hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=40, vocab_size=61, max_position_embeddings=20,
        ),
        ids(61, 17),
    ),
    "ViT": Case(
        lambda: network(
            "ViTForImageClassification", hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=40, image_size=16, patch_size=4,
        ),
        real(3, 16, 16),
    ),
    "ResNet": Case(
        lambda: network("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        real(3, 32, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_in_float32(name):
    check(CASES[name].make(), CASES[name].x())


@pytest.mark.parametrize("name", ["linear, 3-d", "conv2d", "conv2d, few positions", "tied", "GPT-2", "ResNet", "LSTM"])
def test_in_float64(name):
    x = CASES[name].x()
    check(CASES[name].make().double(), x.double() if x.is_floating_point() else x, 1e-10)


HALVES = [
    "linear, 2-d", "linear, 3-d", "linear, long", "linear, wide", "Conv1D", "conv1d", "conv2d",
    "conv2d, many positions", "conv2d, few positions", "conv2d, one by one", "conv2d, groups", "conv2d, depthwise",
    "conv2d, transposed", "conv3d", "tied", "layer norm", "batch norm", "attention", "checkpointed", "GPT-2", "ViT",
    "ResNet",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_autocast(name, dtype):
    def forward(model: nn.Module, x: Tensor) -> Any:
        with torch.autocast("cuda", dtype) if x.dtype != torch.float64 else nullcontext():
            return model(x)

    check(CASES[name].make(), CASES[name].x(), 0.2 if dtype == torch.bfloat16 else 0.05, forward)


@pytest.mark.parametrize("name", ["linear, 3-d", "linear, long", "Conv1D", "conv2d", "tied"])
def test_half_precision_is_multiplied_exactly(name):
    """Of what the layers have got, products are exact: only these are compared, with float64 ones of the same."""
    case = CASES[name]
    model, x = case.make().bfloat16(), case.x()
    x = x.bfloat16() if x.is_floating_point() else x
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model(x), torch.arange(B)))
        found = px.squared_norms(by="parameter")
        kept = px.gradients()
        for name in found:
            exact = [total.dense(0, B) for total in kept.totals(name)]
            expected = sum(exact).double().flatten(1).square().sum(1) * kept.scale**2
            near(found[name], expected, 2e-5, name)


@pytest.mark.parametrize("name", ["linear, long", "linear, wide", "conv2d", "conv2d, many positions", "GPT-2", "ViT"])
def test_tf32(name):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    check(CASES[name].make(), CASES[name].x(), 1e-2)


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("name", ["linear, 3-d", "conv2d", "tied", "GPT-2"])
def test_clipping(name, memory):
    model, x = CASES[name].make(), CASES[name].x()
    exact = copy.deepcopy(model).double()
    gradients = by_loop(exact, x.double() if x.is_floating_point() else x, called)
    norms = sum(squares(gradients).values()).sqrt()
    bound = float(norms.median())
    weights = torch.linspace(0.5, 2, B)
    px = perex.attach(model, param_grads=False, memory=memory)
    for how in ("clip", "reweight"):
        px.backward(losses_of(model(x), torch.arange(B)))
        if how == "clip":
            px.clip_(max_norm=bound)
        else:
            px.reweight_(weights)
        factors = (bound / norms).clamp(max=1) if how == "clip" else weights.double()
        for name, parameter in model.named_parameters():
            expected = torch.tensordot(factors, gradients[name], 1)
            near(parameter.grad, expected, 1e-4, f"{how} {name}")
        model.zero_grad(set_to_none=True)
    px.detach()


def test_scaler():
    model, x = CASES["MLP"].make(), CASES["MLP"].x()
    gradients = by_loop(copy.deepcopy(model).double(), x.double(), called)
    expected = sum(squares(gradients).values()).sqrt()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with perex.attach(model, grad_scaler=scaler) as px:
        with torch.autocast("cuda", torch.float16):
            out = model(x)
        scaler.scale(losses_of(out, torch.arange(B)).mean()).backward()
        near(px.norms(), expected, 2e-2, "scaled")
        scaler.step(optimizer)
        scaler.update()


def test_statistics():
    model, x = CASES["GPT-2"].make(), CASES["GPT-2"].x()
    gradients = by_loop(copy.deepcopy(model).double(), x, called)
    flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    along = flat @ torch.cat([direction[name].flatten() for name in gradients]).double()
    dots, gram, noise, sketch = perex.Dots(direction), perex.Gram(), perex.NoiseScale(), perex.Projections(4096)
    with perex.attach(model, dots, gram, noise, sketch) as px:
        px.backward(losses_of(model(x), torch.arange(B)))
        noise.update(px)
        near(px.read(dots), along, 1e-4, "dots")
        near(px.read(gram), flat @ flat.T, 1e-4, "Gram")
        near(px.read(sketch).double().square().sum(1), flat.square().sum(1), 0.2, "projections")
        assert float(noise.value()) > 0


def test_verify_and_score():
    model, x = CASES["ResNet"].make(), CASES["ResNet"].x()
    y = torch.randint(2, (B,))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    whole = Logits()
    str(perex.verify(whole, (x, y), nn.CrossEntropyLoss()))
    scores = perex.score(whole, (x.cpu(), y.cpu()), nn.CrossEntropyLoss(), batch_size=2, progress=False)
    losses = F.cross_entropy(whole.double()(x.double()), y, reduction="none")
    parameters = list(whole.parameters())
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]).norm()
        for loss in losses
    ]
    near(torch.as_tensor(scores.norms, device="cuda").double(), torch.stack(norms), 1e-4, "scores")


def test_nothing_waits_for_the_device():
    """After the first backwards, which are checked, a step asks the device for nothing until norms are read."""
    for name in ("GPT-2", "ViT", "conv2d", "embedding, padding"):
        model, x = CASES[name].make(), CASES[name].x()
        with perex.attach(model, param_grads=False) as px:
            for _ in range(3):
                px.backward(losses_of(model(x), torch.arange(B)))
            losses = losses_of(model(x), torch.arange(B))
            torch.cuda.set_sync_debug_mode("error" if name != "GPT-2" else "warn")
            try:
                with warnings.catch_warnings(record=True) as waited:
                    warnings.simplefilter("always")
                    px.backward(losses)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(waited) <= 1, [str(each.message) for each in waited]  # one for a tied embedding


TIED = ("tied", "GPT-2")
"""Whether the terms of their embedding's norm cancel is asked once."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in TIED])
def test_later_steps_do_not_wait_for_the_device(name):
    model, x, examples = CASES[name].make(), CASES[name].x(), torch.arange(B)
    with perex.attach(model, param_grads=False) as px:
        for again in range(4):
            torch.cuda.set_sync_debug_mode("error" if again == 3 else "default")
            try:
                px.backward(losses_of(model(x), examples))
                px.norms()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def recorded(step: Callable[[], Any], warm: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A step as a CUDA graph, and what it returned."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    return graph, found


@pytest.mark.parametrize("param_grads", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs(name, param_grads):
    """A recorded step gives the norms of whatever is put into its input."""
    model, x, examples = CASES[name].make(), CASES[name].x(), torch.arange(B)
    others = [CASES[name].x() for _ in range(2)]
    with perex.attach(model, param_grads=param_grads) as px:

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            px.backward(losses_of(model(x), examples))
            return px.norms()

        graph, norms = recorded(step)
        grads = [parameter.grad for parameter in model.parameters()]
        for other in others:
            x.copy_(other)
            graph.replay()
            found = norms.double().clone()
            replayed = [None if grad is None else grad.clone() for grad in grads]
            near(found, step().double(), 1e-5, "norms")
            for one, parameter in zip(replayed, model.parameters(), strict=True):
                assert (one is None) == (parameter.grad is None)
                if one is not None:
                    near(one, parameter.grad.double(), 1e-4, "grad", 1e-3)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_cuda_graph_is_not_recorded_before_the_checks():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(B, 4)
    with perex.attach(model, param_grads=False) as px, pytest.raises(perex.NotReadyError, match="before capturing"):
        recorded(lambda: px.backward(model(x).sum(1)), warm=0)


@pytest.mark.parametrize("name", ["MLP", "conv2d", "GPT-2", "embedding", "ViT"])
def test_scores_from_a_cuda_graph(name):
    """Batches of one shape are replayed; the last, smaller one runs as usual."""
    model, make = CASES[name].make(), CASES[name].x
    x = torch.cat([make() for _ in range(7)])[:-2]

    def step(model: nn.Module, batch: Any) -> Tensor:
        return losses_of(model(batch[0]), batch[1])

    pool = x, torch.arange(len(x))
    options = {"step": step, "batch_size": B, "progress": False, "by": "parameter"}
    expected = perex.score(model, pool, **options)
    found = perex.score(model, pool, **options, cuda_graphs=True)
    near(found.norms, expected.norms.double(), 1e-5, "norms")
    near(found.losses, expected.losses.double(), 1e-5, "losses")
    for part in expected.parts:
        near(found.parts[part], expected.parts[part].double(), 1e-4, part, 1e-2)


BRANCHING = """
import torch, perex
from torch import nn

class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x if bool((x.detach() > 100).any()) else 2 * x)

torch.manual_seed(0)
with torch.device("cuda"):
    model, x = Branching(4, 2), torch.randn(40, 4)
try:
    perex.score(model, (x, x[:, :2]), nn.MSELoss(), batch_size=4, progress=False, cuda_graphs=True)
except perex.PerexError as error:
    print("refused:", error)
"""


def test_a_branch_is_not_recorded():
    """In a process of its own: torch does not get over a recording that failed."""
    command = [sys.executable, "-c", BRANCHING]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert printed.startswith("refused: ") and "graph" in printed
