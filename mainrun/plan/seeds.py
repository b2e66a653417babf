"""Derive seeds from names and numbers, so that they do not depend on earlier random numbers."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """Return a 63-bit seed that is a hash of its parts, for example of the seed of a run and a step."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
