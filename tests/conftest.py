"""Every test starts with no compiled code, and with the same random numbers.

Hypothesis draws the same examples in every run; ``tests.patterns.fuzz`` is for drawing others.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
