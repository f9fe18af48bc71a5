"""The samples in WebDataset shards: tar files in which the members of a sample have one name and different endings.

The name ends at the first dot after the last slash. A sample has an image of any ending in `images.SUFFIXES` and a
captions: the first that is not empty of its members `.txt`, `.text`, `.caption`, `.json` (its "caption", a text or a
list of them) and `.cls`.
Members of a sample need not follow each other; where they do not, what is still incomplete waits in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ssl_kernels.trainers.data.cells import captions_of
from ssl_kernels.trainers.data.faults import TRAINING, Fault, place
from ssl_kernels.trainers.data.images import SUFFIXES
from ssl_kernels.trainers.data.tar_members import CutShortError, members

CAPTIONS = ("txt", "text", "caption", "json", "cls")
_IMAGES = {suffix[1:] for suffix in SUFFIXES}
_READ = _IMAGES | {*CAPTIONS}


class Sample(NamedTuple):
    image: bytes  # encoded
    captions: list[str]  # one or several; by the first it is evaluated
    where: str  # the shard and the name in it


def samples(
    shard: str, found: list[Fault], *, of: str = TRAINING, expected: int | None = None, encoding: str = "utf-8"
) -> Iterator[Sample]:
    """The samples of a shard in their order; `found` is told of those that are incomplete and of a shard cut short.

    A shard of which a part is lost is the last of these, and counts as the samples that are missing to the number that
    is `expected` of it; as 0 if that is not known. Captions, but for JSON, are in `encoding`.
    """
    own, before = _Shard(place(shard), found, of, encoding), len(found)
    last = loss = ""
    try:
        for key, ending, content in members(shard, _READ):
            if key != last:
                yield from own.complete(last)
            last = key
            own.add(key, ending, content)
    except CutShortError as error:
        loss = str(error)
    yield from own.complete(last)
    if loss:
        own.waiting.pop(last, None)  # cut in two
    own.leave_out_the_rest()
    if not loss and not own.given and len(found) == before:
        loss = "without images and captions"
    if loss:
        where = f"{own.name} after {len(own.given):,} samples" if own.given else own.name
        lost = 0 if expected is None else max(1, expected - len(own.given))
        found.append(Fault(where, f"lost from a shard {loss}", lost, of))


@dataclass
class _Shard:
    """The samples of a shard as their members come."""

    name: str
    found: list[Fault]
    of: str
    encoding: str
    waiting: dict[str, dict[str, bytes]] = field(default_factory=dict)  # members by ending, of what is incomplete
    given: set[str] = field(default_factory=set)  # names

    def add(self, key: str, ending: str, content: bytes) -> None:
        if key not in self.given:
            self.waiting.setdefault(key, {}).setdefault(ending, content)
        elif ending in _IMAGES:
            self.leave_out(f"{key} again", "with the name of another")

    def complete(self, key: str) -> Iterator[Sample]:
        """The sample of this name, unless something of it is missing that may yet come."""
        own = self.waiting.get(key, {})
        image = next((own[ending] for ending in own if ending in _IMAGES), None)
        try:
            captions = _captions(own, self.encoding)
        except UnicodeDecodeError:
            self.leave_out(key, f"with a caption that is not {self.encoding.upper()}")
        except ValueError:
            self.leave_out(key, "with a .json that is none")
        else:
            if image is None or not captions:
                return
            if image:
                yield Sample(image, captions, f"{self.name}:{place(key)}")
            else:
                self.leave_out(key, "with an empty image")
        self.given.add(key)
        del self.waiting[key]

    def leave_out_the_rest(self) -> None:
        """What is incomplete at the end stays so."""
        for key, own in self.waiting.items():
            self.leave_out(key, f"without {'caption' if _IMAGES & own.keys() else 'image'}")

    def leave_out(self, key: str, reason: str) -> None:
        self.found.append(Fault(f"{self.name}:{place(key)}", reason, 1, self.of))


def _captions(members: dict[str, bytes], encoding: str) -> list[str]:
    """Of the first member that has any."""
    for ending in CAPTIONS:
        text = members.get(ending, b"").decode(encoding if ending != "json" else "utf-8").removeprefix("\ufeff").strip()
        content = json.loads(text) if ending == "json" and text else {}
        captions = captions_of(content.get("caption")) if isinstance(content, dict) else []
        if ending != "json" and text:
            captions = [text]
        if captions:
            return captions
    return []


class Losses:
    """What is left out of several shards that are read for the first time, when it is not known how long they are."""

    def __init__(self) -> None:
        self.whole: list[int] = []  # samples
        self.cut: list[tuple[Fault, int]] = []

    def of(self, found: list[Fault], count: int) -> list[Fault]:
        """What was found in a shard that had `count` samples, but for the loss of a part of it."""
        if not found or found[-1].lost:
            self.whole.append(count)
            return found
        self.cut.append((found[-1], count))
        return found[:-1]

    @property
    def expected(self) -> int:
        """Samples of a shard."""
        return round(sum(self.whole) / max(1, len(self.whole)))

    def of_parts(self) -> list[Fault]:
        """The shards of which a part is lost, each with the samples that are missing to the others' mean."""
        return [fault._replace(lost=max(1, self.expected - count)) for fault, count in self.cut]
