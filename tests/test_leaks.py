"""Submissions contain no secrets. The tests use 100 trees with one hazard each, and this repository."""

from __future__ import annotations

import base64
import gzip
import io
import os
import random
import string
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from submitting import ROOT, commit, git

from mainrun.errors import UsageError
from reports.submission import commit as commits
from reports.submission import leaks
from reports.submission.bundle import pack

LETTERS = string.ascii_letters + string.digits


@dataclass
class Hazard:
    """Files that must not be submitted.

    They are refused with the message `error`, or left out if `error` is empty.
    """

    files: dict[str, bytes]  # the content "-> target" makes a symbolic link
    secret: bytes = b""  # no bundle or message may contain this secret
    name: str = ""  # the message contains this name
    error: str = ""  # the message matches this pattern
    plant: Callable[[Path], None] | None = None  # adds git objects that a file system cannot store


def word(rng: random.Random, n: int, letters: str = LETTERS) -> str:
    return "".join(rng.choice(letters) for _ in range(n - 2)) + "a7"


def password(rng: random.Random) -> str:
    return word(rng, 14)


# Each token is composed of two parts, so that this file itself contains no token.
TOKENS: dict[str, Callable[[random.Random], str]] = {
    "a GitHub token": lambda rng: "gh" + "p_" + word(rng, 36),
    "a GitHub token ": lambda rng: "github" + "_pat_" + word(rng, 40),
    "a GitLab token": lambda rng: "gl" + "pat-" + word(rng, 20),
    "a Hugging Face token": lambda rng: "h" + "f_" + word(rng, 34),
    "an AWS key": lambda rng: "AK" + "IA" + word(rng, 16, string.ascii_uppercase).upper(),
    "an API key": lambda rng: "s" + "k-ant-api03-" + word(rng, 40),
    "an API key ": lambda rng: "s" + "k_live_" + word(rng, 24),
    "a Google key": lambda rng: "AI" + "za" + word(rng, 35),
    "a Slack token": lambda rng: "xo" + "xb-" + word(rng, 24),
    "an npm token": lambda rng: "np" + "m_" + word(rng, 36),
    "a PyPI token": lambda rng: "py" + "pi-" + word(rng, 60),
    "a JSON web token": lambda rng: "ey" + f"J{word(rng, 20)}.ey" + f"J{word(rng, 30)}.{word(rng, 30)}",
    "a password in a URL": lambda rng: f"postgres://ann:{word(rng, 12)}" + "@db.example.org/x",
    "a private key": lambda rng: "-----BEGIN OPENSSH " + f"PRIVATE KEY-----\n{word(rng, 64)}\n",
    "a key in an HTTP header": lambda rng: "Authorization: " + f"Bearer {word(rng, 30)}",
    "a value for password": lambda rng: "PASSWORD" + f' = "{password(rng)}"',
    "a value for api_key": lambda rng: '{"api_' + f'key": "{word(rng, 32)}"}}',
    "a value for token": lambda rng: "export MY_" + f"TOKEN={word(rng, 32)}",
    "a value for secret": lambda rng: "client_" + f"secret: {word(rng, 32)}",
}
SECRET_NAMES = [
    ".env", ".env.local", "prod.env", ".envrc", "id_rsa", "id_ed25519", "tls/server.pem", "x.key", ".netrc",
    ".pypirc", ".npmrc", "credentials.json", ".aws/config", ".ssh/known_hosts", "secrets.yaml", "conf/.ENV",
    "Token.txt", "service-account-3.json", ".docker/config.json", "vault.kdbx",
]  # fmt: skip
ODD_NAMES = [
    "a\nb.py", "a\tb.py", "a\x1b[2Jb.py", "a\\b.py", "a:b.py", "end.", " a.py", "con.txt", "LPT1",
    "\u202egpj.py", "e\u0301.py", os.fsdecode(b"\xff\xfe.py"),
    "n" * 230, "x/" * 100 + "deep.py", 'q".py', "what?.py", "pipe|.py",
]  # fmt: skip
LEFT_OUT = [
    "runs/a/config.json",
    "data/titles.txt",
    "x/__pycache__/m.py",
    ".venv/lib/a.py",
    "node_modules/a.js",
    "w.safetensors",
    "t.parquet",
    "d.jsonl",
    "m.pkl",
]


def in_content(kind: str, rng: random.Random) -> Hazard:
    text = TOKENS[kind](rng)
    templates = ["{}", "a {} b", "# {}\r\n", "x = '{}'\n", "<{}>"]
    if "value" in kind:
        templates = ["{}", "\n\n# note\n{}\n", "x = 1\r\n{}\r\nfoo"]
    line = rng.choice(templates).format(text)
    name = rng.choice(["notes.md", "a/b/conf.py", "deep/er/x.cfg", "run.sh", "Makefile", "log"])
    data = line.encode(rng.choice(["utf-8", "utf-8", "utf-16-le", "utf-16-be", "utf-16"]))
    if rng.random() < 0.3:
        data = bytes(rng.randrange(256) for _ in range(64)) + b"\n\0\0" + data
    secret = max(text.split(), key=len).strip("\"'{}").rpartition("=")[2].encode()
    return Hazard({name: data}, secret, name, error=kind.strip())


def in_name(name: str, rng: random.Random) -> Hazard:
    secret = word(rng, 30).encode()
    path = rng.choice(["", "sub/", "a/b/"]) + name
    error = "files with this name usually contain keys"
    if "/" in name and name[0] == ".":
        error = "is a folder for keys"
    return Hazard({path: b"x " + secret}, secret, Path(name).name, error)


def archive(rng: random.Random) -> Hazard:
    secret = word(rng, 40).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x", secret)
    name, data = rng.choice(
        [
            ("notes.txt", gzip.compress(secret)),
            ("code.py", buffer.getvalue()),
            ("a.zip", buffer.getvalue()),
            ("b.txt", b"BZh9" + secret),
        ]
    )
    return Hazard({name: data}, secret)


def left_out(name: str, rng: random.Random) -> Hazard:
    secret = word(rng, 40).encode()
    return Hazard({name: secret}, secret)


def link(target: str, rng: random.Random) -> Hazard:
    name = rng.choice(["link", "a/link.py"])
    return Hazard({name: f"-> {target}".encode()}, name=name, error="a link")


def gitlink(rng: random.Random) -> Hazard:
    def plant(root: Path) -> None:
        git(root, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},other")
        git(root, "commit", "--quiet", "--message", "y")
        (root / "other").mkdir(exist_ok=True)

    return Hazard({}, name="other", error="another repository", plant=plant)


def parent_folder(rng: random.Random) -> Hazard:
    """Return a tree that contains a folder `..`, which git itself would not create."""

    def plant(root: Path) -> None:
        blob = git(root, "hash-object", "-w", "--stdin", stdin=b"x")
        inner = git(root, "mktree", stdin=f"100644 blob {blob}\tx.py\n".encode())
        tree = git(root, "mktree", stdin=f"040000 tree {inner}\t..\n".encode())
        git(root, "update-ref", "HEAD", git(root, "commit-tree", tree, "-m", "z"))

    return Hazard({}, error="uncommitted changes|not allowed", plant=plant)


def huge(rng: random.Random) -> Hazard:
    return Hazard({"big.txt": b"0" * 300_000}, name="big.txt", error="at most")


def same_name(rng: random.Random) -> Hazard:
    a, b = rng.choice([("Readme.py", "README.py"), ("straße.py", "STRASSE.py"), ("\ufb01.py", "fi.py")])
    return Hazard({a: b"1", b: b"2"}, name=a, error="the same name")


def odd_name(name: str, rng: random.Random) -> Hazard:
    return Hazard({name: b"x"}, error="the name is not allowed")


def token_as_name(rng: random.Random) -> Hazard:
    token = TOKENS["a GitHub token"](rng)
    return Hazard({f"{token}.py": b""}, token.encode(), token, "in its name")


LINK_TARGETS = ("/etc/passwd", "../../outside", "good.py", ".", "/proc/self/environ")
HAZARDS: list[Callable[[random.Random], Hazard]] = [
    *(lambda rng, kind=kind: in_content(kind, rng) for kind in TOKENS),
    *(lambda rng, name=name: in_name(name, rng) for name in SECRET_NAMES),
    *(lambda rng, name=name: odd_name(name, rng) for name in ODD_NAMES),
    *(lambda rng, name=name: left_out(name, rng) for name in LEFT_OUT),
    *(lambda rng, target=target: link(target, rng) for target in LINK_TARGETS),
    archive, archive, archive, gitlink, parent_folder, huge, same_name, same_name, same_name, token_as_name,
]  # fmt: skip


def make_tree(root: Path, hazard: Hazard) -> None:
    """Commit two harmless files and the files of the hazard."""
    for name, data in {"good.py": b"print(1)\n", "README.md": b"# a\n", **hazard.files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data.startswith(b"-> "):
            path.symlink_to(data[3:].decode())
        else:
            path.write_bytes(data)
    commit(root)
    if hazard.plant:
        hazard.plant(root)


@pytest.mark.parametrize("i", range(100))
def test_a_hazard_is_refused_or_left_out(i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_UNPACKED_BYTES", 200_000)
    hazard = HAZARDS[i % len(HAZARDS)](random.Random(i))
    make_tree(tmp_path, hazard)
    if hazard.error:
        with pytest.raises(UsageError, match=hazard.error) as caught:
            commits.read_head(tmp_path)
        message = str(caught.value)
        assert hazard.name in message
        assert message.isprintable() or ("\x1b" not in message and len(message.splitlines()) < 10)
        assert not hazard.secret or hazard.secret.decode() not in message or "in its name" in message
    else:
        head = commits.read_head(tmp_path)
        assert set(head.files) == {"good.py", "README.md"}
        assert set(head.left_out) == set(hazard.files)
        assert hazard.secret not in pack(head.files)
        assert all(hazard.secret not in data for data in head.files.values())


def test_a_harmless_tree_is_read_in_full(tmp_path: Path) -> None:
    code = [
        b"token = tokens[0]",
        b"password = os.environ['PASSWORD']",
        b"key = getpass('key')",
        b"max_tokens=1024",
    ]
    good = {
        "a.py": b"\n".join(code),
        ".env.example": b"API_KEY=<your key>\nPASSWORD=\n",
        "ünï/код.py": b"1",
        "-rf": b"2",
        "a b.txt": b"https://ann@example.org, https://x.org:80/@y",
        "conf.yaml": b"tokenizer: 3f786850e387550fdab836ed7e6dc881de23001b\npassword: ${PASSWORD}\n",
    }
    for name, data in good.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.py").chmod(0o755)
    commit(tmp_path)
    head = commits.read_head(tmp_path)
    assert head.files == good and head.left_out == {} and head.executables == ["a.py"]


def test_the_code_comes_from_the_commit_not_the_folder(tmp_path: Path) -> None:
    """If git is told to ignore changes of a file, the commit may differ from the folder."""
    (tmp_path / "a.py").write_bytes(b"committed")
    commit(tmp_path)
    git(tmp_path, "update-index", "--assume-unchanged", "a.py")
    (tmp_path / "a.py").write_bytes(b"edited")
    assert commits.read_head(tmp_path).files == {"a.py": b"committed"}


def test_a_replaced_object_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"committed")
    commit(tmp_path)
    new = git(tmp_path, "hash-object", "-w", "--stdin", stdin=b"replaced")
    git(tmp_path, "replace", git(tmp_path, "rev-parse", "HEAD:a.py"), new)
    assert commits.read_head(tmp_path).files == {"a.py": b"committed"}


def test_no_commit_and_no_repository(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not in a git repository"):
        commits.read_head(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(UsageError, match="no commit yet"):
        commits.read_head(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").touch()
    commit(tmp_path)
    with pytest.raises(UsageError, match="only a folder in the git repository"):
        commits.read_head(tmp_path / "inner")


def test_this_repository_contains_no_secret() -> None:
    """If a pattern matched this code, it would stop every submission."""
    names: list[str] = []
    if (ROOT / ".git").exists():
        names = git(ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    matches = []
    for name in names:
        if not name or not (ROOT / name).is_file():
            continue
        if leaks.secret_name(name):
            matches.append((name, 0, leaks.secret_name(name)))
        for line, kind in leaks.secrets_in((ROOT / name).read_bytes()):
            matches.append((name, line, kind))
    assert matches == []


@pytest.mark.parametrize("size", [200_000])
def test_a_large_file_is_searched_quickly(size: int) -> None:
    import time

    rng = random.Random(0)
    for data in (
        b"a" * size,
        b"password" * (size // 8),
        b"x" * size + b"://",
        base64.b64encode(rng.randbytes(size)),
        b"token = " * (size // 8),
    ):
        started = time.process_time()
        list(leaks.secrets_in(data))
        assert time.process_time() - started < 2
