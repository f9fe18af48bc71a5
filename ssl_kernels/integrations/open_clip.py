"""The losses of this library in open_clip's own trainers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

from ssl_kernels.losses import ClipLoss, SigLipLoss


@contextmanager
def replaced_losses() -> Iterator[None]:
    """Inside this block, ``open_clip.create_loss(args)`` and ``open_clip.create_task(args, ...)`` build losses of this
    library.

    So does ``open_clip_train``, which calls them::

        from open_clip_train.main import main
        from ssl_kernels.integrations.open_clip import replaced_losses

        with replaced_losses():
            main(sys.argv[1:])

    The block replaces the names ``ClipLoss`` and ``SigLipLoss`` in ``open_clip.loss`` and in ``open_clip.factory``,
    which imports them. Other modules that imported them earlier keep open_clip's classes. This library has no losses of
    CoCa and of distillation, and building one inside the block is an error.

    Raises:
        ImportError: if open_clip is not installed, or does not have these names there.
        NotImplementedError: for CoCa and distillation.

    >>> import open_clip, ssl_kernels
    >>> from argparse import Namespace
    >>> from ssl_kernels.integrations.open_clip import replaced_losses
    >>> args = Namespace(model="ViT-B-16-SigLIP", distill=False, siglip=True, horovod=False)
    >>> args.rank, args.world_size, args.loss_dist_impl = 0, 1, None
    >>> with replaced_losses():
    ...     loss = open_clip.create_loss(args)
    >>> isinstance(loss, ssl_kernels.SigLipLoss)
    True
    """
    ours: dict[str, Any] = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}
    ours |= {name: _refusal(name) for name in ("CoCaLoss", "DistillClipLoss")}
    with ExitStack() as stack:
        for module in map(importlib.import_module, ("open_clip.loss", "open_clip.factory")):
            for name, loss in ours.items():
                if not hasattr(module, name):
                    raise ImportError(f"{module.__name__} has no {name}: this version of open_clip is not supported")
                stack.enter_context(patch.object(module, name, loss))
        yield


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: not in ssl_kernels; build open_clip's outside of replaced_losses()")

    return refuse
