"""No key leaves: 100 trees, each with something in it that may not, and the repository itself, which holds nothing."""

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
from handing_in import ROOT, commit, git

from mainrun.errors import UsageError
from reports import commit as commits
from reports import leaks
from reports.bundle import pack

LETTERS = string.ascii_letters + string.digits


@dataclass
class Hazard:
    files: dict[str, bytes]  # or a link, as "-> target"
    secret: bytes = b""  # must be in no bundle and in no message
    names: str = ""  # what the refusal names; empty: the file is left out, the rest goes
    why: str = ""  # what the refusal says
    raw: Callable[[Path], None] | None = None  # what no file system can hold


def word(rng: random.Random, n: int, letters: str = LETTERS) -> str:
    return "".join(rng.choice(letters) for _ in range(n - 2)) + "a7"


def password(rng: random.Random) -> str:
    return word(rng, 14)


# in two parts, so that this file does not trip what it tests
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
    "a web token": lambda rng: "ey" + f"J{word(rng, 20)}.ey" + f"J{word(rng, 30)}.{word(rng, 30)}",
    "a password in a URL": lambda rng: f"postgres://ann:{word(rng, 12)}" + "@db.example.org/x",
    "a private key": lambda rng: "-----BEGIN OPENSSH " + f"PRIVATE KEY-----\n{word(rng, 64)}\n",
    "a key of a header": lambda rng: "Authorization: " + f"Bearer {word(rng, 30)}",
    "a value for password": lambda rng: "PASSWORD" + f' = "{password(rng)}"',
    "a value for api_key": lambda rng: '{"api_' + f'key": "{word(rng, 32)}"}}',
    "a value for token": lambda rng: "export MY_" + f"TOKEN={word(rng, 32)}",
    "a value for secret": lambda rng: "client_" + f"secret: {word(rng, 32)}",
}
SECRET_NAMES = [
    ".env", ".env.local", "prod.env", ".envrc", "id_rsa", "id_ed25519", "tls/server.pem", "x.key", ".netrc", ".pypirc", ".npmrc",
    "credentials.json", ".aws/config", ".ssh/known_hosts", "secrets.yaml", "conf/.ENV", "Token.txt", "service-account-3.json",
    ".docker/config.json", "vault.kdbx",
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


def in_content(what: str, rng: random.Random) -> Hazard:
    text = TOKENS[what](rng)
    line = rng.choice(
        ["{}", "\n\n# note\n{}\n", "x = 1\r\n{}\r\nfoo"]
        if "value" in what
        else ["{}", "a {} b", "# {}\r\n", "x = '{}'\n", "<{}>"]
    ).format(text)
    name = rng.choice(["notes.md", "a/b/conf.py", "deep/er/x.cfg", "run.sh", "Makefile", "log"])
    data = line.encode(rng.choice(["utf-8", "utf-8", "utf-16-le", "utf-16-be", "utf-16"]))
    if rng.random() < 0.3:
        data = bytes(rng.randrange(256) for _ in range(64)) + b"\n\0\0" + data
    secret = max(text.split(), key=len).strip("\"'{}").rpartition("=")[2].encode()
    return Hazard({name: data}, secret, name, what.strip())


def in_name(name: str, rng: random.Random) -> Hazard:
    secret = word(rng, 30).encode()
    return Hazard(
        {rng.choice(["", "sub/", "a/b/"]) + name: b"x " + secret},
        secret,
        Path(name).name,
        "kept" if "/" in name and name[0] == "." else "hold",
    )


def packed(rng: random.Random) -> Hazard:
    secret = word(rng, 40).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as z:
        z.writestr("x", secret)
    name, data = rng.choice(
        [
            ("notes.txt", gzip.compress(secret)),
            ("code.py", made.getvalue()),
            ("a.zip", made.getvalue()),
            ("b.txt", b"BZh9" + secret),
        ]
    )
    return Hazard({name: data}, secret)


def left_out(name: str, rng: random.Random) -> Hazard:
    secret = word(rng, 40).encode()
    return Hazard({name: secret}, secret)


def link(target: str, rng: random.Random) -> Hazard:
    name = rng.choice(["link", "a/link.py"])
    return Hazard({name: f"-> {target}".encode()}, names=name, why="a link")


def gitlink(rng: random.Random) -> Hazard:
    return Hazard(
        {}, names="other", why="another repository", raw=lambda root: _index(root, f"160000,{'1' * 40},other")
    )


def _index(root: Path, entry: str) -> None:
    git(root, "update-index", "--add", "--cacheinfo", entry)
    git(root, "commit", "--quiet", "--message", "y")
    (root / "other").mkdir(exist_ok=True)


def above(rng: random.Random) -> Hazard:
    """A tree that says `..`, which git itself would not make."""

    def plant(root: Path) -> None:
        blob = git(root, "hash-object", "-w", "--stdin", given=b"x")
        inner = git(root, "mktree", given=f"100644 blob {blob}\tx.py\n".encode())
        tree = git(root, "mktree", given=f"040000 tree {inner}\t..\n".encode())
        git(root, "update-ref", "HEAD", git(root, "commit-tree", tree, "-m", "z"))

    return Hazard({}, names="", why="not committed|cannot be", raw=plant)


def huge(rng: random.Random) -> Hazard:
    return Hazard({"big.txt": b"0" * 300_000}, names="big.txt", why="at most")


def twins(rng: random.Random) -> Hazard:
    a, b = rng.choice([("Readme.py", "README.py"), ("straße.py", "STRASSE.py"), ("\ufb01.py", "fi.py")])
    return Hazard({a: b"1", b: b"2"}, names=a, why="the same name")


def odd(name: str, rng: random.Random) -> Hazard:
    return Hazard({name: b"x"}, names="", why="the name cannot be")


def token_name(rng: random.Random) -> Hazard:
    token = TOKENS["a GitHub token"](rng)
    return Hazard({f"{token}.py": b""}, token.encode(), token, "in its name")


KINDS: list[Callable[[random.Random], Hazard]] = [
    *(lambda rng, what=what: in_content(what, rng) for what in TOKENS),
    *(lambda rng, name=name: in_name(name, rng) for name in SECRET_NAMES),
    *(lambda rng, name=name: odd(name, rng) for name in ODD_NAMES),
    *(lambda rng, name=name: left_out(name, rng) for name in LEFT_OUT),
    *(lambda rng, target=target: link(target, rng) for target in ("/etc/passwd", "../../outside", "good.py", ".", "/proc/self/environ")),
    packed, packed, packed, gitlink, above, huge, twins, twins, twins, token_name,
]  # fmt: skip


def plant(root: Path, hazard: Hazard) -> None:
    for name, data in {"good.py": b"print(1)\n", "README.md": b"# a\n", **hazard.files}.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if data.startswith(b"-> "):
            place.symlink_to(data[3:].decode())
        else:
            place.write_bytes(data)
    commit(root)
    if hazard.raw:
        hazard.raw(root)


@pytest.mark.parametrize("i", range(100))
def test_nothing_that_may_not_leave_does(i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "UNPACKED", 200_000)
    hazard = KINDS[i % len(KINDS)](random.Random(i))
    plant(tmp_path, hazard)
    if hazard.why:
        with pytest.raises(UsageError, match=hazard.why) as caught:
            commits.head(tmp_path)
        said = str(caught.value)
        assert hazard.names in said
        assert said.isprintable() or ("\x1b" not in said and len(said.splitlines()) < 10)
        assert not hazard.secret or hazard.secret.decode() not in said or "in its name" in said
    else:
        found = commits.head(tmp_path)
        assert set(found.files) == {"good.py", "README.md"}
        assert set(found.left_out) == set(hazard.files)
        assert hazard.secret not in pack(found.files) and all(
            hazard.secret not in data for data in found.files.values()
        )


def test_plain_trees_go_in_whole(tmp_path: Path) -> None:
    good = {
        "a.py": b"token = tokens[0]\npassword = os.environ['PASSWORD']\nkey = getpass('key')\nmax_tokens=1024\n",
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
    found = commits.head(tmp_path)
    assert found.files == good and found.left_out == {} and found.runnable == ["a.py"]


def test_the_code_is_the_commits_not_the_folders(tmp_path: Path) -> None:
    """git can be told to look away from a file; what it holds is then not what lies there."""
    (tmp_path / "a.py").write_bytes(b"committed")
    commit(tmp_path)
    git(tmp_path, "update-index", "--assume-unchanged", "a.py")
    (tmp_path / "a.py").write_bytes(b"edited")
    assert commits.head(tmp_path).files == {"a.py": b"committed"}


def test_a_replaced_object_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"committed")
    commit(tmp_path)
    new = git(tmp_path, "hash-object", "-w", "--stdin", given=b"replaced")
    git(tmp_path, "replace", git(tmp_path, "rev-parse", "HEAD:a.py"), new)
    assert commits.head(tmp_path).files == {"a.py": b"committed"}


def test_no_commit_and_no_repository(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in no git repository"):
        commits.head(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(UsageError, match="no commit yet"):
        commits.head(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").touch()
    commit(tmp_path)
    with pytest.raises(UsageError, match="a folder of the git repository"):
        commits.head(tmp_path / "inner")


def test_this_repository_holds_nothing_that_looks_like_a_key() -> None:
    """Else nobody could submit: the patterns are wide, the code is written so that they do not meet it."""
    listed = (
        git(ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
        if (ROOT / ".git").exists()
        else []
    )
    found = [
        (name, line, what)
        for name in listed
        if name and (ROOT / name).is_file()
        for line, what in [
            *leaks.secrets_in((ROOT / name).read_bytes()),
            *((0, why) for why in [leaks.secret_name(name)] if why),
        ]
    ]
    assert found == []


@pytest.mark.parametrize("size", [200_000])
def test_a_large_file_is_looked_through_in_no_time(size: int) -> None:
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
