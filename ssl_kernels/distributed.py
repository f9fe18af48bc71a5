"""Batches that several processes of ``torch.distributed`` hold together.

Each of the W ranks of a group holds some rows of a batch, in the order of the ranks; their numbers may differ. A loss
over the group is the loss of one process that has all rows, and so are its gradients. Features travel between the
ranks, in their own dtype; gradients never do. The same run on as many ranks gives the same bits, in whatever order
messages arrive.

The losses that take a group have these arguments in common:

* ``group``: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension such as ``mesh["dp"]``.
* ``strategy``: ``"gather"`` collects the features of all ranks at once. ``"ring"`` passes them from rank to rank while
  the block before is computed, and holds two blocks at a time. ``"auto"`` gathers as long as the features of a side, of
  all ranks, take at most 1 GiB.
* ``grad_reduce``: with ``"mean"``, the mean of the ranks' gradients is the gradient of the loss. This is what
  ``DistributedDataParallel`` and FSDP compute; the gradients of a rank's features are therefore W times larger than in
  one process. Use ``"sum"`` for trainers that add gradients.
* ``even_batches``: True promises that all ranks call alike and have equal numbers of rows. This saves an exchange
  before features travel, which CUDA graphs do not record. If the promise is broken, what happens depends on the
  backend, which may end the process.
* ``own_share``: True returns this rank's share of the loss, whose mean over the ranks is the loss, instead of the loss.

Scales, temperatures, biases and the upstream gradient must be equal on all ranks; they are not compared. If the ranks'
calls differ in anything else, the call raises on all of them. If a rank does not answer, the others raise, at the
latest after the timeout of the group, and name it. This takes gloo, which carries the exchange before features if the
group has it for CPU tensors (``init_process_group()`` or ``"cpu:gloo,cuda:nccl"``). NCCL ends the process by its own
watchdog.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
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
_TAG = 0x55C0  # of messages, which must not meet those of a trainer
_REPORT_S = 10.0  # how long a rank that met an error waits for the others to say the same

# Its name since torch 2.14, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Across(NamedTuple):
    """The processes that hold a batch, and how they exchange it. These fields are among the arguments of an op."""

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
    """The process group of a mesh; None for None. This process must be in it."""
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
        """Exchange numbers that may differ between ranks, and check that the facts are the same on all of them.

        Raises:
            ValueError: on all ranks, with the first fact in which they differ, and which ranks say what.
        """
        text = json.dumps({"function": self.what, **facts}, default=str).encode()
        if len(text) > _FACTS_BYTES:
            raise ValueError(f"{self.what}: expected facts of at most {_FACTS_BYTES} bytes, got {text!r}")
        told = torch.zeros(8 * _NUMBERS + _FACTS_BYTES, dtype=torch.uint8, device="cpu")
        told[: 8 * len(own)] = torch.tensor(own, dtype=torch.int64, device="cpu").view(torch.uint8)
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
        return _Gathered(self, rows, counts, _TAG).whole()

    def blocks(self, rows: Tensor, counts: Sequence[int], strategy: str, side: int = 0) -> Blocks:
        """To be visited as often as need be, by all ranks alike; ``side`` tells apart what is visited at a time."""
        if self.backend(rows.device) == "gloo" and rows.device.type != "cpu":
            strategy = "gather"  # by way of the CPU
        if strategy == "auto":
            row_bytes = rows.shape[1:].numel() * rows.dtype.itemsize
            strategy = "gather" if sum(counts) * row_bytes <= GATHER_BYTES else "ring"
        kind = _Gathered if strategy == "gather" else _Ring
        return kind(self, rows, counts, _TAG + 1 + side)

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
            raise RuntimeError(f"{self.what}: {self.missing()}: {error}") from error

    def missing(self) -> str:
        """Ranks that do not report an error, too. The store that all have in common may be gone, or not answer."""
        everyone = dist.get_process_group_ranks(self.group)
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._ask_store(everyone)), daemon=True)
        asking.start()
        asking.join(_REPORT_S + 5)
        if found and found[0]:
            return found[0]
        host = "rank 0, unless torchrun holds it"
        return (
            f"a rank of {_ranks(everyone)} did not answer, nor does the store that they share: {host}, is stuck or gone"
        )

    def _ask_store(self, everyone: Sequence[int]) -> str:
        """Empty if it does not answer."""
        key = f"ssl_kernels/failure {next(_failures)} of rank {{}}"  # of which earlier ones are no sign
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(key.format(dist.get_rank()), f"{self.what} over {_ranks(everyone)}")
            until, silent = time.monotonic() + _REPORT_S, everyone
            while silent and time.monotonic() < until:
                silent = [rank for rank in silent if not store.check([key.format(rank)])]
                time.sleep(0.05)
            calls = {rank: store.get(key.format(rank)).decode() for rank in everyone if rank not in silent}
        except (RuntimeError, OSError):
            return ""
        if silent:
            return f"{_ranks(silent)} did not answer, having ended, or being stuck or elsewhere"
        if len(set(calls.values())) > 1:
            return "ranks met in different calls: " + "; ".join(f"rank {rank}: {call}" for rank, call in calls.items())
        return f"an exchange between {_ranks(everyone)} failed on all of them"


_failures = itertools.count(1)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class Blocks:
    """The rows of all ranks, in blocks; those of this rank first. Each iteration visits them again, on all ranks."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: Sequence[int], tag: int) -> None:
        self.ranks, self.counts, self.tag = ranks, counts, tag
        self.rows = rows.detach().contiguous()
        self.start = self._first(ranks.rank)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The place of the first row of a block among all rows, and the block, perhaps of no rows."""
        raise NotImplementedError

    def _first(self, rank: int) -> int:
        return sum(self.counts[:rank])

    def _empty(self, count: int) -> Tensor:
        return self.rows.new_empty(count, *self.rows.shape[1:])


class _Gathered(Blocks):
    """Those of others arrive while the first block is looked at, and stay: one block after it, one before it."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: Sequence[int], tag: int) -> None:
        super().__init__(ranks, rows, counts, tag)
        self._all: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        works: list[Any] = []
        if self._all is None:
            self._all, works = self._ask()
        yield self.start, self.rows
        with self.ranks._exchange():
            for work in works:
                work.wait()
        end = self.start + len(self.rows)
        yield end, self._all[end:]
        yield 0, self._all[: self.start]

    def whole(self) -> Tensor:
        """All rows, in the order of the ranks."""
        for _ in self:
            pass
        assert self._all is not None
        self._all[self.start :][: len(self.rows)] = self.rows
        return self._all

    def _ask(self) -> tuple[Tensor, list[Any]]:
        ranks, rows = self.ranks, self.rows
        on_cpu = rows.device.type == "cpu"
        if ranks.backend(rows.device) == "gloo" and not on_cpu:  # it sends what is on a CPU only
            return _Gathered(ranks, rows.cpu(), self.counts, self.tag).whole().to(rows.device), []
        everyones = self._empty(sum(self.counts))
        if not on_cpu and len(set(self.counts)) == 1 and rows.numel():
            with ranks._exchange():
                work = _all_gather(everyones.view(-1), rows.view(-1), group=ranks.group, async_op=True)
            return everyones, [work]
        # One by one, for any numbers of rows; and gloo's all-gather would fill a copy of all of them first.
        peers = [peer for peer in range(ranks.size) if peer != ranks.rank]
        parts = everyones.split(list(self.counts))
        sends = [(dist.isend, rows, peer) for peer in peers]
        return everyones, ranks.move(sends + [(dist.irecv, parts[peer], peer) for peer in peers], self.tag)


class _Ring(Blocks):
    """Each rank passes on what it has from the one before; two blocks are here at a time, beside its own."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        own, size = self.ranks.rank, self.ranks.size
        held = self.rows
        for step in range(size):
            works: list[Any] = []
            if step + 1 < size:
                coming = self._empty(self.counts[(own - step - 1) % size])
                works = self.ranks.move([(dist.isend, held, own + 1), (dist.irecv, coming, own - 1)], self.tag)
            yield self._first((own - step) % size), held
            with self.ranks._exchange():
                for work in works:
                    work.wait()
            held = coming if step + 1 < size else held


@torch.no_grad()
def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """The rows [n, D] of all ranks of a group, in the order of the ranks and without gradient. Each rank may have any
    n.

    A group of None means all processes. In a single process these are its own rows.
    """
    rows = rows.detach()
    name = _name_of(world() if group is None else group)
    if not name:
        return rows
    ranks = Ranks(name, "gather_rows")
    counts = ranks.agree([len(rows)], {"width": tuple(rows.shape[1:]), "dtype": rows.dtype}, rows.device)
    return ranks.gather_rows(rows, [count for (count,) in counts])
