"""What Opacus tests of its own parts, with perex's engine in them: memory manager, accumulation, noise, schedulers."""

import copy
import warnings
from typing import Any

import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from perex.privacy import PrivacyEngine
from perex.privacy.optimizers import PIECE

EXAMPLES, D = 64, 5


def dataset() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(EXAMPLES, D, generator=g), torch.randn(EXAMPLES, 1, generator=g))


def start(batch_size: int = 16, workers: int = 0, seed: int = 0, **options: Any) -> Any:
    """An engine and what it makes of a linear model; batches in order unless asked otherwise."""
    torch.manual_seed(seed)
    model = nn.Linear(D, 1)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        made = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.MSELoss(),
            data_loader=DataLoader(dataset(), batch_size=batch_size, num_workers=workers),
            **options,
        )
    return engine, *made


def train(model: nn.Module, optimizer: Any, criterion: Any, loader: Any) -> Tensor:
    """One epoch; the weight after it."""
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model.weight.detach().clone()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("physical", [4, 8])
@pytest.mark.parametrize("logical", [8, 16, 64])
def test_the_memory_manager_steps_once_for_each_logical_batch(logical, physical, workers):
    _, model, optimizer, criterion, loader = start(logical, workers)
    parts = logical // physical
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as split:
        assert (len(loader), len(split)) == (EXAMPLES // logical, EXAMPLES // physical)
        before = model.weight.detach().clone()
        for number, (x, y) in enumerate(split, 1):
            assert len(x) <= physical
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(model.weight, before) == (number % parts > 0)
            before = model.weight.detach().clone()


@pytest.mark.parametrize("physical", [3, 16, 100])
def test_with_the_memory_manager_as_without(physical):
    _, *whole = start(10)
    torch.manual_seed(1)
    expected = train(*whole)
    engine, model, optimizer, criterion, loader = start(10)
    torch.manual_seed(1)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as split:
        torch.testing.assert_close(train(model, optimizer, criterion, split), expected)
    assert engine.accountant.history[-1][2] == len(loader)  # as many steps as logical batches


def test_the_memory_manager_with_poisson_sampling():
    """Empty batches are batches too, and physical ones cost no privacy."""
    engine, model, optimizer, criterion, loader = start(2, poisson_sampling=True)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as split:
        sizes = []
        for x, y in split:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
    assert set(sizes) == {0, 1}
    assert engine.accountant.history == [(1.0, 1 / len(loader), len(loader))]


def test_accumulated_batches_are_the_gradient_of_all():
    """Without noise and with nothing to clip, the sum of all batches is the gradient of the whole data's sum."""
    engine, model, optimizer, criterion, loader = start(8, noise_multiplier=0.0, max_grad_norm=1e4)
    x, y = dataset().tensors
    plain = copy.deepcopy(model)
    nn.MSELoss(reduction="sum")(plain(x), y).backward()
    for part, targets in loader:
        criterion(model(part), targets).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad / 8)
    assert engine.accountant.history == [(0.0, 8 * 1 / len(loader), 1)]  # a step on all eight


@pytest.mark.parametrize("poisson", [False, True])
def test_the_accountant_hears_of_several_backwards(poisson):
    """An example may be in each of several Poisson batches, and then moves the sum by several bounds."""
    engine, model, optimizer, criterion, loader = start(8, poisson_sampling=poisson)
    x, y = dataset().tensors
    for count in (2, 1):
        optimizer.zero_grad()
        for _ in range(count):
            criterion(model(x[:8]), y[:8]).backward()
        optimizer.step()
    rate = 1 / len(loader)
    assert engine.accountant.history == [(0.5 if poisson else 1.0, 2 * rate, 1), (1.0, rate, 1)]
    assert optimizer.noise_multiplier == 1.0


def test_what_was_dropped_is_no_step():
    engine, model, optimizer, criterion, _ = start(8, poisson_sampling=True)
    x, y = dataset().tensors
    for rows in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()  # the first batch's gradients are gone
        criterion(model(x[rows]), y[rows]).backward()
    optimizer.step()
    assert [step[:2] for step in engine.accountant.history] == [(1.0, 1 / 8)]


def with_seed(seed: int | None, generator: torch.Generator | None = None, noise: float = 1.0) -> Tensor:
    """The weight after an epoch that began with a seed, of torch's generator or of another."""
    _, *made = start(noise_multiplier=noise, noise_generator=generator)
    if seed is not None:
        torch.manual_seed(seed) if generator is None else generator.manual_seed(seed)
    else:
        torch.seed()
    return train(*made)


def test_noise_follows_its_generator():
    assert torch.equal(with_seed(None, noise=0.0), with_seed(None, noise=0.0))
    assert not torch.equal(with_seed(None), with_seed(None))
    assert torch.equal(with_seed(7), with_seed(7))
    generator = torch.Generator()
    assert torch.equal(with_seed(7, generator), with_seed(7, generator))
    generator.manual_seed(8)
    assert not torch.equal(with_seed(7), with_seed(8, generator))


def test_noise_has_its_size():
    """Four thousand parameters without gradients: what remains is noise of deviation sigma C / B."""
    torch.manual_seed(0)
    model, data = nn.Linear(4000, 1, bias=False), TensorDataset(torch.zeros(20, 4000), torch.zeros(20, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, criterion, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), criterion=nn.MSELoss(),
            data_loader=DataLoader(data, 10), noise_multiplier=3.0, max_grad_norm=2.0, poisson_sampling=False,
        )  # fmt: skip
    (x, y), *_ = loader
    criterion(model(x), y).backward()
    optimizer.step()
    assert abs(float(model.weight.grad.std()) / (3.0 * 2.0 / 10) - 1) < 0.05


@pytest.mark.filterwarnings("ignore")  # Opacus's
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_in_pieces_is_that_of_the_whole(dtype):
    """Sums get noise piece by piece, in their own memory, and to the bit what Opacus draws for them at once."""
    found = []
    for noise in (0.0, 2.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2 * PIECE // 3 + 9)).to(dtype)
        model, optimizer, criterion, _ = PrivacyEngine(accountant="rdp").make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(dataset(), 8), noise_multiplier=noise, max_grad_norm=0.5, poisson_sampling=False,
        )  # fmt: skip
        criterion(model(torch.ones(8, 5, dtype=dtype)), torch.arange(8)).backward()
        torch.manual_seed(1)
        optimizer.step()
        found.append([p.grad for p in model.parameters()])
    assert max(p.numel() for p in model.parameters()) > 2 * PIECE, "the test of the test: there are pieces"
    torch.manual_seed(1)
    for sums, noisy in zip(*found, strict=True):
        torch.testing.assert_close(noisy, (sums * 8 + _generate_noise(2.0 * 0.5, sums)) / 8, rtol=0, atol=0)


def test_schedulers_change_noise_and_bound():
    engine, model, optimizer, criterion, loader = start(16)
    noise, bound = ExponentialNoise(optimizer, gamma=0.5), ExponentialGradClip(optimizer, gamma=0.1)
    for x, y in list(loader)[:3]:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        noise.step()
        bound.step()
    assert [step[0] for step in engine.accountant.history] == [1.0, 0.5, 0.25]
    assert optimizer.max_grad_norm == pytest.approx(1e-3)
    optimizer.noise_multiplier = 0.0
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert 0 < float((model.weight.detach() - before).norm()) <= 0.1 * 1e-3 * (1 + 1e-5)  # lr times the bound


def test_checkpoints(tmp_path):
    engine, model, optimizer, criterion, loader = start()
    train(model, optimizer, criterion, loader)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    spent = engine.get_epsilon(1e-3)
    other, again, again_optimizer, criterion, loader = start(seed=3)
    other.load_checkpoint(path=tmp_path / "c.pt", module=again, optimizer=again_optimizer)
    assert torch.equal(again.weight, model.weight)
    assert other.get_epsilon(1e-3) == spent
    train(again, again_optimizer, criterion, loader)
    assert other.get_epsilon(1e-3) > spent


def test_an_optimizer_of_any_kind():
    """What optimizers keep is of private gradients only, so each of them may be used."""
    for kind in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.AdamW, torch.optim.NAdam):
        torch.manual_seed(0)
        model = nn.Linear(D, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = PrivacyEngine(accountant="rdp").make_private(
                module=model, optimizer=kind(model.parameters(), lr=0.1), criterion=nn.MSELoss(),
                data_loader=DataLoader(dataset(), 16), noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip
        before = model.weight.detach().clone()
        assert not torch.equal(train(*made), before)
        assert len(made[1].state) == 2
