"""What all tests share: fixed seeds, and property tests that draw the same examples every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("offline", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("offline")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers that no other test shares."""
    return torch.Generator().manual_seed(20240229)
