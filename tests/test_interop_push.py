"""`mainrun hub push` with the real huggingface_hub library and a hub on loopback.

The hub implements the part of the protocol that the library uses: create, preupload, LFS batch, upload,
verify and commit. A repository is a dictionary of files, which a test compares with the export.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from exporting import from_base, make_base, trained
from loopback import serving
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import RunError, UsageError
from mainrun.interop.export import export_run
from mainrun.interop.push import check_repo, push_run
from mainrun.store.rundir import RunDir, write_json

Push = Callable[..., "Done"]

TOKEN = "hf" + "_SecretOfTheTestThatNobodyMaySee"  # split, so that it does not look like a secret
REPO = "alice/small-model"
COMMIT = "3" * 40


class Hub(ThreadingHTTPServer):
    """A hub with the repositories of the user alice."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []  # the method and the path of each request
        self.tokens: set[str] = set()  # the Authorization headers
        self.refuse: dict[str, int] = {}  # a part of a path, and the status to answer with

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer_request()

    def do_POST(self) -> None:
        self.answer_request()

    def do_PUT(self) -> None:
        self.answer_request()

    def answer_request(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization") or "")
        for part, status in hub.refuse.items():
            if part in path:
                return self.answer(status, {"error": f"you sent {self.headers.get('Authorization')}"})
        if path.startswith("/lfs/"):
            return self.store_lfs(path, body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        repo, action = re.fullmatch(r"/(?:api/models/)?(\w+/[\w-]+)(?:\.git)?(.*)", path).groups()
        if repo not in hub.repos:
            return self.answer(404, {"error": "Repository not found"})
        if action == "":
            info = {"id": repo, "private": hub.private[repo], "sha": "0" * 40, "tags": [], "siblings": []}
            return self.answer(200, info)
        if action.startswith("/tree/"):
            return self.answer(200, self.tree(repo))
        if action.startswith("/preupload/"):
            return self.preupload(json.loads(body))
        if action == "/info/lfs/objects/batch":
            return self.batch(json.loads(body))
        if action.startswith("/commit/"):
            return self.commit(repo, body)
        raise AssertionError(f"the test server does not know {self.command} {path}")

    def create(self, request: dict[str, Any]) -> None:
        repo = f"{request['organization']}/{request['name']}"
        url = {"url": f"{self.server.url}/{repo}", "name": repo}
        if request["organization"] != "alice":
            return self.answer(403, {"error": "no permission"})
        if repo in self.server.repos:
            return self.answer(409, url | {"error": "You already created this model repo"})
        self.server.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.server.private[repo] = request.get("visibility") == "private" or request.get("private") is True
        self.answer(200, url)

    def tree(self, repo: str) -> list[dict[str, Any]]:
        files = []
        for name, data in self.server.repos[repo].items():
            files.append({"type": "file", "path": name, "size": len(data), "oid": "1" * 40})
        return files

    def preupload(self, request: dict[str, Any]) -> None:
        files = []
        for file in request["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def batch(self, request: dict[str, Any]) -> None:
        objects = []
        for thing in request["objects"]:
            href = f"{self.server.url}/lfs/{thing['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(thing | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store_lfs(self, path: str, body: bytes) -> None:
        if path == "/lfs/verify":
            request = json.loads(body)
            same = len(self.server.lfs.get(request["oid"], b"")) == request["size"]
            return self.answer(200 if same else 422, {})
        oid = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.lfs[oid] = body
        self.answer(200, {})

    def commit(self, repo: str, body: bytes) -> None:
        files = self.server.repos[repo]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.url}/{repo}/commit/{'2' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "2" * 40, "success": True})

    def answer(self, status: int, table: Any) -> None:
        body = json.dumps(table).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", table.get("error", ""))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trained(tmp_path_factory.mktemp("runs"), block_pattern="DM")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a run with low-rank terms on a base from the hub."""
    out = tmp_path_factory.mktemp("secret-folder")
    base = make_base(out / "models--alice--base" / "snapshots" / COMMIT)
    return trained(out / "runs", **adapter_on(base))


def adapter_on(base: Path) -> dict[str, Any]:
    return from_base(base, base_frozen=True, attn_lora_rank=2, eval_per_epoch=1)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Push:
    """Return a function that runs `mainrun hub push` with the hub at a URL and with a token."""
    from huggingface_hub import constants

    # the library reads these variables when it is imported
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(url: str, *arguments: object, token: str | None = TOKEN) -> Done:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        command = ["hub", "push", *map(str, arguments)]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert TOKEN not in result.output
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


def push_in_a_process(url: str, *arguments: object, home: Path) -> Done:
    """Run `mainrun hub push` in a new process, with the hub at a URL."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    env |= {"TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "mainrun", "hub", "push", *map(str, arguments)],
        capture_output=True, text=True, env=env, timeout=120,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- what arrives


def test_the_bytes_of_the_export_arrive(run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = push_in_a_process(hub.url, run.path, REPO, "--debug", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/{REPO}\n"), done.stderr
    export_run(run, tmp_path / "x")
    arrived = dict(hub.repos[REPO])
    del arrived[".gitattributes"]
    assert arrived == files_of(tmp_path / "x")
    assert {"model.safetensors", "routing.safetensors", "routing.json", "README.md"} <= arrived.keys()
    assert len(hub.lfs) == 2 and not hub.private[REPO]
    for step in (
        "/api/repos/create",
        "/preupload/",
        "/objects/batch",
        "PUT /lfs/",
        "/lfs/verify",
        "/commit/",
    ):
        assert any(step in request for request in hub.requests), step
    # the token is sent to the hub, and nothing else keeps it
    assert f"Bearer {TOKEN}" in hub.tokens
    for file in [*tmp_path.rglob("*"), *run.path.rglob("*")]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert all(TOKEN.encode() not in data for data in arrived.values())
    assert not list(tmp_path.glob("mainrun-push-*"))


def test_a_second_push_replaces_the_first(push: Push, run: RunDir, hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO] = {
        ".gitattributes": b"", "model-00001-of-00002.safetensors": b"old", "tokenizer.model": b"old",
        "model.safetensors.index.json": b"old", "notes.txt": b"mine", "other.safetensors": b"mine",
        "other.safetensors.index.json": b"mine", "tokenizer_of_mine.json": b"mine",
    }  # fmt: skip
    mine = {name: data for name, data in hub.repos[REPO].items() if data == b"mine"}
    hub.private[REPO] = True
    done = push(hub.url, run.path, REPO, "--private")
    assert done.returncode == 0, done.stderr
    export_run(run, tmp_path / "x")
    assert hub.repos[REPO] == files_of(tmp_path / "x") | {".gitattributes": b""} | mine


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_model_never_replaces_an_adapter(push: Push, run: RunDir, hub: Hub, name: str) -> None:
    before = {name: b"old", "routing.json": b"old"}
    hub.repos[REPO] = dict(before)
    hub.private[REPO] = False
    done = push(hub.url, run.path, REPO)
    assert done.returncode == 2 and f"contains an adapter ({name})" in done.stderr
    assert hub.repos[REPO] == before and not hub.lfs


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_an_adapter_never_replaces_a_model(push: Push, adapted: RunDir, hub: Hub, name: str) -> None:
    before = {name: b"old", "routing.json": b"old"}
    hub.repos[REPO] = dict(before)
    hub.private[REPO] = False
    done = push(hub.url, adapted.path, REPO, "--adapter")
    assert done.returncode == 2 and f"contains a full model ({name})" in done.stderr
    assert hub.repos[REPO] == before and not hub.lfs


def test_an_adapter_replaces_an_adapter(push: Push, adapted: RunDir, hub: Hub) -> None:
    mine = {"config.json": b"mine", "other.safetensors": b"mine"}
    hub.repos[REPO] = {"adapter_config.json": b"old", "routing.json": b"old"} | mine
    hub.private[REPO] = False
    done = push(hub.url, adapted.path, REPO, "--adapter")
    assert done.returncode == 0, done.stderr
    files = hub.repos[REPO]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | mine.keys()
    assert b"old" not in files.values()


def test_an_adapter_is_pushed_without_the_folder_of_its_base(push: Push, adapted: RunDir, hub: Hub) -> None:
    done = push(hub.url, adapted.path, REPO, "--private", "--adapter")
    assert done.returncode == 0, done.stderr
    files = hub.repos[REPO]
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    table = json.loads(files["adapter_config.json"])
    assert (table["base_model_name_or_path"], table["revision"]) == ("alice/base", COMMIT)
    assert not any(b"secret-folder" in data for data in files.values())
    assert hub.private[REPO]


# -- refusals before anything is sent


def test_a_public_repository_is_not_used_for_a_private_push(
    push: Push, run: RunDir, hub: Hub, tmp_path: Path
) -> None:
    hub.repos[REPO] = {}
    hub.private[REPO] = False
    done = push(hub.url, run.path, REPO, "--private")
    assert done.returncode == 2 and "is public, but got --private" in done.stderr
    assert hub.repos[REPO] == {} and not hub.lfs


@pytest.mark.parametrize(
    "repo",
    ["model", "/model", "alice/", "a/b/c", "alice/sm all", "alice/../x", "-a/b", "alice/x.git",
     "a/" + "b" * 99, "alice/x--y", "https://huggingface.co/alice/x", "alice/x-", "älice/x", "alice/x\n"],
)  # fmt: skip
def test_bad_names_are_refused(repo: str) -> None:
    with pytest.raises(UsageError, match="write OWNER/NAME"):
        check_repo(repo)


def test_good_names_are_accepted() -> None:
    for repo in ("alice/small-model", "a-b/C_d.e-1", "1/2"):
        check_repo(repo)


def changed_run(run: RunDir, folder: Path, name: str, **changes: Any) -> RunDir:
    """Return a copy of a run in which a JSON file has changed."""
    copy = folder / run.path.name
    for file in run.path.rglob("*"):
        if file.is_file() and file.name != ".lock":
            target = copy / file.relative_to(run.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    table = json.loads((copy / name).read_text())
    write_json(copy / name, table | changes)
    return RunDir(copy)


def test_a_run_that_is_not_done_is_not_sent(run: RunDir, tmp_path: Path) -> None:
    copy = changed_run(run, tmp_path, "status.json", state="running")
    with pytest.raises(RunError, match=r"is not finished \(state: running\)"):
        push_run(copy, REPO)
    (copy.path / "summary.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        push_run(copy, REPO)


def test_a_run_that_fails_a_guard_is_not_sent(push: Push, run: RunDir, hub: Hub, tmp_path: Path) -> None:
    summary = run.summary()
    assert summary is not None
    guards = [*summary["guards"], {"name": "causality", "status": "fail", "detail": "it sees the future"}]
    copy = changed_run(run, tmp_path, "summary.json", guards=guards)
    done = push(hub.url, copy.path, REPO)
    assert done.returncode == 2 and "failed guards" in done.stderr and "it sees the future" in done.stderr
    assert hub.requests == []
    copy = changed_run(run, tmp_path / "none", "summary.json", guards=[])
    with pytest.raises(RunError, match="contains no guards"):
        push_run(copy, REPO)


def test_weights_without_scores_are_not_sent(run: RunDir, tmp_path: Path) -> None:
    copy = changed_run(run, tmp_path, "summary.json", weights="0" * 64)
    with pytest.raises(RunError, match="their scores are unknown"):
        push_run(copy, REPO)


def test_a_model_that_qwen2_cannot_express_is_not_sent(push: Push, hub: Hub, tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", qk_norm=True)
    done = push(hub.url, run.path, REPO)
    assert done.returncode == 2 and "qk_norm=true (must be false)" in done.stderr
    assert hub.requests == []


def test_an_adapter_whose_base_is_a_folder_is_not_sent(push: Push, hub: Hub, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run = trained(tmp_path / "runs", **adapter_on(base))
    done = push(hub.url, run.path, REPO, "--adapter")
    assert done.returncode == 2 and f"its base is the folder {base}, which other" in done.stderr
    assert "push the base first" in done.stderr and "mainrun hub import OWNER/NAME" in done.stderr
    assert hub.requests == []
    export_run(run, tmp_path / "x", adapter=True)  # an export for oneself is allowed


# -- errors of the hub


def test_a_missing_token_is_named(push: Push, run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = push(hub.url, run.path, REPO, token=None)
    assert done.returncode == 2 and "there is no access token for the hub" in done.stderr
    assert "hf auth login" in done.stderr and done.stderr.count("\n") == 1
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrongSecret", "hf_bad\u00e4Secret", "hf_two words"])
def test_a_wrong_token_is_not_repeated(push: Push, run: RunDir, hub: Hub, tmp_path: Path, token: str) -> None:
    done = push(hub.url, run.path, REPO, "--debug", token=token)
    assert done.returncode == 2 and "token" in done.stderr.splitlines()[-1]
    assert token not in done.stderr and "Secret" not in done.stderr


def test_a_foreign_owner_is_refused(push: Push, run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = push(hub.url, run.path, "bob/model")
    assert done.returncode == 2 and "may not write to bob (status 403)" in done.stderr


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 403, "may not write to alice (status 403)"),
        ("/objects/batch", 401, "does not accept the access token (status 401)"),
        ("/lfs/", 413, "refused the request (status 413)"),
        ("/preupload/", 404, "knows no such repository (status 404)"),
        ("/repos/create", 500, "has a problem (status 500)"),
    ],
)
def test_errors_in_each_step_are_clear(
    push: Push, run: RunDir, hub: Hub, tmp_path: Path, path: str, status: int, message: str
) -> None:
    hub.refuse[path] = status
    done = push(hub.url, run.path, REPO, "--debug")
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith(f"error: the upload to {REPO} failed: ")
    assert "you sent" not in done.stderr
    assert not list(tmp_path.glob("mainrun-push-*"))


def test_an_unreachable_hub_is_named(push: Push, run: RunDir, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = push(url, run.path, REPO)
    assert done.returncode == 2 and "the hub cannot be reached (ConnectError)" in done.stderr
    assert done.stderr.count("\n") == 1
