"""The moving average of timm, argument for argument."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.ema import ModelEma


class ModelEmaV3(ModelEma):
    r"""Replaces ``timm.utils.ModelEmaV3``, an average of parameters and buffers whose decay can warm up.

    .. math:: d_{\mathrm{step}} = \min\left(d,\ 1 - (1 + n / \gamma)^{-p}\right), \qquad
              n = \mathrm{step} - \mathrm{update\_after\_step} - 1 > 0

    Checkpoints are timm's, and load both ways. As in those of its ``CheckpointSaver``, the names are those of the model
    inside ``torch.compile``, DataParallel or DistributedDataParallel; a checkpoint of timm's average of a wrapped model
    loads too. Unlike timm's class, this one averages a tied parameter once, not once for each of its names, copies
    buffers outside of ``state_dict``, and refuses a model whose parameters have other names or shapes.

    Args:
        model: the model to follow; the copy is put into ``eval()``.
        decay: d in [0, 1]; :class:`ssl_kernels.ModelEma` calls it momentum.
        min_decay: the smallest decay during a warm-up.
        update_after_step: until the step after this one, the average is a copy of the model.
        use_warmup, warmup_gamma, warmup_power: whether and how the decay warms up; the :math:`\gamma` and p above.
        device: the device of the average, by default the model's.
        dtype: the dtype of the average, by default the model's.
        stochastic_rounding: round an average in bfloat16 at random, as timm does, so that steps which are smaller than
            its rounding add up in expectation. ``dtype=torch.float32`` is faster, and exact.
        stochastic_rounding_seed: the seed of its random generator.
        foreach: accepted and ignored; one call updates all tensors.
        exclude_buffers: True copies buffers instead of averaging them.

    Raises:
        ValueError: if a decay is outside of [0, 1], or if the model no longer has the copy's names and shapes.

    >>> import torch
    >>> from ssl_kernels.integrations.timm import ModelEmaV3
    >>> model = torch.nn.Linear(2, 2)
    >>> average = ModelEmaV3(model, decay=0.99, use_warmup=True, warmup_power=1.0)
    >>> [round(average.get_decay(step), 3) for step in (0, 1, 2, 10, 1000)]
    [0.0, 0.0, 0.5, 0.9, 0.99]
    >>> average.update(model, step=10)
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__(model, decay, dtype=dtype)
        self.module.eval().to(device=device)
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.foreach = foreach
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.exclude_buffers = exclude_buffers
        device = next((parameter.device for parameter in self.module.parameters()), None)
        self._generator = torch.Generator(device or "cpu").manual_seed(stochastic_rounding_seed)

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update at ``step``. Without a step, it is the decay after the warm-up."""
        if step is None:
            return self.decay
        updates = step - self.update_after_step - 1
        if updates <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        return max(min(1 - (1 + updates / self.warmup_gamma) ** -self.warmup_power, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:  # type: ignore[override]
        """Move the average towards ``model``, with the decay of ``step``."""
        decay = self.get_decay(step)
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move parameters and buffers of the average towards those of ``model``."""
        self._follow(model, decay, None, average_buffers=True)

    @torch.no_grad()
    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Move parameters of the average towards those of ``model``, and copy its buffers."""
        self._follow(model, decay, None, average_buffers=False)

    def set(self, model: nn.Module) -> None:
        """Make the average equal to ``model``."""
        self.apply_update_(model, 0.0)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, exclude_buffers={self.exclude_buffers}"

    def _average(
        self, targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor, copies: list[Tensor | None]
    ) -> None:
        at_random = [self.stochastic_rounding and target.dtype == torch.bfloat16 for target in targets]
        rest = [i for i, random in enumerate(at_random) if not random]
        super()._average([targets[i] for i in rest], [sources[i] for i in rest], momentum, [copies[i] for i in rest])
        for target, source, random in zip(targets, sources, at_random, strict=True):
            if random:
                wide = target.float()
                K.ema_update_([wide], [source], momentum)
                target.copy_(_round_at_random(wide, self._generator))


def _round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with a probability of the fraction that is dropped, so that the mean is x."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.view(torch.int32).add(noise).bitwise_and_(-(2**16))
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()
