"""Vectors of image files that are kept in the run's folder, so that a second search computes none of them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.embedding import Vectors, all_images
from ssl_kernels.trainers.use.items import Items
from ssl_kernels.trainers.use.trained import Trained

Stamped = tuple[str, str]  # a file's name, and what changes when it does


def cached_images(model: Trained, items: Items, data: str, options: UseConfig, console: Console) -> Vectors:
    """The vectors of all images; those of files that are as they were come from the cache of this model and data."""
    listed = list(items.read()) if items.count is not None else []
    if model.path is None or not all(isinstance(item.source, Path) for item in listed) or not listed:
        return all_images(model, items, model.encode_image, options, console, "embedding")
    place = hashlib.sha256(f"{model.checksum}:{Path(data).expanduser().resolve()}".encode()).hexdigest()[:16]
    path = model.path.parent / "embeddings" / f"{place}.npz"
    known, stamped = _read(path), [_stamp(item.source) for item in listed]
    found: dict[int, Tensor] = {i: known[stamp] for i, stamp in enumerate(stamped) if stamp in known}
    fresh = [i for i in range(len(listed)) if i not in found]
    if fresh:
        chosen = Items(lambda: (listed[i] for i in fresh), len(fresh), "")
        made = all_images(model, chosen, model.encode_image, options, console, "embedding", needed=not found)
        found.update({fresh[place]: row for place, row in zip(made.kept.tolist(), made.vectors, strict=True)})
    kept = sorted(found)
    result = Vectors(torch.tensor(kept), [listed[i].name for i in kept], torch.stack([found[i] for i in kept]))
    if fresh:
        _write(path, [stamped[i] for i in kept], result.vectors, console)
    return result


def _stamp(source: object) -> Stamped:
    name = os.path.abspath(str(source))
    with contextlib.suppress(OSError):  # what is not there is left out later
        about = os.stat(name)
        return name, f"{about.st_size} {about.st_mtime_ns}"
    return name, ""


def _read(path: Path) -> dict[Stamped, Tensor]:
    with contextlib.suppress(OSError, ValueError, KeyError), np.load(path) as kept:  # none, or none of this version
        names = map(tuple, json.loads(kept["names"].tobytes()))
        return dict(zip(names, torch.from_numpy(kept["vectors"]), strict=True))
    return {}


def _write(path: Path, names: list[Stamped], vectors: Tensor, console: Console) -> None:
    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, names=np.frombuffer(json.dumps(names).encode(), dtype=np.uint8), vectors=vectors.numpy())

    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, save)
    except OSError as error:  # a run that may only be read is searched all the same
        console.print(f"note: embeddings are not kept: {path.parent}: {error.strerror}", highlight=False, markup=False)
