"""The hub loader with the real huggingface_hub library and a local HTTP server.

The server implements the part of the hub's protocol that the library uses. It lists one dataset and redirects
HEAD and GET requests for its file to another host name, as the hub does. It can also simulate failures.
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
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import ReplyHandler, serving, use_hub

from mainrun.config import from_dict
from mainrun.data.corpus import load_corpus
from mainrun.data.hub import HUB_REPO, HUB_REVISIONS, download, hub_reachable
from mainrun.errors import CorpusError, HubError

TITLES = [f"Title {i} of the café – {i * i}" for i in range(300)]


def parquet(titles: list[str | None], column: str = "title") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(titles))), column: titles}), out)
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """A fake hub with one dataset of one file. Its attributes switch failures on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = parquet(list(TITLES))
        self.files = ["story.parquet"]
        self.revisions = set(HUB_REVISIONS.values())
        self.sha256 = ""  # announce this sha256 instead of the real one
        self.missing: set[str] = set()  # may contain "repo" and "file"
        self.cut = 0  # close this many connections after half of the requested bytes
        self.short = False  # send only half of the file, and announce only this half
        self.slow = False  # send half of the file, then wait for `release`
        self.release = threading.Event()
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def promised(self) -> str:
        return self.sha256 or hashlib.sha256(self.body).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors that killed clients cause."""


class Handler(ReplyHandler):
    server: Hub

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
                Location=f"http://localhost:{hub.server_port}/cdn/blob",  # like a CDN, use another host name
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
    with serving(server) as address:
        use_hub(monkeypatch, address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
        yield server
        server.release.set()


def config(**changes: Any) -> Any:
    return from_dict({"corpus": "hn", "num_titles": 200} | changes)


CHILD = """
import json, sys
from mainrun.config import from_dict
from mainrun.data.corpus import load_corpus
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


# -- downloads and the cache


def test_the_order_is_the_permutation_of_the_task_over_all_rows(hub: Hub) -> None:
    corpus = load_corpus(config())
    assert corpus.train + corpus.val == in_task_order(TITLES, 200)
    assert (len(corpus.train), len(corpus.dev), len(corpus.val)) == (180, 0, 20)
    assert corpus.origin["kind"] == "hub" and corpus.origin["verified"] is True
    assert corpus.origin["repo"] == HUB_REPO and corpus.origin["revision"] == HUB_REVISIONS["hn"]
    assert corpus.origin["sha256"] == hashlib.sha256(hub.body).hexdigest()
    json.dumps(corpus.origin)


def test_without_shuffle_the_file_order_is_kept(hub: Hub) -> None:
    corpus = load_corpus(config(shuffle=False))
    assert corpus.train + corpus.val == TITLES[:200]


def test_blank_and_missing_titles_keep_their_row(hub: Hub) -> None:
    rows: list[str | None] = [*TITLES[:98], None, "  "]
    hub.body = parquet(rows)
    corpus = load_corpus(config(num_titles=100))
    assert corpus.train + corpus.val == in_task_order([*TITLES[:98], "", ""], 100)


def test_the_two_corpora_are_different_pinned_revisions(hub: Hub) -> None:
    first = download("hn")
    hub.body = parquet([t.upper() for t in TITLES])
    second = download("hn-2025")
    assert first != second and first.read_bytes() != second.read_bytes()
    requested = [path for _, path, _ in hub.requests if path.startswith("/api/")]
    assert requested == [
        f"/api/datasets/{HUB_REPO}/revision/{HUB_REVISIONS[name]}" for name in ("hn", "hn-2025")
    ]


def test_a_second_load_does_not_use_the_network(hub: Hub) -> None:
    first = load_corpus(config())
    hub.requests.clear()
    assert load_corpus(config()) == first
    assert hub.requests == []


def test_one_process_downloads_and_another_reads_offline(hub: Hub) -> None:
    out, err = child().communicate(timeout=120)
    assert json.loads(out)["titles"] == in_task_order(TITLES, 200), err
    hub.requests.clear()
    again, err = child(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").communicate(timeout=120)
    assert json.loads(again) == json.loads(out), err
    assert hub.requests == []


def test_a_cut_connection_is_resumed_where_it_was_cut(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # Reduce the chunk size, because the library keeps only complete chunks of 10 MB and this file is smaller.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)
    hub.cut = 1
    assert load_corpus(config()).train == in_task_order(TITLES, 180)
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.startswith("/cdn/")]
    assert ranges == ["", f"bytes={len(hub.body) // 2 // 512 * 512}-"]


def test_a_download_after_a_killed_one_starts_from_scratch(hub: Hub, tmp_path: Path) -> None:
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


def test_partial_files_of_killed_downloads_are_removed_when_old(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "hub" / "datasets--x" / "blobs"
    folder.mkdir(parents=True)
    old, live = folder / "a.1.incomplete", folder / "b.2.incomplete"
    old.write_bytes(b"half")
    live.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    download("hn")
    assert not old.exists() and live.exists()


# -- failures


@pytest.mark.parametrize(("missing", "says"), [("repo", HUB_REPO), ("file", "story.parquet")])
def test_a_missing_repository_or_file_is_refused(hub: Hub, missing: str, says: str) -> None:
    hub.missing = {missing}
    with pytest.raises(HubError, match="does not have") as e:
        load_corpus(config())
    assert hub.url in str(e.value) and HUB_REVISIONS["hn"] in str(e.value) and "HF_ENDPOINT" in str(e.value)
    assert says in str(e.value) or missing == "file"


def test_an_unknown_revision_is_refused(hub: Hub) -> None:
    hub.revisions.clear()
    with pytest.raises(HubError, match="does not have"):
        load_corpus(config())


def test_a_truncated_download_is_refused(hub: Hub) -> None:
    hub.short = True
    with pytest.raises(HubError, match="start again"):
        load_corpus(config())
    hub.short = False
    assert len(load_corpus(config()).train) == 180


def test_a_download_with_a_wrong_checksum_is_deleted(hub: Hub, tmp_path: Path) -> None:
    hub.sha256 = "ab" * 32
    with pytest.raises(HubError, match=r"sha256 .* the hub says abababababababab"):
        load_corpus(config())
    assert not list((tmp_path / "cache").rglob("*.parquet")), "the wrong file must be deleted"
    hub.sha256 = ""
    assert len(load_corpus(config()).train) == 180


def test_a_damaged_cached_file_is_downloaded_again(hub: Hub) -> None:
    path = download("hn")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.resolve().write_bytes(data)
    assert load_corpus(config()).train == in_task_order(TITLES, 180)
    assert blobs(hub) == 2


def test_a_damaged_cached_file_is_refused_offline(hub: Hub) -> None:
    path = download("hn")
    path.resolve().write_bytes(hub.body[:-1] + b"x")
    _, err = child(HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert "is damaged: its sha256" in err and "HF_HUB_OFFLINE" in err and "Traceback" not in err


def test_a_damaged_note_is_rewritten(hub: Hub, tmp_path: Path) -> None:
    download("hn")
    note = tmp_path / "cache" / "hub" / "hn.json"
    intact = note.read_text()
    for torn in ("", intact[: len(intact) // 2], "[]", '{"revision": 1}'):
        note.write_text(torn)
        assert len(load_corpus(config()).train) == 180
        assert note.read_text() == intact
    assert blobs(hub) == 1


def test_a_note_of_another_revision_is_ignored(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    old = download("hn")
    monkeypatch.setitem(HUB_REVISIONS, "hn", "c" * 40)
    hub.revisions.add("c" * 40)
    hub.body = parquet([t.upper() for t in TITLES])
    assert download("hn") != old
    assert load_corpus(config()).train == in_task_order([t.upper() for t in TITLES], 180)


def test_offline_without_a_cached_file_is_refused(hub: Hub) -> None:
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


def test_without_network_and_cached_file_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(HubError, match=r"could not be fetched from http://127\.0\.0\.1:9") as e:
        load_corpus(config())
    assert "corpus=synthetic" in str(e.value) and time.monotonic() - started < 30


def test_a_server_that_is_not_a_hub_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/elsewhere")
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        load_corpus(config())


@pytest.mark.parametrize("files", [[], ["a.parquet", "b.parquet"], ["data.csv"]])
def test_a_dataset_without_exactly_one_parquet_file_is_refused(hub: Hub, files: list[str]) -> None:
    hub.files = files
    with pytest.raises(HubError, match="one parquet file"):
        load_corpus(config())


def test_a_parquet_file_without_a_title_column_is_refused(hub: Hub) -> None:
    hub.body = parquet(list(TITLES), column="titel")
    with pytest.raises(HubError, match="did you mean 'titel'"):
        load_corpus(config())


def test_too_few_titles_suggest_num_titles(hub: Hub) -> None:
    with pytest.raises(CorpusError, match=r"300 titles.*--set num_titles=300"):
        load_corpus(config(num_titles=301))


def test_an_unwritable_cache_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match="MAINRUN_CACHE"):
        load_corpus(config())


def test_a_corpus_that_is_not_on_the_hub_cannot_be_downloaded() -> None:
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


def test_the_pinned_revisions() -> None:
    assert HUB_REVISIONS == {
        "hn-2025": "9e21b0f3c36bd7ce50b741ce966297a7f73cae38",
        "hn": "d210f96ddcc592f324c3108dd1d7b7edc03ca788",
    }


@pytest.mark.parametrize(
    "url",
    ["http://h:abc", "http://h:99999", "http://[", "http://[::1", "http://h:-1", "h", "ftp://h", "http://"],
)
def test_an_endpoint_that_is_not_a_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    message = (
        f"got HF_ENDPOINT='{url.rstrip('/')}', which is not a URL; "
        "set it to a URL such as https://huggingface.co, or unset it"
    )
    assert hub_reachable() == (False, message)
    with pytest.raises(HubError) as refused:
        download("hn")
    assert message in str(refused.value)
