"""The hub loader against a real HTTP server on loopback that speaks as much of the hub's protocol as the library asks for.

The server lists one dataset, answers HEAD and GET of its file as the hub does (a redirect to another host that has the bytes),
and can be told to misbehave. Everything goes through huggingface_hub; nothing of it is replaced.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mainrun.config import from_dict
from mainrun.data import sources as corpus
from mainrun.data.sources import HUB_REPO, HUB_REVISIONS, download, hub_reachable, load_corpus
from mainrun.errors import CorpusError, HubError

TITLES = [f"Title {i} of the café – {i * i}" for i in range(300)]


def parquet(titles: list[str | None], column: str = "title") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(titles))), column: titles}), out)
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """One dataset, one file, and what to do wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = parquet(list(TITLES))
        self.files = ["story.parquet"]
        self.revisions = set(HUB_REVISIONS.values())
        self.sha256 = ""  # what is promised, when it is not the body's
        self.missing: set[str] = set()  # "repo", "file"
        self.cut = 0  # this many times, send half of what is asked for and hang up
        self.short = False  # a body shorter than the promised size, with a header that fits it
        self.slow = False  # send half, then nothing until told
        self.release = threading.Event()
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def promised(self) -> str:
        return self.sha256 or hashlib.sha256(self.body).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is part of a test, not noise for its log."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        revision = next((part for part in path.split("/") if part in hub.revisions), None)
        if path == f"/api/datasets/{HUB_REPO}":
            self.reply(200, b"{}")
        elif "repo" in hub.missing:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif path.startswith("/cdn/"):
            self.blob()
        elif revision is None:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif path == f"/api/datasets/{HUB_REPO}/revision/{revision}":
            lfs = {"size": len(hub.body), "sha256": hub.promised, "pointerSize": 134}
            files = [
                {"rfilename": f, "size": len(hub.body), "blobId": "0" * 40, "lfs": lfs} for f in hub.files
            ]
            siblings = [{"rfilename": "README.md", "size": 3, "blobId": "1" * 40}, *files]
            answer = {
                "id": HUB_REPO,
                "sha": revision,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        elif path == f"/datasets/{HUB_REPO}/resolve/{revision}/{hub.files[0]}" and "file" not in hub.missing:
            self.reply(
                302,
                Location=f"http://localhost:{hub.server_port}/cdn/blob",  # another host by name, as a CDN is
                X_Repo_Commit=revision,
                X_Linked_Size=str(len(hub.body)),
                X_Linked_Etag=f'"{hub.promised}"',
                ETag='"of-the-redirect"',
            )
        else:
            self.reply(
                404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision, X_Error_Message="Entry not found"
            )

    def blob(self) -> None:
        hub = self.server
        first = (
            int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in self.headers else 0
        )
        body = hub.body[first:]
        if hub.short:
            return self.reply(200, body[: len(body) // 2])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(hub.body) - 1}/{len(hub.body)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if hub.cut or hub.slow:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if hub.slow:
                hub.release.wait(60)
            hub.cut -= 1
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for key in (
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def config(**changes: Any) -> Any:
    return from_dict({"corpus": "hn", "num_titles": 200} | changes)


CHILD = """
import json, sys
from mainrun.config import from_dict
from mainrun.data.sources import load_corpus
from mainrun.errors import MainrunError
try:
    c = load_corpus(from_dict({"corpus": "hn", "num_titles": 200}))
    print(json.dumps({"titles": c.train + c.dev + c.val, "origin": c.origin}))
except MainrunError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def child(**env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_task_order(titles: list[str], n: int) -> list[str]:
    return [titles[i] for i in np.random.default_rng(1337).permutation(len(titles))[:n]]


def blobs(hub: Hub) -> int:
    return sum(method == "GET" and path.startswith("/cdn/") for method, path, _ in hub.requests)


# -- what works


def test_the_order_is_the_tasks_permutation_over_all_rows(hub: Hub) -> None:
    got = load_corpus(config())
    assert got.train + got.val == in_task_order(TITLES, 200)
    assert (len(got.train), len(got.dev), len(got.val)) == (180, 0, 20)
    assert got.origin["kind"] == "hub" and got.origin["verified"] is True
    assert got.origin["repo"] == HUB_REPO and got.origin["revision"] == HUB_REVISIONS["hn"]
    assert got.origin["sha256"] == hashlib.sha256(hub.body).hexdigest()
    json.dumps(got.origin)


def test_file_order_without_shuffle(hub: Hub) -> None:
    got = load_corpus(config(shuffle=False))
    assert got.train + got.val == TITLES[:200]


def test_blank_and_missing_titles_keep_their_row(hub: Hub) -> None:
    rows: list[str | None] = [*TITLES[:98], None, "  "]
    hub.body = parquet(rows)
    got = load_corpus(config(num_titles=100))
    assert got.train + got.val == in_task_order([*TITLES[:98], "", ""], 100)


def test_the_two_corpora_are_two_pinned_revisions(hub: Hub) -> None:
    first = download("hn")
    hub.body = parquet([t.upper() for t in TITLES])
    second = download("hn-2025")
    assert first != second and first.read_bytes() != second.read_bytes()
    asked = [path for _, path, _ in hub.requests if path.startswith("/api/")]
    assert asked == [f"/api/datasets/{HUB_REPO}/revision/{HUB_REVISIONS[name]}" for name in ("hn", "hn-2025")]


def test_a_second_load_asks_nothing_of_the_network(hub: Hub) -> None:
    first = load_corpus(config())
    hub.requests.clear()
    assert load_corpus(config()) == first
    assert hub.requests == []


def test_hf_endpoint_then_offline_in_processes_of_their_own(hub: Hub) -> None:
    out, err = child().communicate(timeout=120)
    assert json.loads(out)["titles"] == in_task_order(TITLES, 200), err
    hub.requests.clear()
    again, err = child(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").communicate(timeout=120)
    assert json.loads(again) == json.loads(out), err
    assert hub.requests == []


def test_a_cut_connection_is_resumed_where_it_was_cut(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 512
    )  # the library keeps whole chunks, of 10 MB; this file is smaller
    hub.cut = 1
    assert load_corpus(config()).train == in_task_order(TITLES, 180)
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.startswith("/cdn/")]
    assert ranges == ["", f"bytes={len(hub.body) // 2 // 512 * 512}-"]


def test_a_killed_download_starts_again_cleanly(hub: Hub, tmp_path: Path) -> None:
    hub.slow = True
    process = child()
    deadline = time.monotonic() + 60
    while not blobs(hub) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and blobs(hub) == 1
    hub.slow = False
    assert load_corpus(config()).train == in_task_order(TITLES, 180)
    assert blobs(hub) == 2


def test_what_a_killed_download_left_is_swept_when_it_is_old(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "hub" / "datasets--x" / "blobs"
    folder.mkdir(parents=True)
    old, live = folder / "a.1.incomplete", folder / "b.2.incomplete"
    old.write_bytes(b"half")
    live.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    download("hn")
    assert not old.exists() and live.exists()


# -- what goes wrong


@pytest.mark.parametrize(("missing", "says"), [("repo", HUB_REPO), ("file", "story.parquet")])
def test_404(hub: Hub, missing: str, says: str) -> None:
    hub.missing = {missing}
    with pytest.raises(HubError, match="does not have") as e:
        load_corpus(config())
    assert hub.url in str(e.value) and HUB_REVISIONS["hn"] in str(e.value) and "HF_ENDPOINT" in str(e.value)
    assert says in str(e.value) or missing == "file"


def test_an_unknown_revision(hub: Hub) -> None:
    hub.revisions.clear()
    with pytest.raises(HubError, match="does not have"):
        load_corpus(config())


def test_a_body_that_is_too_short(hub: Hub) -> None:
    hub.short = True
    with pytest.raises(HubError, match="start again"):
        load_corpus(config())
    hub.short = False
    assert len(load_corpus(config()).train) == 180


def test_a_body_that_is_not_what_was_promised(hub: Hub, tmp_path: Path) -> None:
    hub.sha256 = "ab" * 32
    with pytest.raises(HubError, match=r"sha256 .* the hub says abababababababab"):
        load_corpus(config())
    assert not list((tmp_path / "cache").rglob("*.parquet")), "nothing of a wrong file may stay"
    hub.sha256 = ""
    assert len(load_corpus(config()).train) == 180


def test_a_cached_file_that_went_bad_is_fetched_again(hub: Hub) -> None:
    path = download("hn")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.resolve().write_bytes(data)
    assert load_corpus(config()).train == in_task_order(TITLES, 180)
    assert blobs(hub) == 2


def test_a_cached_file_that_went_bad_offline(hub: Hub) -> None:
    path = download("hn")
    path.resolve().write_bytes(hub.body[:-1] + b"x")
    _, err = child(HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert "is damaged: sha256" in err and "HF_HUB_OFFLINE" in err and "Traceback" not in err


def test_a_torn_note_is_written_anew(hub: Hub, tmp_path: Path) -> None:
    download("hn")
    note = tmp_path / "cache" / "hub" / "hn.json"
    whole = note.read_text()
    for torn in ("", whole[: len(whole) // 2], "[]", '{"revision": 1}'):
        note.write_text(torn)
        assert len(load_corpus(config()).train) == 180
        assert note.read_text() == whole
    assert blobs(hub) == 1


def test_a_note_of_another_revision_does_not_count(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    old = download("hn")
    monkeypatch.setitem(corpus.HUB_REVISIONS, "hn", "c" * 40)
    hub.revisions.add("c" * 40)
    hub.body = parquet([t.upper() for t in TITLES])
    assert download("hn") != old
    assert load_corpus(config()).train == in_task_order([t.upper() for t in TITLES], 180)


def test_offline_without_a_cache(hub: Hub) -> None:
    process = child(HF_HUB_OFFLINE="1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (
        "not in the cache" in err
        and "HF_HUB_OFFLINE" in err
        and "corpus=synthetic" in err
        and "Traceback" not in err
    )
    assert hub.requests == []


def test_no_network_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(HubError, match=r"could not be fetched from http://127\.0\.0\.1:9") as e:
        load_corpus(config())
    assert "corpus=synthetic" in str(e.value) and time.monotonic() - started < 30


def test_a_server_that_is_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/elsewhere")
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        load_corpus(config())


@pytest.mark.parametrize("files", [[], ["a.parquet", "b.parquet"], ["data.csv"]])
def test_a_dataset_without_its_one_parquet(hub: Hub, files: list[str]) -> None:
    hub.files = files
    with pytest.raises(HubError, match="one parquet file"):
        load_corpus(config())


def test_a_parquet_without_titles(hub: Hub) -> None:
    hub.body = parquet(list(TITLES), column="titel")
    with pytest.raises(HubError, match="did you mean 'titel'"):
        load_corpus(config())


def test_fewer_titles_than_asked_for(hub: Hub) -> None:
    with pytest.raises(CorpusError, match=r"300 titles.*--set num_titles=300"):
        load_corpus(config(num_titles=301))


def test_a_cache_that_cannot_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match="MAINRUN_CACHE"):
        load_corpus(config())


def test_download_of_what_is_not_on_the_hub() -> None:
    with pytest.raises(CorpusError, match="did you mean 'hn'"):
        download("hnn")


def test_hub_reachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_reachable() == (True, f"{hub.url} answers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable()[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for bad in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("HF_ENDPOINT", bad)
        ok, line = hub_reachable(timeout=1)
        assert not ok and bad in line


def test_the_names_are_those_of_the_spec() -> None:
    assert corpus.HUB_REVISIONS == {
        "hn-2025": "9e21b0f3c36bd7ce50b741ce966297a7f73cae38",
        "hn": "d210f96ddcc592f324c3108dd1d7b7edc03ca788",
    }


@pytest.mark.parametrize(
    "url",
    ["http://h:abc", "http://h:99999", "http://[", "http://[::1", "http://h:-1", "h", "ftp://h", "http://"],
)
def test_an_endpoint_that_is_no_url_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    said = f"got HF_ENDPOINT='{url.rstrip('/')}', which is not a URL; write it like https://huggingface.co, or unset it"
    assert hub_reachable() == (False, said)
    with pytest.raises(HubError) as refused:
        download("hn")
    assert said in str(refused.value)
