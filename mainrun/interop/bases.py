"""The names of the checkpoints that runs start from. This module does not import torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

# a folder in the cache of huggingface_hub
CACHED = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


class Base(NamedTuple):
    """A checkpoint that a run starts from."""

    name: str  # a name on the hub, or a folder
    revision: str | None  # the commit of a checkpoint on the hub


def find_base(folder: Path, published: bool) -> Base:
    """Return the name of a checkpoint: its name on the hub if it comes from the hub, or else its folder.

    published: whether to name only the last part of a folder, because other people will read the name.
    """
    cached = CACHED.search(folder.as_posix())
    if cached:
        return Base(cached["name"].replace("--", "/", 1), cached["commit"])
    if published:
        return Base(folder.name, None)
    return Base(str(folder), None)
