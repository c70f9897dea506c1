"""The pretended device of the tests refuses what CUDA refuses, and takes what CUDA takes."""

import copy

import numpy as np
import pytest
import torch
from pretended_device import DEVICE, pretended_device
from torch import nn

APART = "Expected all tensors to be on the same device"
INDICES = "indices should be either on cpu or on the same device as the indexed tensor"
CPU = torch.ones(3, 4)
ROWS = torch.tensor([0, 2])


@pytest.fixture(autouse=True)
def device():
    with pretended_device() as there:
        yield there


@pytest.fixture
def x(device):
    return torch.arange(12.0, device=device).view(3, 4)


REFUSED = {
    "+": lambda x: x + CPU,
    "+, the other way": lambda x: CPU + x,
    "a number of the device": lambda x: CPU * x.sum(),
    "+=": lambda x: CPU.clone().add_(x.sum()),
    "+= a number": lambda x: torch.ones(()).add_(x.sum()),
    "@": lambda x: x @ CPU.T,
    "cat": lambda x: torch.cat([x, CPU]),
    "stack": lambda x: torch.stack([x.sum(), CPU.sum()]),
    "where": lambda x: torch.where(CPU > 0, x, x),
    "masked_fill": lambda x: x.masked_fill(CPU > 0, 0.0),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "take": lambda x: x.take(ROWS),
    "index_select": lambda x: x.index_select(0, ROWS),
    "embedding": lambda x: nn.functional.embedding(ROWS, x),
    "linear": lambda x: nn.functional.linear(x, CPU),
    "searchsorted": lambda x: torch.searchsorted(x, CPU),
    "equal": lambda x: torch.equal(x, CPU),
    "out": lambda x: torch.add(x, x, out=CPU.clone()),
    "x[rows] = values": lambda x: x.__setitem__(ROWS, CPU[:2]),
    "a weight of the CPU": lambda x: nn.Linear(4, 2)(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_of_two_devices_do_not_mix(name, x):
    with pytest.raises(RuntimeError, match=APART):
        REFUSED[name](x)


def test_a_cpu_number_mixes_with_the_device(x):
    number = torch.tensor(2.0)
    for mixed in (x + number, number * x, x.clamp(min=number), torch.where(x > 1, x, number)):
        assert mixed.device == DEVICE
    assert (x + number).tolist() == (x.cpu() + 2).tolist()


def test_indices_lie_on_the_cpu_or_on_the_device_of_what_they_index(x):
    mask = torch.tensor([True, False, True])
    for rows in (ROWS, ROWS.to(DEVICE), mask, mask.to(DEVICE)):
        assert x[rows].device == DEVICE
        assert x[rows].tolist() == x.cpu()[ROWS].tolist()
    for rows in (ROWS.to(DEVICE), mask.to(DEVICE), (slice(None), ROWS.to(DEVICE))):
        with pytest.raises(RuntimeError, match=INDICES):
            CPU[rows]
        with pytest.raises(RuntimeError, match=INDICES):
            CPU.clone()[rows] = 0.0
    assert CPU[ROWS.to(DEVICE)[1]].device.type == "cpu"  # one number is read off the device
    assert [7, 8, 9][ROWS.to(DEVICE)[1]] == 9


def test_a_slice_copies_from_everywhere(x):
    x[:2] = CPU[:2]
    x[0, 0] = torch.tensor(5.0)
    x[ROWS] = torch.tensor(7.0)
    assert x.device == DEVICE
    assert x.tolist() == [[7.0] * 4, [1.0] * 4, [7.0] * 4]


def test_a_shape_is_asked_for_on_every_device(x):
    assert CPU[0].expand_as(x).device.type == "cpu"
    assert x[0].expand_as(CPU).device == x.view_as(CPU).device == DEVICE


def test_moves(x):
    assert x.to(DEVICE) is x
    assert x.to("cuda", torch.float64).device == DEVICE
    assert CPU.to(x).device == CPU.cuda().device == DEVICE
    for moved in (x.cpu(), x.to("cpu"), x.to(CPU), torch.tensor(x.tolist())):
        assert moved.device.type == "cpu"
        assert (moved + CPU).tolist() == (np.asarray(moved) + 1).tolist()
    assert torch.tensor([x[0, 1], x[0, 2]]).device.type == "cpu"  # numbers are read off
    assert torch.as_tensor(np.ones(3), device=DEVICE).device == DEVICE
    assert type(CPU) is torch.Tensor


@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.Tensor.numpy, lambda x: np.asarray([x.sum(), x.sum()])],
)
def test_numpy_cannot_look(convert, x):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        convert(x)


def test_numbers_can_be_read(x):
    assert (float(x.sum()), int(x[0, 1]), x[0, 2].item(), f"{x[0, 3]:.1f}") == (66, 1, 2, "3.0")
    assert [row.device for row in x] == [DEVICE] * 3
    assert "cuda:0" in repr(x)


DRAWS = {
    "rand": lambda device, generator: torch.rand(3, device=device, generator=generator),
    "randn": lambda device, generator: torch.randn(3, device=device, generator=generator),
    "randint": lambda device, generator: torch.randint(3, (2,), device=device, generator=generator),
    "randperm": lambda device, generator: torch.randperm(3, device=device, generator=generator),
    "multinomial": lambda device, generator: torch.multinomial(
        torch.ones(3, device=device), 1, generator=generator
    ),
    "exponential_": lambda device, generator: torch.ones(3, device=device).exponential_(
        generator=generator
    ),
    "binomial": lambda device, generator: torch.binomial(
        torch.ones(3, device=device), torch.ones(3, device=device), generator=generator
    ),
    "init": lambda device, generator: nn.init.normal_(
        torch.ones(3, device=device), generator=generator
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_draws_on_its_own_device(name):
    there, here = torch.Generator("cuda").manual_seed(1), torch.Generator().manual_seed(1)
    assert (there.device, here.device.type) == (DEVICE, "cpu")
    assert DRAWS[name](DEVICE, there).device == DEVICE
    assert DRAWS[name]("cpu", here).device.type == "cpu"
    with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
        DRAWS[name](DEVICE, here)
    with pytest.raises(RuntimeError, match="'cpu' device type for generator but found 'cuda'"):
        DRAWS[name]("cpu", there)
    assert all(isinstance(one, torch.Generator) for one in (there, here))
    assert not isinstance(0, torch.Generator)


def test_a_module_moves_learns_and_is_copied(x):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(DEVICE)
    assert {weight.device for weight in module.parameters()} == {DEVICE}
    assert all(isinstance(weight, nn.Parameter) for weight in module.parameters())
    weight = module[0].weight
    assert module.to(DEVICE)[0].weight is weight
    before, other = weight.detach().clone(), copy.deepcopy(module)
    adam = torch.optim.Adam(module.parameters(), fused=True)
    (module(x) ** 2).sum().backward()
    assert weight.grad.device == DEVICE
    assert nn.utils.clip_grad_norm_(module.parameters(), 1.0).device == DEVICE
    adam.step()
    assert (weight != before).all()
    assert torch.equal(other[0].weight, before)
    other.load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).state_dict())
    assert {weight.device for weight in other.parameters()} == {DEVICE}


def test_gradients_lie_beside_what_they_are_of(x):
    here, there = CPU.clone().requires_grad_(), x.requires_grad_()
    of_here, of_there = torch.autograd.grad((here.to(DEVICE) * there).sum(), [here, there])
    assert (of_here.device.type, of_there.device) == ("cpu", DEVICE)
    assert torch.equal(of_here, x.detach().cpu())


def test_another_device_may_be_named():
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"
