"""Private training: what one example can do to a step, and that a step is the clipped loop's; noise is off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from oracle import no_trace, scramble
from test_functions import Linear, Sign
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import perex
from perex.privacy import Controller, PrivacyEngine, PrivacyError

B, C = 5, 0.7

Make = Callable[[], nn.Module]


class Of(nn.Module):
    """A model whose forward is a function of its layers."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def ids(*shape: int, high: int = 7) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def tied(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.mix(m.emb(x))).mean(1), m.emb.weight)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    return m.b(F.relu_(h))


def attended(m: Any, x: Tensor) -> Tensor:
    return m.head(m.attention(x, x, x, need_weights=False)[0].mean(1))


CE = nn.CrossEntropyLoss()
CASES: dict[str, tuple[Make, Tensor, Callable[..., Tensor], Tensor]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), real(B, 4), CE,
              ids(B, high=3)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3),
        ), real(B, 2, 6, 6), nn.CrossEntropyLoss(label_smoothing=0.1), ids(B, high=3)),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3).eval(), nn.Flatten(), nn.Linear(12, 2)),
        real(B, 2, 6), CE, ids(B, high=2)),
    "tied": (lambda: Of(tied, emb=nn.Embedding(7, 4), mix=nn.Linear(4, 4)), ids(B, 5), CE, ids(B)),
    "reused": (lambda: Of(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
               real(B, 4), CE, ids(B, high=3)),
    "embedding bag with repeated ids": (
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 3)), ids(B, 9), CE, ids(B, high=3)),
    "padding index": (
        lambda: Of(lambda m, x: m.head(m.emb(x).mean(1)), emb=nn.Embedding(7, 4, padding_idx=0), head=nn.Linear(4, 3)),
        ids(B, 5), CE, ids(B, high=3)),
    "keywords": (lambda: Of(lambda m, x: m.b(input=torch.tanh(m.a(input=x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
                 real(B, 4), CE, ids(B, high=3)),
    "LSTM": (lambda: Of(lambda m, x: m.head(m.lstm(x)[0][:, -1]), head=nn.Linear(3, 2),
                       lstm=nn.LSTM(4, 3, batch_first=True)),
             real(B, 5, 4), CE, ids(B, high=2)),
    "attention": (lambda: Of(attended, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 2)),
                  real(B, 5, 4), CE, ids(B, high=2)),
    "autograd functions": (
        lambda: Of(lambda m, x: Linear.apply(m.a(x).tanh(), Sign.apply(m.b.weight, 1.0), m.b.bias), a=nn.Linear(4, 4),
                   b=nn.Linear(4, 3)), real(B, 4), CE, ids(B, high=3)),
    "in place": (lambda: Of(in_place, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), real(B, 4), CE, ids(B, high=3)),
    "(B, 1) with MSE": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), real(B, 4),
                        nn.MSELoss(), real(B, 1)),
    "(B, 1) with BCE": (lambda: nn.Linear(4, 1), real(B, 4), nn.BCEWithLogitsLoss(), ids(B, 1, high=2).double()),
    "many numbers with MSE": (lambda: nn.Conv1d(2, 3, 3), real(B, 2, 6), nn.MSELoss(), real(B, 3, 4)),
    "no reduction": (lambda: nn.Linear(4, 3), real(B, 4), lambda out, y: (out - y).abs().pow(1.5).sum(), real(B, 3)),
    "weights of classes": (lambda: nn.Linear(4, 3), real(B, 4),
                           nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)), ids(B, high=3)),
}  # fmt: skip


def private(model: nn.Module, criterion: Any, reduction: str = "mean", bound: Any = C, **options: Any) -> Any:
    """Model, optimizer and criterion without noise, steps of length one; and the loader, which nobody needs."""
    data = DataLoader(TensorDataset(real(20, 2)), batch_size=B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp", **options.pop("engine", {}))
    trained = [p for p in model.parameters() if p.requires_grad]
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        criterion=criterion,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        loss_reduction=reduction,
        poisson_sampling=False,
        **options,
    )


def clipped_sum(make: Make, criterion: Any, x: Tensor, y: Tensor, bound: float = C) -> Tensor:
    """The loop: each example on its own, clipped, added up; all parameters in one vector."""
    total: Any = 0
    for b in range(len(x)):
        model = make()
        criterion(model(x[b : b + 1]), y[b : b + 1]).backward()
        vector = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in model.parameters()
                if p.requires_grad
            ]
        )
        total = total + vector * min(1.0, bound / max(float(vector.norm()), 1e-300))
    return total


def sum_by_perex(model: nn.Module, optimizer: Any) -> Tensor:
    """The clipped sum of the last step, in which there was no noise."""
    many = optimizer.expected_batch_size if optimizer.loss_reduction == "mean" else 1
    return torch.cat([p.grad.flatten() * many for p in model.parameters() if p.requires_grad])


def steps(make: Make, criterion: Any, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    engine = {"memory": "low" if reduction == "sum" else "high"}
    model, optimizer, loss_of, _ = private(make(), criterion, reduction, engine=engine)
    before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    loss_of(model(x), y).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    found = sum_by_perex(model, optimizer)
    torch.testing.assert_close(before - after, found / (B if reduction == "mean" else 1))  # what Opacus makes of it
    return found


def maker(case: str) -> tuple[Make, Tensor, Any, Tensor]:
    make, x, criterion, y = CASES[case]
    model = scramble(make().double(), 1)
    return lambda: copy.deepcopy(model), x, criterion, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_clipped_loop_and_one_example_moves_it_little(case, reduction):
    make, x, criterion, y = maker(case)
    whole = steps(make, criterion, x, y, reduction)
    torch.testing.assert_close(whole, clipped_sum(make, criterion, x, y))
    moves = []
    for b in range(B):
        rest = torch.tensor([k for k in range(B) if k != b])
        moves.append(float((whole - steps(make, criterion, x[rest], y[rest], reduction)).norm()))
    assert max(moves) <= C * (1 + 1e-9), moves
    assert max(moves) > 0.1 * C, "the test of the test: somebody is clipped, or near it"


# Transformers


def small(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    import transformers as t

    if name == "GPT-2":
        config = t.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        return t.GPT2LMHeadModel(config), {"input_ids": ids(B, 6, high=11)}, ids(B, 6, high=11)
    if name == "BERT":
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = t.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **sizes)
        return t.BertForSequenceClassification(config), {"input_ids": ids(B, 6, high=11)}, ids(B, high=3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = t.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    return t.ViTForImageClassification(config), {"pixel_values": real(B, 3, 8, 8)}, ids(B, high=3)


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT"])
def test_transformers_as_they_come(name):
    torch.manual_seed(0)
    model, inputs, y = small(name)
    model = model.double().eval()
    tokens = name == "GPT-2"
    y = y.masked_fill(ids(*y.shape, high=3) == 0, -100) if tokens else y
    if tokens:
        y[:, -1] = 1

    def logits_and_targets(model: nn.Module, rows: Any) -> tuple[Tensor, Tensor]:
        out, own = model(**{name: x[rows] for name, x in inputs.items()}).logits, y[rows]
        return (out.view(-1, out.shape[-1]), own.reshape(-1)) if tokens else (out, own)

    clipped = []
    for b in range(B):
        alone = copy.deepcopy(model)
        F.cross_entropy(*logits_and_targets(alone, slice(b, b + 1))).backward()
        vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in alone.parameters()])
        clipped.append(vector * min(1.0, C / float(vector.norm())))
    kind = type(model)
    with no_trace(model, versions=False):
        private_model, optimizer, criterion, _ = private(model, nn.CrossEntropyLoss())
        assert private_model is model and type(private_model) is kind
        found = []
        for rest in (range(B), *([k for k in range(B) if k != b] for b in range(B))):
            optimizer.zero_grad()
            criterion(*logits_and_targets(model, torch.tensor(rest))).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        detach(model)
    whole, *without = found
    torch.testing.assert_close(whole, sum(clipped))
    moves = [float((whole - rest).norm()) for rest in without]
    assert 0.1 * C < max(moves) <= C * (1 + 1e-9), moves


def detach(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PrivacyEngine().detach(model)


# Steps


def simple() -> tuple[nn.Module, Tensor, Any, Tensor]:
    make, x, criterion, y = maker("plain")
    return make(), x, criterion, y


def test_two_backwards_before_one_step_add_up():
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    model, optimizer, loss_of, _ = private(model, criterion)
    for rows in (slice(0, 2), slice(2, B)):
        loss_of(model(x[rows]), y[rows]).backward()
    optimizer.step()
    torch.testing.assert_close(sum_by_perex(model, optimizer), expected)


def test_physical_batches_smaller_than_logical_ones():
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    model, optimizer, loss_of, _ = private(model, criterion)
    loader = DataLoader(TensorDataset(x, y), batch_size=B)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as physical:
        for part, targets in physical:
            assert len(part) <= 2
            loss_of(model(part), targets).backward()  # nobody clears gradients in between
            optimizer.step()
    torch.testing.assert_close(sum_by_perex(model, optimizer), expected)


def test_empty_batches():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    before = copy.deepcopy(model.state_dict())
    loss = loss_of(model(x[:0]), y[:0])
    loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    loss_of(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_whole_run_with_poisson_sampling_and_noise():
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), TensorDataset(torch.randn(60, 5), torch.randint(3, (60,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, criterion, loader = engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, 3), target_epsilon=3.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0,
        )  # fmt: skip
    sizes = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
    assert 0 in sizes and max(sizes) > 3
    assert 2.5 < engine.get_epsilon(1e-3) <= 3.0


def test_frozen_and_unfrozen_afterwards():
    model, x, criterion, y = simple()
    model[2].requires_grad_(False)
    data = DataLoader(TensorDataset(x, y), batch_size=B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, loss_of, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), criterion=criterion, data_loader=data,
            noise_multiplier=0.0, max_grad_norm=C, poisson_sampling=False,
        )  # fmt: skip
    for frozen, trained in ((2, 0), (0, 2)):
        model[frozen].requires_grad_(False)
        model[trained].requires_grad_(True)
        expected = clipped_sum(lambda: plain_copy(model), criterion, x, y)
        before = model[frozen].weight.clone()
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(sum_by_perex(model, optimizer), expected)
        assert torch.equal(model[frozen].weight, before)


def plain_copy(model: nn.Module) -> nn.Module:
    """A network of the same values, which nobody watches."""
    fresh = maker("plain")[0]()
    fresh.load_state_dict(model.state_dict())
    for one, other in zip(fresh.parameters(), model.parameters(), strict=True):
        one.requires_grad_(other.requires_grad)
    return fresh


def test_frozen_between_backward_and_step():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    before = model[0].weight.clone()
    loss_of(model(x), y).backward()
    model[0].requires_grad_(False)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_module_that_is_skipped_in_one_step():
    model = Of(lambda m, x, skip=False: m.b(x if skip else torch.tanh(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model, x, y = scramble(model.double()), real(B, 4), ids(B, high=3)
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss())
    for skip in (False, True, False):
        before = model.a.weight.clone()
        optimizer.zero_grad()
        loss_of(model(x, skip=skip), y).backward()
        optimizer.step()
        assert torch.equal(model.a.weight, before) == skip


def test_per_layer_clipping():
    """Each parameter keeps its own bound when another is frozen."""
    model, x, criterion, y = simple()
    bounds = [0.1, 0.2, 0.3, 0.4]
    model, optimizer, loss_of, _ = private(model, criterion, bound=bounds, clipping="per_layer")
    assert optimizer.max_grad_norm == pytest.approx(0.3**0.5)
    for frozen in (None, 0, 2):
        parameters = list(model.parameters())
        if frozen is not None:
            parameters[frozen].requires_grad_(False)
        trained = [k for k, parameter in enumerate(parameters) if parameter.requires_grad]
        wanted = [parameters[k] for k in trained]
        copied = copy.deepcopy(model)
        of_copy = [list(copied.parameters())[k] for k in trained]
        rows = [torch.autograd.grad(criterion(copied(x[b : b + 1]), y[b : b + 1]), of_copy) for b in range(B)]
        loss_of(model(x), y).backward()
        for k, parameter, grads in zip(trained, wanted, zip(*rows, strict=True), strict=True):
            expected = sum(grad * min(1.0, bounds[k] / float(grad.norm())) for grad in grads)
            torch.testing.assert_close(parameter.grad, expected)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.max_grad_norms.pop()
    with pytest.raises(PrivacyError, match="one for each"):
        loss_of(model(x), y).backward()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_scaler(scale):
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model, optimizer, loss_of, _ = private(model, criterion, engine={"grad_scaler": scaler})
    scaler.scale(loss_of(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(sum_by_perex(model, optimizer), expected)


def test_autocast():
    make, x, criterion, y = maker("plain")
    model, optimizer, loss_of, _ = private(make().float(), criterion)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(x.float()), y)
    loss.backward()
    optimizer.step()
    found, expected = sum_by_perex(model, optimizer), clipped_sum(make, criterion, x, y)
    assert found.dtype == torch.float32 and float((found - expected).norm()) < 0.05 * float(expected.norm())


# Losses


def test_a_loss_is_a_number_and_a_sum_of_losses_is_a_loss():
    model, x, criterion, y = simple()
    plain = criterion(model(x), y)
    rows = [
        torch.autograd.grad(3 * criterion(model(x[b : b + 1]), y[b : b + 1]), list(model.parameters()))
        for b in range(B)
    ]
    model, optimizer, loss_of, _ = private(model, criterion, bound=1e9)
    out = model(x)
    loss = loss_of(out, y)
    assert isinstance(loss, Tensor) and loss.item() == pytest.approx(plain.item()) and not loss.detach().requires_grad
    assert f"{loss:.4f}" == f"{plain.item():.4f}" and str(plain.item())[:5] in repr(loss)
    total = 1.0 + (2 * loss + loss_of(out, y) * 4 - loss) / 2 + loss / 2 - 2
    assert total.item() == pytest.approx(3 * plain.item() - 1)
    total.backward()
    for k, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(parameter.grad, sum(row[k] for row in rows))


def test_token_losses_with_positions_to_ignore():
    """Flattened by the user, and one example has fewer tokens than another: each is a mean of its own."""
    model = scramble(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double())
    x, y, criterion = ids(B, 6), ids(B, 6), nn.CrossEntropyLoss(ignore_index=2)
    y[0, 1:] = 2
    plain, expected = copy.deepcopy(model), 0
    for b in range(B):
        loss = criterion(plain(x[b]), y[b])
        vector = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
        expected = expected + vector * min(1.0, C / float(vector.norm()))
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(x).view(-1, 7), y.view(-1)).backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


# What is refused


def test_steps_without_a_private_backward():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    with pytest.raises(PrivacyError, match="no private backward"):
        optimizer.step()
    criterion(model(x), y).backward()  # the plain criterion
    with pytest.raises(PrivacyError, match="no private backward"):
        optimizer.step()
    loss_of(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="no private backward"):
        optimizer.step()


@pytest.mark.parametrize("where", ["before", "between", "after"])
@pytest.mark.parametrize("how", ["penalty", "clip"])
def test_gradients_from_elsewhere(where, how):
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)

    def meddle() -> None:
        if how == "penalty":
            (model[0].weight ** 2).sum().backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad.mul_(0.5)

    def train() -> None:
        if where == "before":
            meddle()
        loss_of(model(x), y).backward()
        if where == "between":
            meddle()
            loss_of(model(x), y).backward()
        if where == "after":
            meddle()
        optimizer.step()

    with pytest.raises(PrivacyError, match="no private backward made"):
        train()


def test_gradients_that_were_not_cleared():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(x), y).backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="zero_grad"):
        loss_of(model(x), y).backward()
    model.zero_grad()  # which does as well: the optimizer has kept no sum
    expected = clipped_sum(lambda: plain_copy(model), criterion, x, y)
    loss_of(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(sum_by_perex(model, optimizer), expected)


@pytest.mark.parametrize("affine", ["trained", "frozen", "absent"])
def test_statistics_of_a_batch(affine):
    from opacus.validators.errors import UnsupportedModuleError

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=affine != "absent"), nn.Linear(3, 2)).double()
    if affine == "frozen":
        model[1].requires_grad_(False)
    for error in (perex.ExamplesMixError, UnsupportedModuleError):
        with pytest.raises(error, match="Module '1' is a BatchNorm1d"):
            private(model, nn.CrossEntropyLoss())
    model[1].eval()
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss())
    model[1].train()  # behind our back
    with pytest.raises(perex.ExamplesMixError, match="Module '1'"):
        model(real(B, 4))
    tracked = nn.Sequential(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, track_running_stats=True)).double()
    with pytest.raises(UnsupportedModuleError, match="keeps running statistics"):
        private(tracked, nn.MSELoss())


def test_examples_that_mix():
    class Contrast(nn.Module):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return (out - out.mean(0)).square().mean()

    mixing = Of(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(4, 3)).double()
    model, optimizer, loss_of, _ = private(mixing, nn.CrossEntropyLoss())
    with pytest.raises(perex.PerexError):
        loss_of(model(real(B, 4)), ids(B, high=3)).backward()
    # a criterion that compares examples has nothing to compare in a batch of one
    model, optimizer, loss_of, _ = private(nn.Linear(4, 3).double(), Contrast())
    loss_of(model(real(B, 4)), real(B, 3)).backward()
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss, out: loss + out.sum(), "requires grad"),
        (lambda loss, out: loss * torch.ones(3), "several numbers"),
        (lambda loss, out: loss * loss, "product of two losses"),
        (lambda loss, out: loss.backward(retain_graph=True), "takes no arguments"),
    ],
)
def test_losses_that_are_not_private(change, message):
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    out = model(x)
    with pytest.raises(PrivacyError, match=message):
        change(loss_of(out, y), out)


def test_two_batches_are_not_clipped_as_one():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    first = loss_of(model(x), y)
    with pytest.raises(PrivacyError, match="losses of two forwards"):
        first + loss_of(model(x + 1), y)


def test_arguments():
    model, x, criterion, y = simple()
    with pytest.raises(PrivacyError, match="clipping='adaptive'"):
        private(model, criterion, clipping="adaptive")
    with pytest.raises(perex.PerexError, match="a list of one for each of the 4 parameters"):
        private(model, criterion, bound=[1.0], clipping="per_layer")
    model, optimizer, loss_of, _ = private(model, criterion)
    with pytest.raises(perex.LossError, match="do not depend on the private model's outputs"):
        loss_of(model(x).detach(), y)


# Opacus's parts, put together by hand


def test_ghost_clipping_by_hand():
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    with no_trace(model, versions=False):
        controller = Controller(model, max_grad_norm=C)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=B
        )
        loss_of = DPLossFastGradientClipping(controller, optimizer, nn.CrossEntropyLoss())
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)
        controller.cleanup()


def test_gradient_samples_by_hand():
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    controller = Controller(model, grad_samples=True)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=B
    )
    for rows in (slice(0, 2), slice(2, B)):  # accumulated
        criterion(model(x[rows]), y[rows]).backward()
    optimizer.step()
    found = torch.cat([p.summed_grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # Opacus adds 1e-6 to norms
    controller.cleanup()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_the_criterion_is_the_plain_one_where_nothing_is_differentiated():
    """As in a validation, before and between steps, on batches of any size."""
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    model, optimizer, loss_of, _ = private(model, criterion)
    for count in (7, 2):
        x, y = real(count, 4), ids(count, high=3)
        with torch.no_grad():
            assert torch.equal(loss_of(model(x), y), criterion(model(x), y))
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
