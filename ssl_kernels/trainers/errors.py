"""Errors that are the user's to fix: printed as one line, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A bad argument or bad input; the message names it, what came and what is expected."""


class NonFiniteError(UserError):
    """Training met a NaN or an infinity."""

    def __init__(self, step: int, term: str, checkpoint: str | None) -> None:
        self.step, self.term, self.checkpoint = step, term, checkpoint
        rescue = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        super().__init__(
            f"step {step}: {term} is not finite; {rescue}. Try a lower --lr, a longer --warmup or --precision 32-true."
        )


class LostRankError(UserError):
    """Another process of the run does not answer."""

    def __init__(self, step: int, lost: str, checkpoint: str | None) -> None:
        rescue = f"--resume {checkpoint} continues" if checkpoint else "no checkpoint had been written yet"
        super().__init__(f"step {step}: {lost}; {rescue}")


class InterruptedRunError(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint at `checkpoint` continues the run."""

    def __init__(self, signal_name: str, exit_code: int, checkpoint: str) -> None:
        self.signal_name, self.exit_code, self.checkpoint = signal_name, exit_code, checkpoint
        super().__init__(signal_name)


def one_line(error: UserError) -> str:
    """The message alone: an error from a loader's worker process arrives wrapped in that process's traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
