"""transformers' format: a folder for `VisionTextDualEncoderModel.from_pretrained`, or for `AutoModel` without texts.

transformers wraps timm's networks, and its CLIP text model computes what open_clip's does, which is ours; the dual
encoder puts a linear map without bias on either. A run on images alone is timm's folder, which transformers reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_kernels.trainers.text_towers import BpeTokenizer
from ssl_kernels.trainers.trunks import TINY
from ssl_kernels.trainers.use.formats import timm
from ssl_kernels.trainers.use.formats.written import TEXTS, Written, compared, sample_images

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained

START, END = 49406, 49407  # tokens


def refusal(model: Trained) -> str | None:
    """Why transformers cannot hold the model, if it cannot."""
    if importlib.util.find_spec("transformers") is None:
        return "missing transformers; install: pip install transformers"
    image, text = model.inputs["image"], model.inputs["text"]
    if image["model"] == TINY:
        return f"transformers wraps timm's networks, and {TINY} is none of them"
    if text is None:
        return "a run on images alone is written as --format timm, which transformers' AutoModel reads"
    if image["head"] != "linear":
        return f"transformers' dual encoder has a linear image head, and the run has {image['head']}"
    if text["model"] == "ngrams":
        return "transformers has no n-gram text tower; train with --text-model transformer"
    return None


def write(model: Trained, folder: Path) -> Written:
    """Write the folder, and load it as transformers does."""
    import transformers

    with _quietly():
        build(model).save_pretrained(folder)
        tokenizer(model).save_pretrained(folder)
        image_processor(model).save_pretrained(folder)
        loaded = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
    images = sample_images(model)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        x = loaded.get_image_features(pixel_values=timm.normalise(model, images)).pooler_output
        y = loaded.get_text_features(**tokens).pooler_output
    x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    pairs = {"image tower": (model.encode_image(images), x), "text tower": (model.encode_text(list(TEXTS)), y)}
    return Written(sorted(folder.iterdir()), compared("transformers", pairs), _usage(model, folder.name))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without its bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build(model: Trained) -> Any:
    """transformers' model with the run's weights."""
    import transformers

    image, text = model.inputs["image"], model.inputs["text"]
    name, arguments = timm.architecture(model)
    wide: Any = {"hidden_size": model.image.width}  # which the dual encoder asks for
    vision = transformers.TimmWrapperConfig(architecture=name, model_args=arguments, **wide)
    language = transformers.CLIPTextConfig(
        vocab_size=text["vocabulary"], hidden_size=text["width"], intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"], num_attention_heads=text["width"] // 64, hidden_act="gelu",
        max_position_embeddings=text["context_length"], bos_token_id=START, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, language, projection_dim=image["dim"], logit_bias=model.logit_bias
    )
    built = transformers.VisionTextDualEncoderModel(config)
    built.load_state_dict(tensors(model), strict=True)
    return built.eval()


def tensors(model: Trained) -> dict[str, Tensor]:
    """The weights under transformers' names; its attention has a map to each of queries, keys and values."""
    assert model.text is not None
    assert model.logit_scale is not None
    text = model.text.state_dict()
    found = {
        "logit_scale": torch.tensor(model.logit_scale).log(),
        "visual_projection.weight": model.image.head.state_dict()["weight"],
        "text_projection.weight": text["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": text["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": text["positional_embedding"],
        "text_model.final_layer_norm.weight": text["ln_final.weight"],
        "text_model.final_layer_norm.bias": text["ln_final.bias"],
        **{f"vision_model.timm_model.{name}": value for name, value in model.image.trunk.state_dict().items()},
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for layer in range(model.inputs["text"]["layers"]):
        ours, theirs = f"transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, other in names.items():
                found[f"{theirs}{other}.{kind}"] = text[f"{ours}{name}.{kind}"]
            maps = text[f"{ours}attn.in_proj_{kind}"].chunk(3)
            for name, value in zip("qkv", maps, strict=True):
                found[f"{theirs}self_attn.{name}_proj.{kind}"] = value
    return found


def tokenizer(model: Trained) -> Any:
    """open_clip's vocabulary as a tokenizer of transformers."""
    import transformers

    assert isinstance(model.tokenizer, BpeTokenizer)
    theirs = model.tokenizer.tokenizer
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): place for token, place in theirs.encoder.items()}
    merges: Any = [tuple(pair) for pair in theirs.bpe_ranks]
    length = model.inputs["text"]["context_length"]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def image_processor(model: Trained) -> Any:
    """What makes a network's input of an image."""
    import transformers

    image = model.inputs["image"]
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": image["size"]}, crop_size=image["size"], resample=2, image_mean=image["mean"],
        image_std=image["std"],
    )  # fmt: skip


def _usage(model: Trained, folder: str) -> str:
    note = "" if model.logit_bias is None else (
        f"\nSigLIP's logits have a bias, {model.logit_bias:.4f}, which this class of transformers lacks: add it to"
        " `logits_per_image` before a sigmoid. Embeddings and ranks are the run's.\n"
    )  # fmt: skip
    return (
        "```python\nfrom transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel\n\n"
        f'model = VisionTextDualEncoderModel.from_pretrained("{folder}")\n'
        f'processor = AutoImageProcessor.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f"```\n{note}"
    )
