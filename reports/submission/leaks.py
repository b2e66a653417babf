"""Find keys and passwords in the names and contents of files. Also find the files that a submission omits.

`mainrun submit` refuses to write a bundle that contains a key or a password. The patterns
deliberately match some harmless text, because rewriting a line of code costs less than leaking a key.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

# -- checks of file names

SECRET_NAMES = re.compile(
    r"\.env(rc|\..+)?|.+\.env"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?"
    r"|.+\.(pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk|asc|gpg|tfstate|tfvars)"
    r"|[._]netrc|\.npmrc|\.pypirc|\.git-credentials|\.pgpass|\.htpasswd"
    r"|\.vault-token|\.dockercfg|\.boto|\.s3cfg|rclone\.conf|kubeconfig"
    r"|credentials?(\.(json|ya?ml|toml|ini|txt|csv))?|secrets?\.(json|ya?ml|toml|ini|txt)"
    r"|(api[_-]?key|(hf[_-]?)?token|password)s?(\.txt)?"
    r"|service[_-]?account.*\.json|client[_-]secret.*\.json",
    re.IGNORECASE,
)
SECRET_FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".docker", ".azure", ".gcloud"}
# Templates of .env files may be submitted. Like all files, the templates are searched for secrets.
TEMPLATES = re.compile(r"\.env\.(example|sample|template|dist)", re.IGNORECASE)

LEFT_OUT_FOLDERS = {
    ".git": "a file of git",
    ".venv": "a virtual environment",
    "venv": "a virtual environment",
    "node_modules": "installed packages",
    "site-packages": "installed packages",
    "__pycache__": "a cache",
    ".cache": "a cache",
    ".mypy_cache": "a cache",
    ".ruff_cache": "a cache",
    ".pytest_cache": "a cache",
    ".hypothesis": "a cache",
    ".task": "a cache",
    ".ipynb_checkpoints": "a cache",
    "wandb": "runs",
}
LEFT_OUT_TOP = {"runs": "runs", "data": "data", "build": "a build", "dist": "a build"}
LEFT_OUT_ENDINGS = {
    "data": "parquet csv tsv jsonl arrow feather npy npz h5 hdf5 db sqlite sqlite3",
    "weights": "pt pth ckpt safetensors bin gguf onnx pkl pickle",
    "an archive": "zip gz tgz tar bz2 xz 7z zst rar whl jar",
    "a cache": "pyc pyo",
}
KIND_OF_ENDING = {
    f".{ending}": kind for kind, endings in LEFT_OUT_ENDINGS.items() for ending in endings.split()
}

# Archives and databases begin with these bytes. The contents of these files cannot be searched for secrets.
ARCHIVE_MAGIC = (
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
    """Return the reason why a file with this name must not be submitted.

    Return an empty string if the file may be submitted.
    """
    *folders, name = PurePosixPath(path).parts
    for folder in folders:
        if folder.lower() in SECRET_FOLDERS:
            return f"{folder}/ is a folder for keys"
    if SECRET_NAMES.fullmatch(name) and not TEMPLATES.fullmatch(name):
        return "files with this name usually contain keys or passwords"
    return ""


def left_out(path: str) -> str:
    """Return the kind of a file that submissions omit.

    Return an empty string if submissions include the file.
    """
    *folders, _ = PurePosixPath(path).parts
    for folder in folders:
        if folder in LEFT_OUT_FOLDERS:
            return LEFT_OUT_FOLDERS[folder]
        if folder.endswith(".egg-info"):
            return "packaging"
    if folders and folders[0] in LEFT_OUT_TOP:
        return LEFT_OUT_TOP[folders[0]]
    return KIND_OF_ENDING.get(PurePosixPath(path).suffix.lower(), "")


def is_archive(data: bytes) -> bool:
    """Return whether the first bytes of a file show that the file is an archive or a database."""
    return data.startswith(ARCHIVE_MAGIC) or data[257:262] == b"ustar"


# -- checks of file contents

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
    "a JSON web token": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{5,}",
    "a password in a URL": (
        rb"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$]{0,100}"
        rb":[^\s/@\"'<>{}$]{3,200}@[\w.-]"
    ),
    "a key in an HTTP header": (
        rb"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?"
        rb"(?:bearer|basic|token)\s+[A-Za-z0-9+/_.=-]{16,}"
    ),
    "an Azure key": rb"(?i)AccountKey=[A-Za-z0-9+/]{40,}={0,2}",
}
TOKEN_PATTERNS = {kind: re.compile(pattern) for kind, pattern in TOKENS.items()}
PASSWORD_NAMES = (b"pass", b"pwd")
NAMES = (
    rb"(passw(?:or)?d|passwd|passphrase|pwd|secret|token|credential"
    rb"|api[_-]?key|access[_-]?key|auth[_-]?key|private[_-]?key)s?"
)
# Matches an assignment of a quoted value, such as NAME = "value", in code, JSON and TOML.
QUOTED = re.compile(rb"(?i)" + NAMES + rb"[\"']?\s{0,9}[:=]\s{0,9}[bru]{0,2}[\"']([^\s\"']{6,500})[\"']")
# Matches a line that assigns an unquoted value, such as NAME = value, in shell, INI and YAML files.
UNQUOTED = re.compile(
    rb"(?im)^[ \t]{0,99}(?:export[ \t]+)?[\w.-]{0,60}?"
    + NAMES
    + rb"[ \t]{0,9}[:=][ \t]{0,9}([^\s\"'#()\[\]{},;]{6,500})[ \t]*\r?$"
)
PLACEHOLDER = re.compile(rb"[{}$<>*%]|\.\.\.|(?i:example|your[_-]|changeme|placeholder|dummy|xxxx)")


def secrets_in(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield the line number and the kind of each text that looks like a secret.

    The text may be encoded in ASCII, UTF-8, UTF-16 or UTF-32.
    """
    text = data.replace(b"\0", b"")  # this turns ASCII text in UTF-16 or UTF-32 into plain ASCII
    for kind, pattern in TOKEN_PATTERNS.items():
        for match in pattern.finditer(text):
            yield _line_number(text, match), kind
    for pattern in (QUOTED, UNQUOTED):
        for match in pattern.finditer(text):
            name, value = match[1].lower(), match[2]
            if _is_secret(name, value, quoted=pattern is QUOTED):
                yield _line_number(text, match), f"a value for {name.decode()}"


def _line_number(text: bytes, match: re.Match[bytes]) -> int:
    return text.count(b"\n", 0, match.start()) + 1


def _is_secret(name: bytes, value: bytes, quoted: bool) -> bool:
    """Return whether a value looks like a secret rather than a variable, an expression or a placeholder."""
    if PLACEHOLDER.search(value):
        return False
    is_password = name.startswith(PASSWORD_NAMES)
    if is_password and quoted:
        return True
    min_length = 8 if is_password else 16
    has_digit = re.search(rb"\d", value) is not None
    has_letter = re.search(rb"[A-Za-z]", value) is not None
    return has_digit and has_letter and len(value) >= min_length and _entropy(value) > 2.5


def _entropy(value: bytes) -> float:
    """Return the Shannon entropy of a byte string, in bits per byte."""
    total = 0.0
    for count in Counter(value).values():
        share = count / len(value)
        total -= share * math.log2(share)
    return total
