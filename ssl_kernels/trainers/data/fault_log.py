"""What was left out of the data, as a run tells it: on the console, and in a file of its folder."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Fault, Faults
from ssl_kernels.trainers.processes import everyones

LEFT_OUT = "left_out.jsonl"  # of a run's folder: a line to each fault
_SHOWN = 10  # faults that are named on the console as they are found


class FaultLog:
    """Names what is left out as it is found, on the console, and all of it in a file of the run's folder.

    A run that is resumed knows what it had written there. Around what may end the run, it writes what is new by then.
    """

    def __init__(
        self, faults: Faults, folder: Path, console: Console, *, resume: Path | None = None, writes: bool = True
    ) -> None:
        self.faults, self.path, self.console, self.writes = faults, folder / LEFT_OUT, console, writes
        known = read_faults(resume if resume.is_dir() else resume.parent) if resume and writes else []
        for fault in map(faults.named, everyones(known, "what was left out")):
            faults.found.setdefault(fault.name, fault)
        self.told = len(faults)  # what is known by now is told with the data
        self.named = 0  # on the console
        self.written: int | None = None  # in the file, which may yet be another run's

    def __enter__(self) -> FaultLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.written is not None:
            self.tell()

    def tell(self, step: int = 0) -> None:
        """Name what is new, once the folder is this run's."""
        if not self.writes or self.written == len(self.faults):
            return
        faults = list(self.faults)
        for fault in faults[self.told :]:
            self.named += 1
            if self.named <= _SHOWN:
                self._print(f"left out: {fault.where}: {fault.reason}")
            elif self.named == _SHOWN + 1:
                self._print(f"left out: more, which {self.path} names")
        self.told = len(faults)
        try:
            self._write(faults)
        except OSError as error:  # a full disk ends the run where it matters
            self._print(f"cannot write {self.path}: {error.strerror}")
        self.written = len(faults)

    def _write(self, faults: list[Fault]) -> None:
        if not faults:
            self.path.unlink(missing_ok=True)
            return
        with open(self.path, "w" if self.written is None else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(fault._asdict()) + "\n" for fault in faults[self.written or 0 :])

    def sum_up(self) -> None:
        """Say at the end of a run how much of what was left out."""
        self.tell()
        if self.writes and self.faults:
            uses = ((self.faults.lost(of), of) for of in (TRAINING, EVALUATION))
            counts = " and ".join(f"{count:,} {of}" for count, of in uses if count)
            self._print(f"left out: {counts} examples, which {self.path} names")
            for line in self.faults.lines():
                self._print(f"  {line}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def read_faults(folder: Path) -> list[Fault]:
    """What a run has written of its faults; a last line that a kill cut short is left out."""
    path, faults = folder / LEFT_OUT, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            faults.append(Fault(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return faults
