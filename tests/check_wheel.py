"""What the installed package must do in an environment of its own: load, and give the reference's loss and gradients.

    python check_wheel.py

needs nothing but the package, and is run from outside of the checkout.
"""

from __future__ import annotations

from pathlib import Path

import torch

import ssl_kernels
from ssl_kernels import info


def gradients(backend: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 32, generator=generator).requires_grad_() for _ in range(2))
    with ssl_kernels.use_backend(backend):
        loss = ssl_kernels.functional.sigmoid_contrastive_loss(x, y, torch.tensor(0.5), torch.tensor(-1.0))
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def main() -> None:
    info.main()
    assert Path(ssl_kernels.__file__).parents[1] != Path(__file__).parents[1], "this is the checkout, not the package"
    torch.testing.assert_close(gradients("cpu"), gradients("reference"))
    print(f"loss and gradients of {ssl_kernels.__file__} are those of the reference")


if __name__ == "__main__":
    main()
