"""What every test shares: one thread, and a generator of its own."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--all-chapters", action="store_true", help="tests/test_alone.py: 00 to 15, not three"
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260101)


@pytest.fixture
def random_logps(generator):
    """A maker of random tables of log-probabilities, float64."""

    def make(*shape):
        draws = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return (1.5 * draws).log_softmax(-1)

    return make
