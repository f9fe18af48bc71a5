"""Schedules of momentum teachers, as functions of the step."""

from __future__ import annotations

import math

from ssl_kernels.ops._checks import check_fraction


def cosine_momentum(step: int, total: int, base: float, final: float = 1.0) -> float:
    r"""The momentum of a teacher that follows more and more slowly, along a cosine: :math:`m_1 - (m_1 - m_0)\,\frac{1 +
    \cos(\pi\, \mathrm{step} / \mathrm{total})}{2}`.

    Args:
        step: the number of optimizer steps done. From ``total`` on, the momentum stays at ``final``.
        total: the number of optimizer steps of the whole training, at least 1.
        base: m_0 in [0, 1], the momentum of step 0.
        final: m_1 in [0, 1], the momentum of step ``total``.

    Raises:
        ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    Source: Grill et al., Bootstrap Your Own Latent, 2020, arXiv:2006.07733.

    >>> from ssl_kernels.schedules import cosine_momentum
    >>> [round(cosine_momentum(step, 100, 0.996), 4) for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    check_fraction("base", base)
    check_fraction("final", final)
    return final - (final - base) * (1 + math.cos(math.pi * _progress("total", step, total, least=1))) / 2


def linear_warmup(step: int, steps: int, start: float, end: float) -> float:
    r"""From ``start`` at step 0 to ``end`` at step ``steps`` in equal steps, and ``end`` from then on.

    DINO warms up its teacher's temperature in this way, from 0.04 to 0.07 over 30 epochs.

    Args:
        step: the number of steps, or epochs, done.
        steps: how many of them the warm-up takes; 0 for no warm-up.
        start, end: any two numbers.

    Raises:
        ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> from ssl_kernels.schedules import linear_warmup
    >>> [round(linear_warmup(epoch, 30, 0.04, 0.07), 3) for epoch in (0, 10, 30, 100)]
    [0.04, 0.05, 0.07, 0.07]
    """
    done = _progress("steps", step, steps)
    return start + (end - start) * done if done < 1 else end


def _progress(name: str, step: int, steps: int, least: int = 0) -> float:
    if not steps >= least:
        raise ValueError(f"{name}: expected at least {least}, got {steps}")
    if not step >= 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    return step / steps if step < steps else 1.0
