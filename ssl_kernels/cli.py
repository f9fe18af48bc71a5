"""The `ssl-kernels` command: train a model, check data, compare runs, measure the losses, or say what is installed.

Only trainers and what they wrote need the `train` extra. A command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

from ssl_kernels import __version__, _interrupt

TRAINERS = {
    "clip": "image-text pretraining with the softmax loss; with a locked image tower LiT and dino.txt",
    "dino": "images without labels, by self-distillation; with masked patches for vision transformers (v2)",
    "moco": "images without labels, by momentum contrast: against a queue (v2) or within the batch (v3)",
    "siglip": "image-text pretraining with the sigmoid loss",
    "simclr": "images without labels, by contrast within the batch",
}

USES = {
    "embed": "the embeddings of images or captions, in a file",
    "search": "the images that lie nearest to a text or to an image",
    "classify": "which of some labels fits each image",
    "probe": "k-NN, linear probe and few labels on a labelled folder",
    "finetune": "train a classifier on top, by a labelled folder",
    "export": "the model for timm, ONNX, torch.export, open_clip and transformers",
}

_USAGE = """\
usage: ssl-kernels COMMAND ...

  ssl-kernels train TRAINER [OPTIONS]   train a model; --help after the trainer lists its options
{trainers}
  ssl-kernels check DATA                read all images and captions of a table, a folder or shards; report bad ones
  ssl-kernels compare RUN [RUN ...]     the figures of finished runs, such as those of several seeds, in one table
{uses}
  ssl-kernels bench [OP ...]            time and memory of the losses here, beside the peers that are installed
  ssl-kernels info                      versions, instruction set and the backend of each op
  ssl-kernels --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = _USAGE.format(
        trainers="\n".join(f"{'':14}TRAINER = {name:<12}{what}" for name, what in TRAINERS.items()),
        uses="\n".join(f"  ssl-kernels {name + ' RUN ...':<26}{what}" for name, what in USES.items()),
    )
    if arguments in ([], ["-h"], ["--help"], ["train", "-h"], ["train", "--help"]):
        print(usage, end="")
        return 0 if arguments else 2
    if arguments in (["-V"], ["--version"]):
        print(f"ssl_kernels {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(f"expected one of the commands {', '.join(COMMANDS)}, got {command!r}")
    if command != "train":
        _interrupt.over()
    try:
        return COMMANDS[command](rest)
    except KeyboardInterrupt:
        print(f"ssl-kernels {command}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        if "ssl_kernels.trainers: missing" not in str(error):  # not a missing extra: a bug, whose traceback helps
            raise
        return _fail(str(error))


def train(argv: Sequence[str]) -> int:
    """Run the trainer `ssl_kernels.trainers.<name>` that the first argument names."""
    if not argv or argv[0] not in TRAINERS:
        got = f"got {argv[0]!r}" if argv else "got none"
        return _fail(f"train: expected one of the trainers {', '.join(TRAINERS)}, {got}")
    trainer = importlib.import_module(f"ssl_kernels.trainers.{argv[0]}")
    code: int = trainer.main(argv[1:], prog=f"ssl-kernels train {argv[0]}")
    return code


def check(argv: Sequence[str]) -> int:
    """Read all of the data that the arguments name and report what is bad or odd."""
    from ssl_kernels.trainers import check as checking

    return checking.main(argv)


def compare(folders: Sequence[str]) -> int:
    """Print the figures of the runs in these folders."""
    if folders and folders[0] in ("-h", "--help"):
        print("usage: ssl-kernels compare RUN [RUN ...]\n\nPrint the figures of finished runs, folders, in one table.")
        return 0
    if not folders:
        return _fail("compare: expected the folders of runs, got none")
    from ssl_kernels.trainers.errors import UserError
    from ssl_kernels.trainers.evaluation import compare as comparison

    try:
        comparison.main(folders)
    except UserError as error:
        return _fail(f"compare: {error}")
    return 0


def use(name: str) -> Callable[[Sequence[str]], int]:
    """The command that `ssl_kernels.trainers.use.<name>` has for a run."""

    def command(argv: Sequence[str]) -> int:
        code: int = importlib.import_module(f"ssl_kernels.trainers.use.{name}").main(argv, prog=f"ssl-kernels {name}")
        return code

    return command


def info(_: Sequence[str]) -> int:
    """Print what is installed."""
    from ssl_kernels import info

    info.main()
    return 0


def bench(argv: Sequence[str]) -> int:
    """Measure the losses on this machine."""
    missing = [name for name in ("pytest", "pytest_benchmark", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        advice = 'install the extra "bench": pip install ".[bench]" in the checkout'
        return _fail(f"bench: missing {', '.join(missing)}; {advice}")
    from ssl_kernels.bench import command

    return command.main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "check": check, "compare": compare, **{name: use(name) for name in USES}, "bench": bench,
    "info": info,
}  # fmt: skip


def _fail(message: str) -> int:
    print(f"ssl-kernels: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
