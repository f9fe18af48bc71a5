"""Weights to start with: of another run, of a model of timm, or of a .safetensors file.

Weights go where a name and a shape are the same. An image tower takes those of the tower that the other run is
evaluated by, whatever the two methods call it; a trunk takes a trunk's, whatever stands before the names in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels.trainers.checkpoints import checkpoint_path, load_checkpoint
from ssl_kernels.trainers.errors import UserError, describe, one_line
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.loop_config import LoopConfig

FLAG = "--init-from"


class Source(NamedTuple):
    """Weights by name, and what stands before those of the image tower, where that is known."""

    weights: dict[str, Tensor]
    tower: str | None = None


def start_from(name: str, model: nn.Module) -> str:
    """Load the weights that `name` names into a model; what was loaded and what not, in a line.

    Raises `UserError` if there are none, or none that fit.
    """
    source = read(name)
    own = _weights_of(model)
    found = {name: value for name, value in source.weights.items() if _fits(value, own.get(name))}
    for place, module in model.named_modules():
        if isinstance(module, ImageTower):
            for name_within, value in _of_tower(source, module).items():
                if _fits(value, own.get(f"{place}.{name_within}")):
                    found[f"{place}.{name_within}"] = value
    if not any(value.ndim > 1 for value in found.values()):
        raise UserError(
            f"{FLAG}: none of the {len(source.weights)} weights of {name} has the name and the shape of one of this"
            " model; is it of another --image-model or --image-size?"
        )
    model.load_state_dict(found, strict=False)
    missing = own.keys() - found.keys()
    rest = f"; not loaded: {_summary(missing)}" if missing else ""
    return f"{FLAG} {name}: loaded {len(found)} of {len(own)} weights: {_summary(found)}{rest}"


def read(name: str) -> Source:
    """The weights of a run, a file or a model of timm."""
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return Source(load_file(path))
        except Exception as error:  # safetensors has its own kinds
            raise UserError(f"{FLAG}: cannot read {path}: {describe(error)}") from None
    if path.is_dir() or path.suffix == ".pt":
        state = load_checkpoint(checkpoint_path(path, FLAG), FLAG)
        return Source(state["model"], state.get("inputs", {}).get("weights", {}).get("image"))
    import timm

    if not timm.is_model(name):
        raise UserError(
            f"{FLAG}: expected a run's folder, a .safetensors file or the name of a model of timm, got {name!r}"
        )
    try:
        return Source(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # the hub's errors share no base class
        raise UserError(f"{FLAG}: cannot get the weights of {name} ({describe(error)})") from None


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics; queues and centres are of a training, not of a network."""
    norms = [(place, norm) for place, norm in model.named_modules() if isinstance(norm, _BatchNorm)]
    statistics = {f"{place}.{name}": value for place, norm in norms for name, value in norm.named_buffers()}
    return {**dict(model.named_parameters(remove_duplicate=False)), **statistics}


def _fits(value: Tensor, own: Tensor | None) -> bool:
    return own is not None and value.shape == own.shape


def _of_tower(source: Source, tower: ImageTower) -> dict[str, Tensor]:
    """Weights of a source by their names in an image tower."""
    if source.tower is not None:
        within = _within(source.weights, source.tower)
        trunk = _within(within, "trunk.")
    else:
        within, trunk = {}, _within(source.weights, _place_of(tower.trunk, source.weights))
    return {**within, **{f"trunk.{name}": value for name, value in _adapted(trunk, tower.trunk).items()}}


def _within(weights: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    return {name.removeprefix(place): value for name, value in weights.items() if name.startswith(place)}


def _place_of(trunk: nn.Module, weights: dict[str, Tensor]) -> str:
    """What stands before the names of a trunk's weights: where most of them are found, the first such place."""
    names = list(trunk.state_dict())
    longest = max(names, key=len)
    places = [name.removesuffix(longest) for name in weights if name.endswith(longest)]
    return max(places, key=lambda place: sum(f"{place}{name}" in weights for name in names), default="")


def _adapted(weights: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Of a vision transformer, positions for the trunk's number of patches."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not isinstance(trunk, VisionTransformer) or "pos_embed" not in weights:
        return weights
    with torch.no_grad():
        adapted: dict[str, Any] = checkpoint_filter_fn(dict(weights), trunk)
    return adapted


def _summary(names: Iterable[str]) -> str:
    """How many there are of each part of a model."""
    parts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))


def initialise(config: LoopConfig, model: nn.Module, console: Console) -> None:
    """Do what --init-from asks for, and say what was done. In a resumed run it makes the network that the trained
    one is compared with, as far as the weights are still there."""
    if not config.init_from:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            line = start_from(config.init_from, model)
    except UserError as error:
        if config.resume is None:
            raise
        line = f"note: {one_line(error)}; the network before training is shown without them"
    console.print(line, highlight=False, soft_wrap=True)
