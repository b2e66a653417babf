"""Derive random seeds from names and numbers, so that no seed depends on earlier random numbers."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """Return a 63-bit hash of all arguments, for example of the run's seed and a step number."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
