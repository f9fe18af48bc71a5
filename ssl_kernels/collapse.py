"""Warnings when features collapse, which the loss alone does not show."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

import ssl_kernels.functional as K


class CollapseWarning(UserWarning):
    """The output of a network no longer depends on the sample."""


class CollapseMonitor:
    r"""Watches a teacher's probabilities p = softmax((T - c) / tau) and warns when they collapse.

    They collapse in one of two ways. Either every p is uniform, and the loss stays at ln K. Or p is the same for every
    sample, often a single prototype, and the loss is about 0. A healthy run may have a loss near these values as well,
    so the monitor looks at entropies: the entropy of the mean p exceeds the mean entropy of p by the information that p
    carries about the sample.

    Args:
        out_dim: number of prototypes K.
        max_rows: how many rows a call looks at, spread evenly over those it is given. A softmax over 64 x 65,536 logits
            is small beside a training step. The marginal entropy cannot exceed the mean entropy by more than the
            logarithm of this number.
        tolerance: a share of ln K. A mean entropy within this of ln K counts as uniform, and two entropies within this
            of each other count as the same.
        patience: how many calls in a row must look collapsed before the warning; the first steps of a run may.

    Raises:
        ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    >>> import torch
    >>> from ssl_kernels.collapse import CollapseMonitor
    >>> monitor = CollapseMonitor(out_dim=4)
    >>> numbers = monitor(10 * torch.eye(4), loss=0.5, teacher_temp=1.0)
    >>> {name: round(value, 2) for name, value in numbers.items()}
    {'teacher_entropy': 0.0, 'marginal_entropy': 1.39, 'center_norm': 0.0, 'kl': 0.5}
    """

    def __init__(self, out_dim: int, max_rows: int = 64, tolerance: float = 0.01, patience: int = 5) -> None:
        for name, value, least in (("out_dim", out_dim, 2), ("max_rows", max_rows, 2), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 < tolerance < 0.5:
            raise ValueError(f"tolerance: expected a number in (0, 0.5), got {tolerance}")
        self.out_dim = out_dim
        self.max_rows = max_rows
        self.tolerance = tolerance
        self.patience = patience
        self._collapsed = {"uniform": 0, "constant": 0}  # calls in a row

    def __call__(
        self,
        teacher_logits: Tensor,
        loss: Tensor | float,
        teacher_temp: Tensor | float,
        center: Tensor | None = None,
    ) -> dict[str, float]:
        """The entropies of a step. The host waits for them, so call this only in steps that you log.

        Args:
            teacher_logits: [..., K], two rows at least.
            loss: the mean cross-entropy between these and the student, as DINO's loss gives it.
            teacher_temp, center: the values that the loss was given.

        Returns:
            ``teacher_entropy``, the mean entropy of p; ``marginal_entropy``, the entropy of the mean p;
            ``center_norm``; and ``kl``, the loss less the mean entropy: what the student can still learn. They are NaN
            where an input is, and then there is no warning.
        """
        if teacher_logits.dim() < 2 or teacher_logits.shape[-1] != self.out_dim:
            raise ValueError(f"teacher_logits: expected shape [..., {self.out_dim}], got {tuple(teacher_logits.shape)}")
        rows = teacher_logits.detach().flatten(0, -2)
        if rows.shape[0] < 2:
            raise ValueError(f"teacher_logits: expected at least 2 rows, got {rows.shape[0]}")
        with torch.no_grad():
            p = K.centered_softmax(rows[:: math.ceil(rows.shape[0] / self.max_rows)], teacher_temp, center)
            entropies = torch.stack([torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()])
            norm = torch.zeros(()) if center is None else center.detach().float().norm()
        within, marginal = entropies.tolist()
        numbers = {
            "teacher_entropy": within,
            "marginal_entropy": marginal,
            "center_norm": norm.item(),
            "kl": (loss.item() if isinstance(loss, Tensor) else loss) - within,
        }
        most = math.log(self.out_dim)
        uniform = within > (1 - self.tolerance) * most
        constant = not uniform and marginal - within < self.tolerance * most
        self._count("uniform", uniform, numbers, "every sample's is uniform")
        self._count("constant", constant, numbers, "every sample's is the same")
        return numbers

    def _count(self, kind: str, collapsed: bool, numbers: dict[str, float], what: str) -> None:
        """Warn when the patience is at its end, and not again before the output has recovered."""
        self._collapsed[kind] = self._collapsed[kind] + 1 if collapsed else 0
        if self._collapsed[kind] == self.patience:
            found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            warnings.warn(
                f"the teacher's output has collapsed: {what} ({found}; ln K = {math.log(self.out_dim):.4g}). "
                "Raise the teacher's momentum or its warm-up, or lower its temperature if uniform; "
                "check that the centre moves if constant",
                CollapseWarning,
                stacklevel=3,
            )


class SpreadMonitor:
    r"""Watches how far embeddings are spread over the sphere and warns when they have become the same for every sample.

    Contrastive losses show a collapse only as a loss that stays at the logarithm of the batch or of the queue. The
    spread shows it at once: the standard deviation of normalised embeddings [B, D] times :math:`\sqrt D`, which is 1
    where they are spread evenly and 0 where all are equal.

    Args:
        what: what has this spread, for the warning.
        tolerance: a spread below it counts as collapsed; 0.02 is a mean cosine of 0.9996 between samples.
        patience: how many calls in a row must look collapsed before the warning; the first steps of a run may.

    Raises:
        ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    >>> import warnings
    >>> from ssl_kernels.collapse import SpreadMonitor
    >>> monitor = SpreadMonitor(patience=2)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for spread in (0.9, 0.01, 0.005, 0.004):
    ...         monitor(spread)
    >>> print(caught[0].message)
    the embeddings have collapsed: every sample's is the same (spread 0.005). Lower the learning rate or lengthen its warm-up, and clip gradients
    >>> len(caught)
    1
    """  # noqa: E501

    def __init__(self, what: str = "the embeddings", tolerance: float = 0.02, patience: int = 5) -> None:
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance: expected a number in (0, 1), got {tolerance}")
        if patience < 1:
            raise ValueError(f"patience: expected at least 1, got {patience}")
        self.what, self.tolerance, self.patience = what, tolerance, patience
        self._collapsed = 0  # calls in a row

    def __call__(self, spread: float) -> None:
        """Take the spread of a step; warn when the patience is at its end, and not again before it has recovered."""
        self._collapsed = self._collapsed + 1 if spread < self.tolerance else 0
        if self._collapsed == self.patience:
            warnings.warn(
                f"{self.what} have collapsed: every sample's is the same (spread {spread:.2g}). Lower the learning rate"
                " or lengthen its warm-up, and clip gradients",
                CollapseWarning,
                stacklevel=2,
            )
