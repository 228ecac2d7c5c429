"""Private steps of two processes, each with half of the batch: they are the step of one process with all of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from perex.privacy import PrivacyEngine

B, C = 8, 0.5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(B, 4, dtype=torch.float64, generator=generator), torch.arange(B) % 3


def trained(model: nn.Module, rank: int, noise: float = 0.0, steps: int = 2, memory: Any = "high") -> None:
    """Two steps, of which the second is from where the first led; on this rank's half of the batch."""
    x, y = batch()
    own = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    loader = DataLoader(TensorDataset(x, y), batch_size=B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp", memory=memory)
        model, optimizer, criterion, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=loader,
            criterion=nn.CrossEntropyLoss(), noise_multiplier=noise, max_grad_norm=C, poisson_sampling=False,
        )  # fmt: skip
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x[own]), y[own]).backward()
            optimizer.step()


def alone(steps: int = 2) -> nn.Module:
    """The same by one process."""
    model, (x, y) = net(), batch()
    for _ in range(steps):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for b in range(B):
            loss = nn.functional.cross_entropy(model(x[b : b + 1]), y[b : b + 1])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            norm = float(torch.cat([g.flatten() for g in grads]).norm())
            total = [t + g * min(1.0, C / norm) for t, g in zip(total, grads, strict=True)]
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), total, strict=True):
                parameter -= gradient / B
    return model


def same(model: nn.Module) -> None:
    for found, expected in zip(model.parameters(), alone().parameters(), strict=True):
        whole: Any = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(whole.detach(), expected.detach())


def ddp_case(rank: int, kind: str, memory: str) -> None:
    model = net()
    wrapped = DistributedDataParallel(model) if kind == "torch" else DifferentiallyPrivateDistributedDataParallel(model)
    trained(wrapped, rank, memory=memory)
    same(model)


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("kind", ["torch", "opacus"])
def test_ddp(ranks, kind, memory):
    ranks(ddp_case, kind, memory)


def sharded_case(rank: int, blocks: bool, memory: str) -> None:
    model = net()
    if blocks:
        for layer in (model[0], model[2]):
            fully_shard(layer)
    fully_shard(model)
    trained(model, rank, memory=memory)
    same(model)


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("blocks", [False, True])
def test_fsdp(ranks, blocks, memory):
    """Seven rows on two processes: the shards are of different sizes."""
    ranks(sharded_case, blocks, memory)


def noisy_case(rank: int) -> list[Tensor]:
    """What noise leads to is the same on all ranks."""
    torch.manual_seed(rank)
    model = net()
    trained(DifferentiallyPrivateDistributedDataParallel(model), rank, noise=1.0, steps=1)
    found = [p.detach().clone() for p in model.parameters()]
    for parameter in found:
        other = parameter.clone()
        dist.broadcast(other, 0)
        assert torch.equal(parameter, other)
    return found


def test_noise_is_added_once(ranks):
    found, _ = ranks(noisy_case)
    exact = alone(steps=1)
    noise = torch.cat([((a - b.detach()) * B).flatten() for a, b in zip(found, exact.parameters(), strict=True)])
    assert 0.7 * C < float(noise.std()) < 1.3 * C  # 59 numbers of standard deviation C


def lora_models() -> tuple[nn.Module, nn.Module]:
    with warnings.catch_warnings():  # peft's import uses a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertForSequenceClassification(BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **sizes))
    config = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(copy.deepcopy(base), config).double().eval(), base


def test_only_adapters_are_private():
    """LoRA by peft: the frozen weights have no part in the norms, and stay as they are."""
    model, _ = lora_models()
    x, y = torch.randint(11, (B, 6)), torch.arange(B) % 3
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora" in name for name in adapters)
    expected = {name: torch.zeros_like(p) for name, p in adapters.items()}
    for b in range(B):
        loss = nn.functional.cross_entropy(model(input_ids=x[b : b + 1]).logits, y[b : b + 1])
        grads = torch.autograd.grad(loss, list(adapters.values()))
        weight = min(1.0, C / float(torch.cat([g.flatten() for g in grads]).norm()))
        expected = {name: e + weight * g for (name, e), g in zip(expected.items(), grads, strict=True)}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, criterion, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(adapters.values(), lr=1.0), criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=B), noise_multiplier=0.0, max_grad_norm=C,
            poisson_sampling=False,
        )  # fmt: skip
    criterion(model(input_ids=x).logits, y).backward()
    for name, parameter in adapters.items():
        torch.testing.assert_close(parameter.grad, expected[name])
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
