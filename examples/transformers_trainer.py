"""transformers' `Trainer` on a `CLIPModel` or `SiglipModel`, whose B x B logits are never made. Two lines are added:

    + from ssl_kernels.integrations.transformers import contrastive_loss

    + trainer.compute_loss = lambda model, inputs, **_: contrastive_loss(model, **inputs)

Run it: `python examples/transformers_trainer.py`, on coloured shapes and their captions, or with `siglip`
"""

import sys
import tempfile

import shapes
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, Trainer, TrainingArguments, set_seed

from ssl_kernels.integrations.transformers import contrastive_loss

END = len(shapes.vocabulary)  # the token in which CLIP's text tower sums up a caption
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {"vocab_size": END + 1, "max_position_embeddings": 9, "eos_token_id": END}


def model_of(method: str) -> CLIPModel | SiglipModel:
    if method == "clip":
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=64))
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def pairs(part: Tensor) -> list[dict[str, Tensor]]:
    ids = F.pad(shapes.tokens, (0, 1), value=END)
    return [{"input_ids": ids[i], "pixel_values": 2 * shapes.images[i] - 1} for i in part.tolist()]


def batch_of(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([pair[name] for pair in examples]) for name in examples[0]} | {"return_loss": True}


@torch.no_grad()
def recall(model: CLIPModel | SiglipModel) -> float:
    """The share of the held-out captions whose nearest image is their own."""
    found = model(**batch_of(pairs(shapes.held_out))).logits_per_text.argmax(1)
    return (found == torch.arange(len(found))).float().mean().item()


def main(method: str = "clip", steps: int = 150) -> list[float]:
    set_seed(0)
    model = model_of(method)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, max_steps=steps, per_device_train_batch_size=128,
        learning_rate=2e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=batch_of, train_dataset=pairs(shapes.train))
    trainer.compute_loss = lambda model, inputs, **_: contrastive_loss(model, **inputs)
    trainer.train()
    print(f"held-out captions that find their image: {recall(model):.2f}, of chance 0.01")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
