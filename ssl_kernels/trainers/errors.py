"""Errors that are the user's to fix: printed as one line, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A bad argument or bad input; the message names it, what came and what is expected."""


class NonFiniteError(UserError):
    """Training met a NaN or an infinity."""

    def __init__(self, step: int, term: str, checkpoint: str | None) -> None:
        self.step, self.term, self.checkpoint = step, term, checkpoint
        super().__init__(
            f"step {step}: {term} is not finite; {_rescue(checkpoint)}. Try a lower --lr, a longer --warmup or"
            " --precision 32-true."
        )


class LostRankError(UserError):
    """Another process of the run does not answer."""

    def __init__(self, step: int, lost: str, checkpoint: str | None) -> None:
        rescue = f"--resume {checkpoint} continues" if checkpoint else _rescue(None)
        super().__init__(f"step {step}: {lost}; {rescue}")


class StoppedRunError(UserError):
    """Training met an error of any other kind, its `__cause__`; what was learned until then is in `checkpoint`."""

    def __init__(self, step: int, cause: Exception, checkpoint: str | None) -> None:
        self.step, self.cause, self.checkpoint = step, cause, checkpoint
        place = "" if isinstance(cause, UserError) or not step else f"step {step}: "
        super().__init__(f"{place}{describe(cause)}; {_rescue(checkpoint)}")


class InterruptedRunError(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived; the checkpoint at `checkpoint` continues the run."""

    def __init__(self, signal_name: str, exit_code: int, checkpoint: str) -> None:
        self.signal_name, self.exit_code, self.checkpoint = signal_name, exit_code, checkpoint
        super().__init__(signal_name)


def _rescue(checkpoint: str | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"


def first_line(error: Exception) -> str:
    """Of an error's message; of one without a message its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: UserError) -> str:
    """The message alone: an error from a loader's worker process arrives wrapped in that process's traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def describe(error: Exception) -> str:
    """An error of any kind in one line: of the system's the file and the reason, of others the kind and the message."""
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    bare = isinstance(error, KeyError) or str(error) == str(error.args)  # whose text is a repr
    message = str(error.args[0]) if bare and error.args else str(error)
    lines = message.strip().splitlines()
    if "Original Traceback (most recent call last):" in lines:  # of a loader's worker process
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
