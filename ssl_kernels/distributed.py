"""Batches that several processes of ``torch.distributed`` hold together.

W ranks of a group hold some rows each, of any number, in the order of the ranks. A loss over the group is that of one
process with all rows, and so are its gradients: features travel, in their own dtype, and gradients never do. What a
rank computes does not depend on what the network does first, so that a run on the same ranks repeats bit for bit.

* ``strategy="gather"`` takes the features of all ranks at once; ``"ring"`` passes them on from rank to rank, while the
  block before is computed, and holds two blocks at a time. Both visit the blocks in one order and give the same bits.
  ``"auto"`` gathers as long as the features of all ranks take at most 1 GiB.
* ``grad_reduce="mean"``: the mean of the ranks' gradients, which ``DistributedDataParallel`` and FSDP take, is the
  gradient of the loss: the gradients of a rank's features are W times it. ``"sum"`` is for trainers that add.
* ``even_batches=True`` promises that all ranks call alike and have equal numbers of rows, and spares the exchange of
  these that comes before features travel.

A call in which the ranks differ raises on all of them. Where a rank does not answer, the others raise once the group
gives up, after its timeout at most, and name it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"

GATHER_BYTES = 2**30  # of the features of a side, up to which "auto" gathers
_FACTS_BYTES = 1024  # in which a rank tells of a call
_NUMBERS = 4  # that it tells of itself alone
_REPORT_S = 10.0  # how long a rank that met an error waits for the others to say the same

# Its name since torch 2.14, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Across(NamedTuple):
    """Over which processes a loss is, and how. These fields are among the arguments of an op."""

    group: str = ""  # the name of a process group; empty for a process alone
    strategy: str = "auto"
    grad_reduce: str = "mean"
    even_batches: bool = False
    own_share: bool = False  # the value is this rank's share of the loss, whose mean over the ranks the loss is


ALONE = Across()


def across(
    group: Group, strategy: str, grad_reduce: str, even_batches: bool, own_share: bool, reduction: str
) -> Across:
    """From the arguments of a loss, checked; a group of one process is a process alone."""
    for name, value, choices in (
        ("strategy", strategy, ("auto", "gather", "ring")),
        ("grad_reduce", grad_reduce, ("mean", "sum")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    name = _name_of(group)
    if name and reduction == "none":
        raise ValueError("reduction: expected 'mean' or 'sum' over several processes, got 'none'")
    return Across(name, strategy, grad_reduce, even_batches, own_share)


def process_group(group: Group) -> dist.ProcessGroup | None:
    """That of a mesh, or None; one that this process is in."""
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        group = _of_mesh(group)
    if not torch.compiler.is_compiling() and dist.get_rank(group) < 0:  # compilers know few questions to a group
        raise ValueError(_OF_OTHERS)
    return group


def _name_of(group: Group) -> str:
    found = process_group(group)
    if found is None:
        return ""
    name: str = found.group_name
    return name if found.size() > 1 else ""


_OF_OTHERS = "group: expected a group that this process is in, got one of other processes"


def _of_mesh(mesh: Any) -> dist.ProcessGroup:
    if mesh == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_OF_OTHERS)
    if not hasattr(mesh, "get_group"):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"group: expected a mesh of one dimension, as mesh['dp'] is, got one of {mesh.ndim}")
    group: dist.ProcessGroup = mesh.get_group()
    return group


def world() -> dist.ProcessGroup | None:
    """All processes, or None for one that is alone."""
    return dist.group.WORLD if several_processes() else None


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Ranks:
    """The processes of a group, as one of them sees the others in a call of ``what``."""

    def __init__(self, group: str, what: str) -> None:
        from torch.distributed.distributed_c10d import _resolve_process_group

        self.group = _resolve_process_group(group)  # type: ignore[arg-type]
        self.rank, self.size = self.group.rank(), self.group.size()
        self.what = what

    def agree(self, own: Sequence[int], facts: Mapping[str, object], device: torch.device) -> list[list[int]]:
        """What each rank tells of itself alone, once all tell the same facts.

        Raises:
            ValueError: on all ranks, with the first fact in which they differ, and which ranks say what.
        """
        text = json.dumps({"function": self.what, **facts}, default=str).encode()
        if len(text) > _FACTS_BYTES:
            raise ValueError(f"{self.what}: expected facts of at most {_FACTS_BYTES} bytes, got {text!r}")
        told = torch.zeros(8 * _NUMBERS + _FACTS_BYTES, dtype=torch.uint8)
        told[: 8 * len(own)] = torch.tensor(own, dtype=torch.int64).view(torch.uint8)
        told[8 * _NUMBERS :][: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if self.backend(told.device) is None:  # else nobody waits for the device
            told = told.to(device)
        heard = self.gather(told).cpu()
        numbers, texts = heard[:, : 8 * len(own)].contiguous().view(torch.int64), heard[:, 8 * _NUMBERS :]
        if not (texts == texts[0]).all():
            raise ValueError(self._difference([json.loads(bytes(t.tolist()).rstrip(b"\0")) for t in texts]))
        rows: list[list[int]] = numbers.tolist()
        return rows

    def _difference(self, facts: Sequence[Mapping[str, object]]) -> str:
        for name in facts[0]:
            said: dict[str, list[int]] = {}
            for rank, fact in enumerate(facts):
                said.setdefault(str(fact.get(name)), []).append(dist.get_global_rank(self.group, rank))
            if len(said) > 1:
                each = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in said.items())
                return f"{self.what}: {name}: expected the same on all ranks, got {each}"
        return f"{self.what}: expected the same call on all ranks, got {facts}"

    def gather(self, tensor: Tensor) -> Tensor:
        """[W, ...] of tensors that have one shape on all ranks."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with self._exchange():
            _all_gather(gathered.view(-1), tensor.contiguous().view(-1), group=self.group)
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, in their order."""
        return self.gather(tensor).sum(0)

    def sum_many(self, tensor: Tensor) -> Tensor:
        """The same of so many numbers that each rank had better add up a share of them alone, in the same order."""
        share = -(-tensor.numel() // self.size)
        sent = torch.nn.functional.pad(tensor.flatten(), (0, share * self.size - tensor.numel()))
        arrived = torch.empty_like(sent)
        with self._exchange():
            dist.all_to_all_single(arrived, sent, group=self.group)
        sums = self.gather(arrived.view(self.size, share).sum(0))
        return sums.flatten()[: tensor.numel()].view(tensor.shape)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Those of all ranks, of which each has so many, in their order."""
        return torch.cat(list(_Gathered(self, rows, counts).by_rank()))

    def blocks(self, rows: Tensor, counts: Sequence[int], strategy: str, tag: int) -> Blocks:
        """To be visited as often as need be, by all ranks alike."""
        if self.backend(rows.device) == "gloo" and rows.device.type != "cpu":  # it sends what is on a CPU only
            if strategy == "ring":
                raise ValueError(f"strategy: expected 'gather' for {rows.device.type} tensors over gloo, got 'ring'")
            strategy = "gather"
        if strategy == "auto":
            row_bytes = rows.shape[1:].numel() * rows.dtype.itemsize
            strategy = "gather" if sum(counts) * row_bytes <= GATHER_BYTES else "ring"
        kind = _Gathered if strategy == "gather" else _Ring
        return kind(self, rows, counts, tag)

    def move(self, moves: Sequence[tuple[Any, Tensor, int]], tag: int) -> list[Any]:
        """Sends and receives, (what to do, rows, the other rank), that are under way when this returns."""
        asked = [
            dist.P2POp(do, rows, dist.get_global_rank(self.group, peer % self.size), self.group, tag)
            for do, rows, peer in moves
            if rows.numel()
        ]
        with self._exchange():
            return dist.batch_isend_irecv(asked) if asked else []

    def backend(self, device: torch.device) -> str | None:
        """What carries tensors of such a device."""
        return dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(",")).get(device.type)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around what waits for other ranks: an error tells which of them did not answer."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{self.what}: {self._missing()}: {error}") from error

    def _missing(self) -> str:
        """Ranks that do not report an error, too, by the store that all have in common."""
        everyone = dist.get_process_group_ranks(self.group)
        try:
            store = dist.distributed_c10d._get_default_store()
            key = "ssl_kernels/error of rank {}"
            store.set(key.format(dist.get_rank()), f"{self.what} over {_ranks(everyone)}")
            until, silent = time.monotonic() + _REPORT_S, everyone
            while silent and time.monotonic() < until:
                silent = [rank for rank in silent if not store.check([key.format(rank)])]
                time.sleep(0.05)
            calls = {rank: store.get(key.format(rank)).decode() for rank in everyone if rank not in silent}
        except (RuntimeError, OSError):
            return f"a rank of {_ranks(everyone)} has ended, and with it what the ranks had in common"
        if silent:
            return f"{_ranks(silent)} did not answer, having ended, or being stuck or elsewhere"
        if len(set(calls.values())) > 1:
            return "ranks met in different calls: " + "; ".join(f"rank {rank}: {call}" for rank, call in calls.items())
        return f"an exchange between {_ranks(everyone)} failed on all of them"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class Blocks:
    """Rows of all ranks: those of rank, rank - 1, rank - 2 and so on, around the ring, seen from ``rank``."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: Sequence[int], tag: int = 0) -> None:
        self.ranks, self.counts, self.tag = ranks, counts, tag
        self.rows = rows.detach().contiguous()

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """A rank, and its rows. They may be overwritten once the next ones are asked for."""
        raise NotImplementedError

    def _order(self) -> list[int]:
        return [(self.ranks.rank - step) % self.ranks.size for step in range(self.ranks.size)]

    def _empty(self, rank: int) -> Tensor:
        return self.rows.new_empty(self.counts[rank], *self.rows.shape[1:])


class _Gathered(Blocks):
    """They arrive while the first block, which is here, is looked at; and stay."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: Sequence[int], tag: int = 0) -> None:
        super().__init__(ranks, rows, counts, tag)
        self._parts: list[Tensor] = []  # by rank

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        works = [] if self._parts else self._ask()
        first, *others = self._order()
        yield first, self.rows
        with self.ranks._exchange():
            for work in works:
                work.wait()
        for rank in others:
            yield rank, self._parts[rank][: self.counts[rank]]

    def _ask(self) -> list[Any]:
        ranks, rows = self.ranks, self.rows
        if rows.device.type == "cpu":  # gloo's all-gather would fill a copy of all parts first
            self._parts = [self._empty(rank) for rank in range(ranks.size)]
            self._parts[ranks.rank] = rows
            peers = [peer for peer in range(ranks.size) if peer != ranks.rank]
            return ranks.move(
                [(dist.isend, rows, peer) for peer in peers]
                + [(dist.irecv, self._parts[peer], peer) for peer in peers],
                self.tag,
            )
        lacking = max(self.counts) - len(rows)
        sent = torch.cat([rows, rows.new_zeros(lacking, *rows.shape[1:])]) if lacking else rows
        everyones = sent.new_empty(ranks.size, *sent.shape)
        self._parts = list(everyones)
        if sent.numel() == 0:
            return []
        with ranks._exchange():
            return [_all_gather(everyones.view(-1), sent.view(-1), group=ranks.group, async_op=True)]

    def by_rank(self) -> list[Tensor]:
        return [rows for _, rows in sorted(self, key=lambda block: block[0])]


class _Ring(Blocks):
    """Each rank passes on what it has from the one before; two blocks are here at a time, beside its own."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        order, held, own = self._order(), self.rows, self.ranks.rank
        for rank, after in zip(order, [*order[1:], None], strict=True):
            works: list[Any] = []
            if after is not None:
                coming = self._empty(after)
                works = self.ranks.move([(dist.isend, held, own + 1), (dist.irecv, coming, own - 1)], self.tag)
            yield rank, held
            with self.ranks._exchange():
                for work in works:
                    work.wait()
            if after is not None:
                held = coming


@torch.no_grad()
def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """The rows [n, D] of all ranks of a group, in their order and without gradient; any n on each.

    None is all processes. A process alone has its own.
    """
    rows = rows.detach()
    name = _name_of(world() if group is None else group)
    if not name:
        return rows
    ranks = Ranks(name, "gather_rows")
    counts = ranks.agree([len(rows)], {"width": tuple(rows.shape[1:]), "dtype": rows.dtype}, rows.device)
    return ranks.gather_rows(rows, [count for (count,) in counts])


def check_gather_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed: expected False, for this build of torch has no torch.distributed")
