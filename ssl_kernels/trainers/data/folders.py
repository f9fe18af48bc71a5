"""Which folders of images are classes, and which are splits.

**Classes.** Folders are passed through as long as a single one holds all images or most of them, the others lying
beside it. The folders at which the way parts are the classes, and an image belongs to the one that it lies in, however
deep. An image beside them has no label. Where more images lie beside them than in them, none has.

**Splits.** If all of these folders are called train, val, test or alike, and one of them is for training, they are no
classes: one is trained on, one evaluated with, and their classes are found below them, in each alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ssl_kernels.trainers.data.faults import place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.trees import Folders, Tree

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation", "dev", "eval")  # what evaluation takes, the first there is
UNLABELLED = -1

_MOST_NAMED = 12  # classes


@dataclass
class Part:
    """Images to train on, or to evaluate with, and the number of each one's class in `classes` if there are any."""

    name: str  # of the split; "" where there is none
    paths: list[Path]
    labels: list[int] | None
    classes: list[str]


def parts(tree: Tree, found: Found) -> list[Part]:
    """The whole tree, or the parts to train on and to evaluate with where its folders are splits."""
    chosen = _splits(tree)
    if chosen is None:
        return [_labelled(tree, "", None, found)]
    train = _labelled(tree.below(chosen[0]), "/".join(chosen[0]), None, found)
    held_out = _labelled(tree.below(chosen[1]), "/".join(chosen[1]), train.classes, found)
    if left := len(tree.files) - len(train.paths) - len(held_out.paths):
        found.leave_out("images of other splits", left)
    return [train, held_out]


def _splits(tree: Tree) -> tuple[Folders, Folders] | None:
    """The folders to train on and to evaluate with, where a tree is split into such."""
    through = _passed(tree)
    held = {name.lower(): name for name, count in tree.below(through).by_folder().items() if count}
    if len(held) < 2 or not all(name in (*TRAIN, *HELD_OUT) for name in held):
        return None
    train, others = ([(*through, held[name]) for name in names if name in held] for names in (TRAIN, HELD_OUT))
    if not train or not others:
        return None
    has_classes = [folders for folders in others if _classes(tree.below(folders))[1]]
    return train[0], [*has_classes, *others][0]


def _passed(tree: Tree) -> Folders:
    """The folders to pass through: each is the only one to hold images, and these are most, and not all its own."""
    through: Folders = ()
    while True:
        held = [name for name, count in tree.by_folder().items() if count]
        inside = tree.below((held[0],)) if len(held) == 1 else Tree()
        if 2 * len(inside.files) <= len(tree.files) or not inside.by_folder().total():
            return through
        through, tree = (*through, held[0]), inside


def _classes(tree: Tree) -> tuple[Folders, Counter[str]]:
    """The folders that are passed through, and the classes below them with their sizes; none without labels."""
    through = _passed(tree)
    counts = tree.below(through).by_folder()
    several = sum(map(bool, counts.values())) > 1
    return through, counts if several and 2 * counts.total() >= len(tree.files) else Counter()


def _labelled(tree: Tree, name: str, classes: list[str] | None, found: Found) -> Part:
    """The images of a tree with their labels, in other images' `classes` if these are given."""
    through, counts = _classes(tree)
    prefix, where = (f"{place(name)} ", f" in {place(name)}") if name else ("", "")
    classes = [own for own, count in counts.items() if count] if classes is None else classes
    paths, n = [file.path for file in tree.files], len(through)
    found.holds[f"images{where}"] = len(paths)
    for own, count in counts.items():
        if not count:
            found.leave_out("class folders without images", 1, place("/".join((*through, own))))
    if not counts or not classes:
        found.remarks.append(f"{prefix}without labels, for its folders make no classes")
        return Part(name, paths, None, [])
    numbers = {own: number for number, own in enumerate(classes)}
    labels = [
        numbers.get(own[n], UNLABELLED) if own[:n] == through and len(own) > n else UNLABELLED for _, own in tree.files
    ]
    found.holds[f"classes{where}"] = len({*labels} - {UNLABELLED})
    found.remarks.append(f"{prefix}labelled by folder: {named(+counts)}")
    if unlabelled := labels.count(UNLABELLED):
        found.remarks.append(f"{unlabelled:,}{where} outside of these folders have no label")
    return Part(name, paths, labels, classes)


def named(counts: Counter[str]) -> str:
    """Classes and their sizes in words."""
    shown = counts.most_common() if len(counts) <= _MOST_NAMED else counts.most_common(_MOST_NAMED // 2)
    words = [f"{place(name)} {count:,}" for name, count in shown]
    if len(counts) > len(shown):
        words += ["...", *(f"{place(name)} {count:,}" for name, count in counts.most_common()[-3:])]
    return ", ".join(words)
