"""A plugin: every test runs its Triton kernels in the strict interpreter, and torch.empty returns NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from strict_interpreter import strict_interpreter


@pytest.fixture(autouse=True)
def _interpreted(poisoned_memory: None) -> Iterator[None]:
    with strict_interpreter():
        yield
