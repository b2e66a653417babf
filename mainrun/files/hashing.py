"""Compute the SHA-256 of files and of JSON values.

The JSON encodings in this module must not change, because stored hashes and keys depend on these encodings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mainrun.files.inputs import open_file


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return a value as ASCII JSON with sorted keys, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True).encode()


def compact_json(value: Any) -> bytes:
    """Return a value as UTF-8 JSON with sorted keys and without spaces. Stored tokenizers use this form."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON as a hexadecimal string."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
