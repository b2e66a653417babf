"""`mainrun hub import OWNER/NAME` with the real huggingface_hub library and a local HTTP server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import ROWS, write_checkpoint
from conftest import slow_unless
from loopback import ReplyHandler, serving, use_hub
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.errors import HubError
from mainrun.plan.recipes import load
from mainrun.train import build

REPOSITORY = "someone/small-qwen"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsASecretOfTheTest"


def blob_id(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub with one model repository. Its attributes switch failures on."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.revisions = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}
        self.private = False
        self.echo_status = 0  # answer each request with this status, and repeat its token
        self.echoed = False
        self.description = b""  # what to answer instead of the description of the repository
        self.requests: list[str] = []

    @property
    def downloads(self) -> list[str]:
        """The names of the files that were downloaded."""
        return [path.rpartition("/")[2] for path in self.requests if path.startswith("GET /someone/")]


class Handler(ReplyHandler):
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.echo_status:
            self.echo(hub.echo_status)
            return
        if hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        api = f"/api/models/{REPOSITORY}/revision/"
        files = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(api):
            self.describe(path.removeprefix(api))
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            tree = []
            for name, body in hub.files.items():
                tree.append({"type": "file", "path": name, "size": len(body), "oid": blob_id(body)})
            self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(files) and path.removeprefix(files) in hub.files:
            body = hub.files[path.removeprefix(files)]
            self.reply(200, body, ETag=f'"{blob_id(body)}"', X_Repo_Commit=COMMIT)
        else:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def echo(self, status: int) -> None:
        """Repeat the access token in each place where huggingface_hub looks for a message."""
        text = f"denied {self.headers.get('Authorization')}"
        self.server.echoed = TOKEN in text
        body = json.dumps({"error": text}).encode()
        self.reply(status, body, X_Error_Message=text, Content_Type="application/json")

    def describe(self, revision: str) -> None:
        hub = self.server
        if hub.description:
            self.reply(200, hub.description, Content_Type="application/json")
            return
        if revision not in hub.revisions:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        siblings = [{"rfilename": name, "size": len(body)} for name, body in hub.files.items()]
        answer = {"id": REPOSITORY, "sha": hub.revisions[revision], "siblings": siblings, "tags": []}
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", shard="20KB")
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return contents | {"README.md": b"# a model", "pytorch_model.bin": b"\x80\x04."}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(dict(files))
    with serving(server) as address:
        use_hub(monkeypatch, address)
        monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
        yield server


def import_from_hub(name: str, out: Path) -> Result:
    return CliRunner().invoke(app, ["hub", "import", name, "--out", str(out)])


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_a_checkpoint_of_the_hub_is_imported(hub: Hub, tmp_path: Path, revision: str) -> None:
    out = tmp_path / "preset.toml"
    result = import_from_hub(REPOSITORY + revision, out)
    assert result.exit_code == 0, result.output
    (cfg,) = load(str(out))
    folder = Path(cfg.start.removeprefix("hf:"))
    assert folder.is_absolute() and folder.is_relative_to(tmp_path / "cache")
    assert cfg.tokenizer == cfg.start
    about = out.read_text().split("\n")[1]
    assert REPOSITORY in about and COMMIT in about
    assert build(cfg, ROWS).embed.weight.shape == (ROWS, 32)
    wanted = {name for name in hub.files if name.endswith((".json", ".safetensors"))}
    assert set(hub.downloads) == wanted, "no README and no pickled weights"
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_a_second_import_downloads_nothing_and_works_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "preset.toml"
    assert import_from_hub(REPOSITORY, out).exit_code == 0
    first = out.read_text()
    hub.requests.clear()
    assert import_from_hub(REPOSITORY, out).exit_code == 0
    assert hub.downloads == [] and out.read_text() == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    result = import_from_hub(f"{REPOSITORY}@{COMMIT}", out)
    assert result.exit_code == 0, result.output
    assert hub.requests == [] and out.read_text() == first
    result = import_from_hub(f"{REPOSITORY}@{'f' * 40}", out)
    assert result.exit_code == 2 and "HF_HUB_OFFLINE" in result.output


def test_the_config_is_checked_before_the_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = hub.files["config.json"].replace(b'"qwen2"', b'"llama"')
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 2 and "llama" in result.output, hub.requests
    assert hub.downloads == ["config.json"]
    assert not (tmp_path / "preset.toml").exists()


def test_pickled_weights_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    for name in [name for name in hub.files if "safetensors" in name]:
        del hub.files[name]
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 2
    assert "no safetensors" in result.output and "pytorch_model.bin" in result.output
    assert hub.downloads == []


def test_a_missing_shard_is_named(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(name for name in hub.files if name.endswith(".safetensors"))[0]
    del hub.files[shard]
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 2 and shard in result.output
    assert not (tmp_path / "preset.toml").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("someone/else", "does not have someone/else"),
        (f"{REPOSITORY}@v2", "does not have"),
        ("a b/c", "no folder"),
        ("ünï/çode", "neither a folder nor the name of a repository"),
        ("someone/a--b", "neither a folder nor the name of a repository"),
    ],
)
def test_an_unknown_name_is_refused(hub: Hub, tmp_path: Path, name: str, word: str) -> None:
    result = import_from_hub(name, tmp_path / "preset.toml")
    assert result.exit_code == 2 and word in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "preset.toml").exists()


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 2 and "could not be fetched" in result.output, result.output


def test_the_token_is_used_and_never_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = True
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 2 and "log in" in result.output
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = import_from_hub(REPOSITORY, tmp_path / "preset.toml")
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


# -- failures of the server


def message_of(hub: Hub, tmp_path: Path, *options: str) -> str:
    """Return the message of an import that fails."""
    out = tmp_path / "preset.toml"
    result = CliRunner().invoke(app, ["hub", "import", REPOSITORY, "--out", str(out), *options])
    assert result.exit_code == HubError.exit_code and not out.exists(), result.output
    return result.output


@pytest.mark.parametrize("status", slow_unless([401, 500], [401, 403, 404, 429, 500]))
@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_server_that_repeats_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, options: list[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.echo_status = status
    arguments = ["-m", "mainrun", "hub", "import", REPOSITORY, "--out", str(tmp_path / "p.toml"), *options]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == HubError.exit_code, output
    assert hub.echoed and TOKEN not in output
    assert f"(status {status})" in output and ("Traceback" in output) == bool(options)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "log in with `hf auth login`"),
        (403, "log in with `hf auth login`"),
        (404, "does not have"),
        (500, "try again later"),
    ],
)
def test_a_refused_request_names_the_fix(hub: Hub, tmp_path: Path, status: int, says: str) -> None:
    hub.echo_status = status
    output = message_of(hub, tmp_path)
    assert says in output and f"(status {status})" in output
    assert ("try again later" in output) == (status == 500)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"id": "a/b", "siblings": [{}]}'])
def test_a_reply_that_is_not_the_reply_of_a_hub(hub: Hub, tmp_path: Path, body: bytes) -> None:
    hub.description = body
    output = message_of(hub, tmp_path)
    assert "not the reply of a hub" in output and "check HF_ENDPOINT" in output


def test_a_reply_without_a_commit(hub: Hub, tmp_path: Path) -> None:
    hub.description = b'{"id": "a/b", "siblings": [{"rfilename": "model.safetensors"}]}'
    assert f"did not return a commit for {REPOSITORY} at main" in message_of(hub, tmp_path)
