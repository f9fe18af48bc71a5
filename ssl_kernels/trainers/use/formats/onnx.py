"""The towers as ONNX files, for onnxruntime and what else reads them.

An n-gram run's tokenizer is written beside them, as a file of Python that needs neither torch nor this library.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssl_kernels.trainers import text_towers
from ssl_kernels.trainers.use.formats.towers import Tower, towers
from ssl_kernels.trainers.use.formats.written import Written, compared

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOKENIZER = "ngram_tokenizer.py"


def refusal(model: Trained) -> str | None:
    """Why the model cannot be written, if it cannot."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f'missing {", ".join(missing)}; install the extra "export": pip install ".[export]" in the checkout'
    return None


def write(model: Trained, folder: Path) -> Written:
    """Write a file to each tower, and run what was written by onnxruntime."""
    files, pairs = [], {}
    for name, tower in towers(model).items():
        files.append(folder / f"{name}.onnx")
        program = torch.onnx.export(tower.program(), dynamo=True, output_names=["output"], verbose=False)
        assert program is not None
        program.save(str(files[-1]))
        pairs[f"{name} tower"] = tower.expected(), _run(files[-1], tower)
    if isinstance(model.text, text_towers.NGramTower):
        files.append(folder / TOKENIZER)
        files[-1].write_text(tokenizer_source(model.inputs["text"]["buckets"]), encoding="utf-8")
    return Written(files, compared("onnx", pairs), _usage(model, folder.name))


def _run(path: Path, tower: Tower) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: tower.example[0].numpy()})[0])


def tokenizer_source(buckets: int) -> str:
    """A module whose `tokenize(captions)` gives what the exported n-gram tower takes."""
    bag = inspect.getsource(text_towers._bag.__wrapped__).partition("\n")[2]  # without the cache
    return (
        '"""The tokens that text.onnx takes: `tokenize(captions)` gives int64 [N, L]."""\n\n'
        "import itertools\nimport zlib\n\nimport numpy as np\n\n\n"
        f"{bag}\n\n"
        "def tokenize(captions: list[str]) -> np.ndarray:\n"
        f"    bags = [_bag(caption, {buckets}) for caption in captions]\n"
        "    tokens = np.full((len(bags), max(map(len, bags), default=0)), -1, dtype=np.int64)\n"
        "    for row, bag in zip(tokens, bags):\n"
        "        row[: len(bag)] = bag\n"
        "    return tokens\n"
    )


def _usage(model: Trained, folder: str) -> str:
    lines = [
        "```python", "import numpy as np", "import onnxruntime", "",
        f'image = onnxruntime.InferenceSession("{folder}/image.onnx")',
        f"pixels = np.zeros((1, 3, {model.size}, {model.size}), dtype=np.uint8)  # your images, not normalised",
        '(embedding,) = image.run(None, {"images": pixels})',
    ]  # fmt: skip
    if isinstance(model.text, text_towers.NGramTower):
        lines += ["import sys", f'sys.path.append("{folder}")', f"from {TOKENIZER.removesuffix('.py')} import tokenize"]
    elif model.text is not None:
        length = model.inputs["text"]["context_length"]
        lines += [
            "from open_clip.tokenizer import SimpleTokenizer",
            f"tokenize = lambda texts: SimpleTokenizer(context_length={length})(texts).numpy()",
        ]
    if model.text is not None:
        lines += [
            f'text = onnxruntime.InferenceSession("{folder}/text.onnx")',
            '(text_embedding,) = text.run(None, {"tokens": tokenize(["a red circle"])})',
        ]
    return "\n".join([*lines, "```", ""])
