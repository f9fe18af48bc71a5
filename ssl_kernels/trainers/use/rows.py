"""Rows of vectors on their way to a file, so that a kill loses no more than the last batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.embedding import Part
from ssl_kernels.trainers.use.items import LeftOut


class Rows:
    """The rows so far: fp32 in a file beside `out`, and in a second one, a line to each batch, what they are of.

    A batch's line is written after its rows, so that rows without one are of a batch that a kill cut short: they are
    made again. Rows of another `header`, of other data or another model, are thrown away.
    """

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self.raw, self.index = (out.with_name(f".{out.name}.{kind}") for kind in ("rows", "index"))
        self.header = json.dumps(header, sort_keys=True)
        self.names: list[str] = []
        self.left_out: LeftOut = []
        self.width = self.read = 0  # numbers in a row; items that were read
        self._files: tuple[BinaryIO, TextIO] | None = None

    def __enter__(self) -> Rows:
        lines = self._find()
        self.raw.touch()
        raw = open(self.raw, "rb+")
        raw.truncate(len(self.names) * self.width * 4)
        raw.seek(0, 2)
        kept = "".join(f"{line}\n" for line in (self.header, *lines))
        write_atomically(self.index, lambda path: path.write_text(kept, encoding="utf-8"))
        index = open(self.index, "a", encoding="utf-8")
        self._files = raw, index
        return self

    def __exit__(self, *_: object) -> None:
        assert self._files is not None
        for file in self._files:
            file.close()

    def _find(self) -> list[str]:
        """What an earlier run has left: lines that are whole and whose rows are there."""
        try:
            lines = self.index.read_text(encoding="utf-8").split("\n")[:-1]  # the last is empty or cut short
            size = self.raw.stat().st_size
        except (OSError, UnicodeDecodeError):
            return []
        if not lines or lines[0] != self.header:
            return []
        good = []
        for line in lines[1:]:
            batch = json.loads(line)
            if (len(self.names) + len(batch["names"])) * batch["width"] * 4 > size:
                break
            self._count(batch)
            good.append(line)
        return good

    def _count(self, batch: dict[str, Any]) -> None:
        self.names += batch["names"]
        self.left_out += [(name, reason) for name, reason in batch["left_out"]]
        self.width = self.width or batch["width"]
        self.read += batch["read"]

    def append(self, part: Part) -> None:
        """Keep the rows of a batch."""
        assert self._files is not None
        raw, index = self._files
        raw.write(part.vectors.numpy().astype("<f4").tobytes())
        raw.flush()
        width = part.vectors.shape[1]
        batch = {"names": part.names, "left_out": part.left_out, "read": part.read, "width": width}
        index.write(json.dumps(batch) + "\n")
        index.flush()
        self._count(batch)

    def array(self) -> np.ndarray:
        """All rows [n, D], read from the file as they are needed."""
        return np.memmap(self.raw, dtype="<f4", mode="r", shape=(len(self.names), self.width))


def write_result(out: Path, rows: Rows, kind: str, run: str, method: str) -> list[Path]:
    """The result, whole or not at all, and its names; what was kept on the way goes. `kind` is `path` or `caption`."""
    written = [out]
    if out.suffix == ".parquet":
        write_atomically(out, lambda path: _write_parquet(path, rows, kind))
    else:
        about = {"run": run, "method": method, "shape": [len(rows.names), rows.width], f"{kind}s": rows.names}
        beside = out.with_suffix(".json")
        write_atomically(beside, lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))
        write_atomically(out, lambda path: _write_npy(path, rows))
        written.append(beside)
    rows.raw.unlink()
    rows.index.unlink()
    return written


def _write_npy(path: Path, rows: Rows) -> None:
    with open(path, "wb") as file:  # np.save would add an ending to the name
        np.save(file, rows.array())


def _write_parquet(path: Path, rows: Rows, kind: str, most: int = 10_000) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("--out: a .parquet file needs the package pyarrow; install: pip install pyarrow") from None
    schema = pa.schema([(kind, pa.string()), ("embedding", pa.list_(pa.float32(), rows.width))])
    array = rows.array()
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(array), most):
            part = np.ascontiguousarray(array[start : start + most])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), rows.width)
            writer.write_table(
                pa.table([pa.array(map(_printable, rows.names[start : start + most])), vectors], schema=schema)
            )


def _printable(name: str) -> str:
    """A file's name may be no UTF-8, which Parquet asks for."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
