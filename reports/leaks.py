"""What may leave the machine: keys and passwords are found by name and by content; what a bundle does without is left out.

A finding stops the submission. Better one line of code written anew than one key sent away: the generic patterns are wide.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

# -- by name

SECRET_NAMES = re.compile(
    r"\.env(rc|\..+)?|.+\.env|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.+\.(pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk|asc|gpg|tfstate|tfvars)"
    r"|[._]netrc|\.npmrc|\.pypirc|\.git-credentials|\.pgpass|\.htpasswd|\.vault-token|\.dockercfg|\.boto|\.s3cfg"
    r"|credentials?(\.(json|ya?ml|toml|ini|txt|csv))?|secrets?\.(json|ya?ml|toml|ini|txt)|(api[_-]?key|(hf[_-]?)?token|password)s?(\.txt)?"
    r"|service[_-]?account.*\.json|client[_-]secret.*\.json|rclone\.conf|kubeconfig",
    re.IGNORECASE,
)
SECRET_FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".docker", ".azure", ".gcloud"}
EXAMPLES = re.compile(
    r"\.env\.(example|sample|template|dist)", re.IGNORECASE
)  # their contents are looked at like all others

LEFT_OUT_FOLDERS = {
    ".git": "git's own", ".venv": "a virtual environment", "venv": "a virtual environment", "node_modules": "installed packages",
    "site-packages": "installed packages", "__pycache__": "a cache", ".cache": "a cache",
    ".mypy_cache": "a cache", ".ruff_cache": "a cache",
    ".pytest_cache": "a cache", ".hypothesis": "a cache", ".task": "a cache", ".ipynb_checkpoints": "a cache", "wandb": "runs",
}  # fmt: skip
LEFT_OUT_TOP = {"runs": "runs", "data": "data", "build": "a build", "dist": "a build"}
LEFT_OUT_ENDINGS = {
    "data": "parquet csv tsv jsonl arrow feather npy npz h5 hdf5 db sqlite sqlite3",
    "weights": "pt pth ckpt safetensors bin gguf onnx pkl pickle",
    "an archive": "zip gz tgz tar bz2 xz 7z zst rar whl jar",
    "a cache": "pyc pyo",
}
_ENDINGS = {f".{ending}": what for what, endings in LEFT_OUT_ENDINGS.items() for ending in endings.split()}
# what is packed cannot be looked into, whatever its name says
_PACKED = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"7z\xbc\xaf\x27\x1c",
    b"\x28\xb5\x2f\xfd",
    b"Rar!",
    b"SQLite format 3\x00",
)


def secret_name(path: str) -> str:
    """Why a file of this name may not leave; empty: it may."""
    parts = PurePosixPath(path).parts
    if folder := next((part for part in parts[:-1] if part.lower() in SECRET_FOLDERS), ""):
        return f"{folder}/ is where keys are kept"
    if SECRET_NAMES.fullmatch(parts[-1]) and not EXAMPLES.fullmatch(parts[-1]):
        return "files of this name hold keys or passwords"
    return ""


def left_out(path: str) -> str:
    """What this file of a commit is that no bundle holds; empty: code."""
    parts = PurePosixPath(path).parts
    for part in parts[:-1]:
        if what := LEFT_OUT_FOLDERS.get(part, "packaging" if part.endswith(".egg-info") else ""):
            return what
    if len(parts) > 1 and parts[0] in LEFT_OUT_TOP:
        return LEFT_OUT_TOP[parts[0]]
    return _ENDINGS.get(PurePosixPath(path).suffix.lower(), "")


def packed(data: bytes) -> bool:
    return data.startswith(_PACKED) or data[257:262] == b"ustar"


# -- by content

TOKENS: dict[str, bytes] = {
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d",
    "an AWS key": rb"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an API key": rb"\bsk-(?:[A-Za-z]+-)*[A-Za-z0-9_-]{20,}|\b[sr]k_live_[A-Za-z0-9]{20,}",
    "a Google key": rb"\bAIza[\w-]{35}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{20,}",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "an npm token": rb"\bnpm_[A-Za-z0-9]{36}|_authToken\s*=\s*[^\s$]{8,}",
    "a PyPI token": rb"\bpypi-[A-Za-z0-9_-]{50,}",
    "a web token": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{5,}",
    "a password in a URL": rb"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$]{0,100}:[^\s/@\"'<>{}$]{3,200}@[\w.-]",
    "a key of a header": rb"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+[A-Za-z0-9+/_.=-]{16,}",
    "an Azure key": rb"(?i)AccountKey=[A-Za-z0-9+/]{40,}={0,2}",
}
_TOKENS = {what: re.compile(pattern) for what, pattern in TOKENS.items()}
_NAMES = rb"(passw(?:or)?d|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|auth[_-]?key|private[_-]?key|credential)s?"
# NAME = "value" in code, JSON, TOML; and without quotes alone on a line, as in shell, INI and YAML files
_QUOTED = re.compile(rb"(?i)" + _NAMES + rb"[\"']?\s{0,9}[:=]\s{0,9}[bru]{0,2}[\"']([^\s\"']{6,500})[\"']")
_BARE = re.compile(
    rb"(?im)^[ \t]{0,99}(?:export[ \t]+)?[\w.-]{0,60}?"
    + _NAMES
    + rb"[ \t]{0,9}[:=][ \t]{0,9}([^\s\"'#()\[\]{},;]{6,500})[ \t]*\r?$"
)


def secrets_in(data: bytes) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that looks like a key. Text of two bytes a letter is text too."""
    text = data.replace(b"\0", b"")
    for what, pattern in _TOKENS.items():
        for found in pattern.finditer(text):
            yield text.count(b"\n", 0, found.start()) + 1, what
    for pattern in (_QUOTED, _BARE):
        for found in pattern.finditer(text):
            if _telling(found[1].lower(), found[2], quoted=pattern is _QUOTED):
                yield text.count(b"\n", 0, found.start()) + 1, f"a value for {found[1].decode().lower()}"


def _telling(name: bytes, value: bytes, quoted: bool) -> bool:
    """Is it a value, rather than a name, an expression or a blank to be filled in?"""
    if re.search(rb"[{}$<>*%]|\.\.\.|(?i:example|your[_-]|changeme|placeholder|dummy|xxxx)", value):
        return False
    if name.startswith((b"pass", b"pwd")) and quoted:
        return True
    mixed = re.search(rb"\d", value) and re.search(rb"[A-Za-z]", value)
    return (
        bool(mixed)
        and len(value) >= (8 if name.startswith((b"pass", b"pwd")) else 16)
        and _entropy(value) > 2.5
    )


def _entropy(value: bytes) -> float:
    """Bits a character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
