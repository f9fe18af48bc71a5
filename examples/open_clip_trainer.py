"""open_clip's own trainer, with this library's loss. Of a script that calls the trainer, one call changes:

    + from ssl_kernels.integrations.open_clip import replaced_losses

    - train(arguments)
    + with replaced_losses():
    +     train(arguments)

    python examples/open_clip_trainer.py              # CLIP, on coloured shapes and their captions
    python examples/open_clip_trainer.py siglip
    torchrun --nproc-per-node 2 examples/open_clip_trainer.py

Everything else is open_clip's: data, towers, optimizer, schedule, evaluation.
"""

import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import shapes
import torch
from open_clip_train.main import main as train
from torchvision.transforms.functional import to_pil_image

from ssl_kernels.integrations.open_clip import replaced_losses

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def write_pairs(folder: Path) -> None:
    for name, part in (("train", shapes.train), ("val", shapes.held_out)):
        with (folder / f"{name}.csv").open("w") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption"])
            for i in part.tolist():
                to_pil_image(shapes.images[i]).save(folder / f"{i}.png")
                table.writerow([folder / f"{i}.png", shapes.captions[i]])


def main(method: str = "clip", epochs: int = 12) -> list[dict[str, Any]]:
    """What open_clip's evaluation found after each epoch."""
    folder = Path(tempfile.mkdtemp())
    write_pairs(folder)
    (folder / "tiny-shapes.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "tiny-shapes.json")
    arguments = [
        "--model", "tiny-shapes", "--dataset-type", "csv", "--train-data", str(folder / "train.csv"),
        "--val-data", str(folder / "val.csv"), "--csv-separator", ",", "--csv-img-key", "image",
        "--csv-caption-key", "caption", "--batch-size", str(64 // PROCESSES), "--epochs", str(epochs),
        "--lr", "1e-3", "--wd", "0.01", "--warmup", "10", "--workers", "0", "--precision", "fp32", "--gather-with-grad",
        "--logs", str(folder), "--name", "run", *(["--siglip"] if method == "siglip" else []),
    ]  # fmt: skip
    with replaced_losses():
        train(arguments)
    results = folder / "run" / "checkpoints" / "results.jsonl"  # of the first process
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for epoch in found:
        recall, loss = epoch["text_to_image_R@1"], epoch["clip_val_loss"]
        print(f"epoch {epoch['epoch']}: held-out captions that find their image {recall:.2f}, loss {loss:.3f}")
    return found


if __name__ == "__main__":
    if PROCESSES > 1 and not torch.cuda.is_available():  # open_clip names a device, which DDP on CPUs does not take
        wrapper = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **rest: wrapper(model, **rest)
    main(*sys.argv[1:])
