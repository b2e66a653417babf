"""The C library's memory, tuned for a training loop. No torch in here: it is best done before torch allocates anything."""

from __future__ import annotations

import ctypes
import os
import platform


def tune_allocator() -> str:
    """Let glibc keep a step's memory for the next one: else each step maps its large tensors anew, page by page. No bit changes.

    Says what is in use. MAINRUN_ALLOCATOR=default leaves the C library as it is; others than glibc have no such settings.
    """
    if os.environ.get("MAINRUN_ALLOCATOR") == "default":
        return "default (MAINRUN_ALLOCATOR)"
    library, version = platform.libc_ver()
    if library != "glibc":
        return f"default ({library or 'this C library'} cannot be tuned)"
    mallopt = ctypes.CDLL(None).mallopt
    # mmap_max 0 and trim_threshold -1: nothing is given back; top_pad: the heap grows in large steps; arena_max: and is one
    settings = {"mmap_max": (-4, 0), "trim_threshold": (-1, -1), "top_pad": (-2, 64 << 20), "arena_max": (-8, 1)}
    refused = [name for name, (number, value) in settings.items() if not mallopt(number, value)]
    return f"glibc {version}, tuned" + (f" but for {', '.join(refused)}" if refused else "")
