"""SHA-256 of files and of JSON values. Stored hashes and keys depend on these bytes: they must not change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mainrun.files.inputs import open_file


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return a value as JSON with sorted keys, in ASCII: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True).encode()


def compact_json(value: Any) -> bytes:
    """Return a value as JSON with sorted keys and without spaces, in UTF-8, as tokenizers are stored."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
