"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from covering import mark_all_but_each, mark_all_but_pairs
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=150)  # of make test-all
settings.register_profile("brief", deadline=None, derandomize=True, max_examples=8)  # of what runs in full elsewhere
settings.load_profile("default")

_LEFT_ALONE = pytest.StashKey[int]()  # how many modules the garbage collector does not look at


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--each-once", action="store_true", help="run a test with each value of its parameters once")


def pytest_configure() -> None:
    gc.disable()  # until the first test: modules are imported, and they are not garbage


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The garbage collector leaves alone what has been imported, now and then: to look through it took a sixth of the
    time of all tests."""
    if len(sys.modules) > item.config.stash.get(_LEFT_ALONE, 0) + 100:
        item.config.stash[_LEFT_ALONE] = len(sys.modules)
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_all_but_pairs(items)
    if config.getoption("--each-once"):
        mark_all_but_each(items)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that whatever is read before it is written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # trainers leave it off
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
