"""Images with captions that need no download: 648 coloured shapes, drawn here.

`images` are [648, 3, 32, 32] in [0, 1], `captions` say "a small red circle at the top left" and so on, and `tokens`
[648, 8] number their words. A hundred pairs are held out, none of whose captions is seen in training.
"""

import itertools

import torch

SIZES, COLOURS = {"small": 2.5, "large": 4.5}, {"red": 0b100, "green": 0b010, "blue": 0b001, "yellow": 0b110}
COLOURS |= {"pink": 0b101, "cyan": 0b011, "white": 0b111, "grey": 0b111, "brown": 0b100}
SHAPES = ("circle", "square", "diamond", "cross")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def draw(size: str, colour: str, shape: str, row: str, column: str) -> torch.Tensor:
    """[3, 32, 32]: one shape on black, somewhere in one of nine fields."""
    radius = SIZES[size]
    y = (torch.arange(32.0)[:, None] - (5.5 + 10.5 * ROWS.index(row))).abs()
    x = (torch.arange(32.0)[None, :] - (5.5 + 10.5 * COLUMNS.index(column))).abs()
    distance = {
        "circle": (x.square() + y.square()).sqrt(),
        "square": torch.maximum(x, y),
        "diamond": (x + y) / 1.3,
        "cross": torch.maximum(torch.maximum(x, y), 4 * torch.minimum(x, y)),
    }[shape]
    light = 0.4 if colour in ("grey", "brown") else 1.0
    channels = torch.tensor([COLOURS[colour] >> bit & 1 for bit in (2, 1, 0)])
    return light * channels[:, None, None] * (distance <= radius)


kinds = list(itertools.product(SIZES, COLOURS, SHAPES, ROWS, COLUMNS))
images = torch.stack([draw(*kind) for kind in kinds])
captions = ["a {} {} {} at the {} {}".format(*kind) for kind in kinds]
vocabulary = sorted(set(" ".join(captions).split()))
tokens = torch.tensor([[vocabulary.index(word) for word in caption.split()] for caption in captions])
held_out, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([100, 548])
