"""Which pairs are trained on and which are held out, so that no held-out image or caption occurs in training.

Captions may be names of classes, though: then each is shared by many images, and holding a caption out would take the
whole class out of training. Such tables are split by their images alone, the same share of every class.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ssl_kernels.trainers.data import contents
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.identity import Fingerprints, link
from ssl_kernels.trainers.data.pairs import ImageTextPairs

MOST_HELD_OUT = 5_000  # evaluation compares every held-out image with every held-out caption
SHARED = 5  # images: a caption of so many says nothing of one of them
_CLASSES, _FILLER, _FEW = 0.9, 0.2, 20  # shares of all pairs, and pairs

BY_CLASS = "captions are names of classes: images are held out of each, and evaluated by finding their class"
LEAKING = "that share a caption or an image with a held-out pair"


def has_class_names(pairs: ImageTextPairs) -> bool:
    """Whether almost all captions are shared by many images, and there are several of them."""
    counts = _images_by_caption(pairs)
    shared = sum(count for count in counts.values() if count >= SHARED)
    return len(counts) > 1 and shared >= _CLASSES * counts.total()


def suspect(pairs: ImageTextPairs, found: Found) -> None:
    """Note a caption that so many images share that it can say nothing of any, unless captions name classes."""
    counts = _images_by_caption(pairs)
    ((caption, count),) = counts.most_common(1)
    if len(pairs) < _FEW or count <= max(SHARED, _FILLER * len(pairs)) or has_class_names(pairs):
        return
    images = len(set(contents_of(pairs)))
    share = f"all {images:,}" if count == images else f"{count:,} of {images:,}"
    found.suspect(f"{share} images have the caption {caption[:60]!r}")


def _images_by_caption(pairs: ImageTextPairs) -> Counter[str]:
    numbers = contents_of(pairs)
    return Counter(caption for caption, _ in {(caption, numbers[i]) for i, caption in _captions(pairs)})


def _captions(pairs: ImageTextPairs) -> Iterator[tuple[int, str]]:
    """Every caption with the number of its pair, in order."""
    for i in range(len(pairs)):
        for caption in _own(pairs, i):
            yield i, caption


def _own(pairs: ImageTextPairs, i: int) -> tuple[str, ...]:
    """The captions of a pair."""
    return (pairs.captions[i], *(pairs.others[i] if pairs.others else ()))


def contents_of(pairs: ImageTextPairs) -> list[int]:
    """A number for every pair, the same for equal image files."""
    return contents.same(_paths(pairs)) if pairs.contents is None else pairs.contents


def groups(pairs: ImageTextPairs) -> list[int]:
    """A number for every pair, the same for two pairs that share a caption or an image (the file or its content)."""
    numbers, every = contents_of(pairs), list(_captions(pairs))
    linked = link([i for i, _ in every], [numbers[i] for i, _ in every], [caption for _, caption in every])
    return list({i: number for (i, _), number in zip(every, linked, strict=True)}.values())


def split(
    pairs: ImageTextPairs, share: float, seed: int, found: Found | None = None
) -> tuple[ImageTextPairs, ImageTextPairs]:
    """Hold out a share of the pairs' groups, or of each class's images where captions are names of classes.

    Groups are drawn by a hash of their first caption and the seed; one that many images have in common is passed over.
    One pair of each held-out group is kept: a gallery with two captions of one image would call a right answer wrong.
    """
    found = Found("") if found is None else found
    if has_class_names(pairs):
        numbers = contents_of(pairs)
        share = min(share, MOST_HELD_OUT / len(pairs))
        train, held_out = stratified(pairs.captions, numbers, share, seed)
        if left_out := len(pairs) - len(train) - len(held_out):
            found.leave_out(LEAKING, left_out)
        if BY_CLASS not in found.remarks:
            found.remarks.append(BY_CLASS)
        return pairs.select(train), with_classes(pairs.select(held_out))
    members, numbers = _members(groups(pairs)), contents_of(pairs)

    def drawn(group: int) -> bytes:
        return hashlib.sha256(f"{seed}:{pairs.captions[members[group][0]]}".encode()).digest()

    most = max(SHARED, share * len(set(numbers)) / 5)
    small = [group for group, own in members.items() if len({numbers[i] for i in own}) <= most]
    chosen = set(sorted(small, key=drawn)[: min(round(share * len(members)), MOST_HELD_OUT)])
    train = [i for group, own in members.items() if group not in chosen for i in own]
    left_out = sum(len(members[group]) - 1 for group in chosen)
    if left_out:
        found.leave_out(LEAKING, left_out)
    return pairs.select(sorted(train)), pairs.select(sorted(members[group][0] for group in chosen))


def stratified(
    classes: Sequence[Hashable], numbers: Sequence[int], share: float, seed: int, never: Hashable = None
) -> tuple[list[int], list[int]]:
    """Indices to train on, and to hold out: the same share of every class's images, but none of the class `never`.

    Equal images, those of one number in `numbers`, are on one side; of those held out the first alone is kept.
    """
    images = _members(numbers)
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for number, own in images.items():
        by_class[classes[own[0]]].append(number)
    rng = np.random.default_rng(seed)
    chosen = {
        number for name, own in sorted(by_class.items()) if name != never
        for number in rng.permutation(own)[: round(share * len(own))].tolist()
    }  # fmt: skip
    train = [i for number, own in images.items() if number not in chosen for i in own]
    return sorted(train), sorted(images[number][0] for number in chosen)


def _members(numbers: Sequence[int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(numbers):
        members[number].append(index)
    return members


def gallery(pairs: ImageTextPairs, *, by_class: bool) -> ImageTextPairs:
    """Given held-out pairs as they are evaluated: one of each group, or, where captions name classes, of each image."""
    first = {number: own[0] for number, own in _members(contents_of(pairs) if by_class else groups(pairs)).items()}
    chosen = pairs.select(sorted(first.values()))
    return with_classes(chosen) if by_class else chosen


def with_classes(pairs: ImageTextPairs) -> ImageTextPairs:
    """The pairs with their captions for categories, unless they have other ones."""
    if pairs.categories is None:
        pairs.categories = list(pairs.captions)
    return pairs


def fingerprints(pairs: ImageTextPairs, *, by_class: bool = False) -> Fingerprints:
    """What marks the pairs of a held-out table: captions and images, or images alone where captions name classes."""
    marks, paths = Fingerprints(), _paths(pairs)
    for i, path in enumerate(paths):
        try:
            image = path.read_bytes()
        except OSError:  # the evaluation will say so
            image = b""
        marks.add(() if by_class else _own(pairs, i), image)
    return marks


def without(pairs: ImageTextPairs, held_out: Fingerprints, found: Found | None = None) -> ImageTextPairs:
    """The pairs that share neither a caption nor an image with the held-out ones."""
    found = Found("") if found is None else found
    paths, leaking = _paths(pairs), set()
    shared: Counter[str] = Counter()
    for i, path in enumerate(paths):
        own = _own(pairs, i)
        if held_out.match(own, path):
            leaking.add(i)
            shared.update(held_out.captions.intersection(own))
    if leaking:
        found.leave_out(LEAKING, len(leaking))
    for caption, count in shared.most_common(1):
        if count > max(2 * SHARED, len(pairs) / 20):
            found.suspect(
                f"the held-out caption {caption[:60]!r} is that of {count:,} of {len(pairs):,} training pairs, which"
                " cannot be trained on then"
            )
    return pairs.select([i for i in range(len(pairs)) if i not in leaking])


def tell_of_leaks(leaking: int, fresh: int, held_out: int, found: Found) -> None:
    """Note the pairs of shards that share a caption or an image with held-out ones, and too many of them."""
    if leaking:
        found.leave_out(LEAKING, leaking)
    if leaking > max(2 * SHARED, (leaking + fresh) / 20, SHARED * held_out):
        found.suspect(
            f"{leaking:,} of {leaking + fresh:,} pairs share a caption or an image with one of {held_out:,} held-out"
            " pairs"
        )


def _paths(pairs: ImageTextPairs) -> list[Path]:
    assert isinstance(pairs.images, list)
    return pairs.images
