"""What the commands that use a run have in common: options, progress, and one clear line for what goes wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from ssl_kernels.trainers.data.text_files import check_encoding
from ssl_kernels.trainers.errors import UserError, one_line
from ssl_kernels.trainers.ranges import at_least, require


class Checked(Protocol):
    """Options that can refuse their values."""

    def check(self) -> None: ...


Options = TypeVar("Options", bound=Checked)


@dataclass(kw_only=True)
class UseConfig:
    """The options that all of them have."""

    run: Positional[Path]
    """Folder of a run, or one of its checkpoints."""
    device: str = "auto"
    """Device to compute on, such as `cpu` or `cuda`; `auto` takes an accelerator if there is one."""
    batch_size: int = 256
    """Images or texts that go through the networks at a time."""
    workers: int = 4
    """Threads that read and decode images."""
    on_error: Literal["skip", "stop"] = "skip"
    """What an image that cannot be read does: `skip` leaves it out and names it, `stop` ends the command."""

    def check(self) -> None:
        """Refuse values that cannot work."""
        require(self, at_least(1), "batch_size", "workers")


@dataclass(kw_only=True)
class ReadConfig(UseConfig):
    """The options of those that also read tables, lists and shards."""

    image_column: str = ""
    """Column of a table that holds the image's path, relative to the table; by default found by its usual names."""
    caption_column: str = ""
    """Column of a table that holds the caption; by default found by its usual names."""
    encoding: str = "utf-8"
    """Encoding of a table or list that does not begin with a mark of its own, or of captions in shards, such as
    latin-1."""

    def check(self) -> None:
        super().check()
        check_encoding(self.encoding)


def run(kind: type[Options], work: Callable[[Options, Console], None], argv: Sequence[str] | None, prog: str) -> int:
    """Parse the arguments into a `kind`, do the work, and return the exit code."""
    try:
        named = (tyro.conf.PositionalMetavarFromFieldName,)  # RUN and DATA in the help
        options = tyro.cli(kind, args=sys.argv[1:] if argv is None else argv, prog=prog, config=named)
        options.check()
        work(options, Console(width=None if sys.stdout.isatty() else 150))
    except UserError as error:
        return _fail(prog, one_line(error))
    except OSError as error:  # a full disk, a folder that may not be written to
        return _fail(prog, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def progress(console: Console, what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; calling what is returned moves it on by so many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


def say_left_out(console: Console, left_out: Sequence[tuple[str, str]], total: int, most: int = 5) -> None:
    """Name what could not be read, if anything could not."""
    if not left_out:
        return
    console.print(f"left out {len(left_out)} of {total}, which cannot be read:", highlight=False)
    for name, reason in left_out[:most]:
        console.print(f"  {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if len(left_out) > most:
        console.print(f"  and {len(left_out) - most} more", highlight=False)
