"""The names of shards: in a folder, by a pattern, or as streams."""

from __future__ import annotations

import glob
import os

import webdataset as wds

from ssl_kernels.trainers.data.faults import place
from ssl_kernels.trainers.errors import UserError

ENDINGS = (".tar", ".tgz", ".tar.gz")
_SCHEMES = ("http://", "https://", "gs://")  # that webdataset opens by programs such as curl


def is_shards(name: str) -> bool:
    """Whether the name is one of shards: of files, by a pattern; of a folder that has some; or of a stream."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return bool(_in_folder(path))
    is_url = "://" in name and any(ending in name.lower() for ending in ENDINGS)
    return name.startswith("pipe:") or is_url or name.lower().endswith(ENDINGS)


def _in_folder(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.path for e in entries if e.name.lower().endswith(ENDINGS) and not e.name.startswith("."))


def expand(name: str, flag: str = "--data") -> list[str]:
    """The shards of a folder, a glob or a pattern such as "shards-{000..099}.tar"; local ones must exist."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _in_folder(path)
    try:
        every = [name] if name.startswith("pipe:") else wds.shardlists.expand_urls(path)
    except ValueError as error:  # braces that do not close
        raise UserError(f"{flag}: {name}: {error}") from None
    names: list[str] = []
    for each in every:
        if each.startswith(("pipe:", *_SCHEMES)):
            names.append(each)
        elif "://" in each:
            raise UserError(
                f"{flag}: cannot read {each}: expected a file, one of {', '.join(_SCHEMES)}, or pipe:COMMAND,"
                " such as pipe:aws s3 cp s3://bucket/0.tar -"
            )
        else:
            names += _files(each, flag)
    return names


def _files(name: str, flag: str) -> list[str]:
    found = [name] if os.path.lexists(name) else sorted(glob.glob(name))
    if not found and glob.has_magic(name):
        raise UserError(f"{flag}: no shard is named like {name}")
    for each in found or [name]:
        try:
            open(each, "rb").close()
        except OSError as error:
            raise UserError(f"{flag}: cannot read the shard {place(each)}: {error.strerror}") from None
    return found
