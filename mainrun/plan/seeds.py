"""Seeds that depend on where a random number is needed, not on what was drawn before it."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """Return a 63-bit seed that is a hash of its parts, such as the run's seed and a step."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
