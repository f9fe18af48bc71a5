"""The pairs of held-out shards, in memory."""

from __future__ import annotations

import torch

from ssl_kernels.trainers.data.faults import EVALUATION, Fault, Faults
from ssl_kernels.trainers.data.identity import Fingerprints
from ssl_kernels.trainers.data.images import BadImageError, centre_crop, open_image
from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.data.shard_names import expand
from ssl_kernels.trainers.data.tars import Losses, samples
from ssl_kernels.trainers.errors import UserError


def read_all(
    urls: str,
    size: int,
    flag: str = "--held-out-data",
    *,
    faults: Faults | None = None,
    background: Colour = WHITE,
    encoding: str = "utf-8",
) -> tuple[ImageTextPairs, Fingerprints]:
    """The pairs of held-out shards in memory, one for each caption and image, and what marks them."""
    faults = Faults(stop=True) if faults is None else faults
    images, captions, marks, losses = [], [], Fingerprints(), Losses()
    for name in expand(urls, flag):
        found: list[Fault] = []
        bad: list[Fault] = []
        count = 0
        for image, own, where in samples(name, found, of=EVALUATION, encoding=encoding):
            count += 1
            try:
                if not marks.match(own, image):
                    images.append(centre_crop(open_image(image, background, where), size))
                    captions.append(own[0])
            except BadImageError as error:
                bad.append(Fault(where, error.reason, of=EVALUATION))
            else:
                marks.add(own, image)
        faults.update([*bad, *losses.of(found, count)])
    faults.update(losses.of_parts())
    if not images:
        reasons = "; ".join(faults.lines(EVALUATION))
        raise UserError(f"{flag}: {urls} holds no pairs" + (f" that can be used: {reasons}" if reasons else ""))
    return ImageTextPairs(torch.stack(images), captions), marks
