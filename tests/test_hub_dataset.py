"""Test datasets on the hub, with the real huggingface_hub library and a local HTTP server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import slow_unless
from loopback import serving, use_hub
from test_hub import Handler
from typer.testing import CliRunner

from mainrun.checks import guards
from mainrun.checks.guards import Evidence
from mainrun.cli import app
from mainrun.config import from_dict
from mainrun.core.hardware import cache_dir
from mainrun.data.corpus import Corpus, load_corpus
from mainrun.errors import CorpusError, HubError, UsageError

REPO = "someone/texts.v1"
TOKEN = "hf_thisIsASecretOfTheTest"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = {"main": COMMIT, "refs/convert/parquet": "f" * 40}
CORPUS = f"hub:{REPO}@{COMMIT}#text"
FILES = {  # file: the first number of its texts
    "data/train-00001.parquet": 20,
    "data/train-00000.parquet": 0,
    "other/test.parquet": 40,
    "README.md": 0,
}


def text(i: int) -> str:
    return f"  text {i}\n\tof the café  "


def parquet(first: int) -> bytes:
    out = io.BytesIO()
    texts = [*map(text, range(first, first + 20)), "  ", None]
    pq.write_table(pa.table({"id": list(range(22)), "text": texts}), out)
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """A fake hub with one dataset of several files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), DatasetHandler)
        self.contents = {name: parquet(first) for name, first in FILES.items()}
        self.wrong: dict[str, str] = {}  # announce this sha256 for a file
        self.plain: set[str] = set()  # files without LFS
        self.echo_status = 0  # answer each request with this status, and repeat its token
        self.echoed = False
        self.no_commit = False  # leave the commit out of the description
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha256(self, name: str) -> str:
        return self.wrong.get(name) or hashlib.sha256(self.contents[name]).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        size = len(self.contents[name])
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if name not in self.plain:
            entry["lfs"] = {"size": size, "sha256": self.sha256(name), "pointerSize": 134}
        return entry

    def downloaded(self) -> list[str]:
        prefix = f"GET /cdn/{COMMIT}/"
        return [request.removeprefix(prefix) for request in self.requests if request.startswith(prefix)]


class DatasetHandler(Handler):
    server: Hub  # type: ignore[assignment]

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.split("?")[0].replace("%2F", "/")
        hub.requests.append(f"{self.command} {path}")
        if hub.echo_status:
            text = f"denied {self.headers.get('Authorization')}"
            hub.echoed = TOKEN in text
            return self.reply(hub.echo_status, text.encode(), X_Error_Message=text)
        info = f"/api/datasets/{REPO}/revision/"
        resolve = f"/datasets/{REPO}/resolve/"
        if path.startswith(info):
            self.info(path.removeprefix(info))
        elif path.startswith(resolve):
            self.redirect(*path.removeprefix(resolve).split("/", 1))
        elif path.startswith("/cdn/"):
            self.reply(200, hub.contents[path.split("/", 3)[3]])
        else:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def info(self, revision: str) -> None:
        commit = BRANCHES.get(revision, revision)
        if commit not in BRANCHES.values():
            return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        siblings = [self.server.entry(name) for name in self.server.contents]
        answer = {"id": REPO, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        if self.server.no_commit:
            del answer["sha"]
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def redirect(self, commit: str, name: str) -> None:
        hub = self.server
        self.reply(
            302,
            Location=f"http://localhost:{hub.server_port}/cdn/{commit}/{name}",
            X_Repo_Commit=commit,
            X_Linked_Size=str(len(hub.contents[name])),
            X_Linked_Etag=f'"{hub.sha256(name)}"',
            ETag='"of-the-redirect"',
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    with serving(server) as address:
        use_hub(monkeypatch, address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
        yield server


def load(corpus: str = CORPUS, n: int = 60, **changes: Any) -> Corpus:
    fields = {"corpus": corpus, "num_titles": n, "shuffle": False, "documents": True}
    return load_corpus(from_dict(fields | changes))


def texts_of(corpus: Corpus) -> list[str]:
    return corpus.train + corpus.dev + corpus.val


def cached(name: str) -> Path:
    (path,) = cache_dir().rglob(Path(name).name)
    return path


# -- texts


def test_the_files_are_read_in_order_of_name(hub: Hub) -> None:
    corpus = load()
    assert texts_of(corpus) == [text(i) for i in range(60)]
    assert hub.downloaded() == ["data/train-00000.parquet", "data/train-00001.parquet", "other/test.parquet"]
    origin = corpus.origin
    assert (origin["kind"], origin["repo"], origin["revision"]) == ("dataset", REPO, COMMIT)
    assert origin["verified"] is True and origin["blank"] == 6 and origin["column"] == "text"
    assert origin["files"] == {name: hub.sha256(name) for name in sorted(FILES) if name != "README.md"}
    json.dumps(origin)


def test_without_documents_a_text_is_one_line(hub: Hub) -> None:
    assert texts_of(load(documents=False)) == [f"text {i} \tof the café" for i in range(60)]


def test_the_texts_are_shuffled_like_titles(hub: Hub) -> None:
    order = np.random.default_rng(1337).permutation(60)
    assert texts_of(load(shuffle=True)) == [text(i) for i in order]


@pytest.mark.parametrize(
    ("glob", "numbers"),
    [
        ("data/*", range(40)),
        ("data/train-00001.parquet", range(20, 40)),
        ("*/test*", range(40, 60)),
        ("*", range(60)),
    ],
)
def test_a_glob_selects_files(hub: Hub, glob: str, numbers: range) -> None:
    corpus = load(f"hub:{REPO}@{COMMIT}/{glob}#text", len(numbers))
    assert texts_of(corpus) == [text(i) for i in numbers]
    assert len(hub.downloaded()) == len(numbers) // 20


def test_two_globs_of_a_dataset_share_their_files(hub: Hub) -> None:
    assert texts_of(load(f"hub:{REPO}@{COMMIT}/data/*#text", 40)) == [text(i) for i in range(40)]
    assert texts_of(load()) == [text(i) for i in range(60)]
    assert sorted(hub.downloaded()) == sorted(name for name in FILES if name != "README.md")


def test_a_dataset_can_be_part_of_a_mix(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("".join(f"mine {i}\n" for i in range(30)))
    (tmp_path / "mix.toml").write_text(
        f'[[source]]\npath = "mine.txt"\n[[source]]\ncorpus = "{CORPUS}"\nratio = 2\n'
    )
    texts = texts_of(load(f"mix:{tmp_path}/mix.toml"))
    assert [t for t in texts if not t.startswith("mine")] == [text(i) for i in range(40)]


def test_a_dataset_at_a_commit_is_known_data(hub: Hub) -> None:
    cfg = from_dict({"corpus": CORPUS, "num_titles": 60, "documents": True})
    nothing: Any = None
    evidence = Evidence(
        cfg, load_corpus(cfg), nothing, nothing, [], {}, {}, initial_weights="", evaluate_hash=""
    )
    assert guards.data_known(evidence, True).status == "pass"


# -- the cache


def test_a_second_load_does_not_use_the_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load()
    hub.requests.clear()
    assert load() == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load() == first
    assert hub.requests == []


CHILD = """
import sys
from mainrun.config import from_dict
from mainrun.data.corpus import load_corpus
from mainrun.errors import MainrunError
try:
    corpus = load_corpus(from_dict({"corpus": sys.argv[1], "num_titles": 60, "documents": True}))
    print(corpus.fingerprints["corpus"])
except MainrunError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def child(corpus: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, corpus]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_another_process_reads_the_dataset_offline(hub: Hub) -> None:
    expected = load(shuffle=True).fingerprints["corpus"]
    hub.requests.clear()
    done = child(CORPUS, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.strip() == expected, done.stderr
    assert hub.requests == []


def test_offline_without_the_files_is_refused(hub: Hub) -> None:
    done = child(CORPUS, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"corpus={CORPUS} is not in the cache" in done.stderr and "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["changed", "cut", "removed"])
def test_a_damaged_file_is_downloaded_again(hub: Hub, damage: str) -> None:
    load()
    path = cached("data/train-00001.parquet").resolve()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "cut":
        content = content[:-1]
    path.write_bytes(content)
    if damage == "removed":
        path.unlink()
    hub.requests.clear()
    assert texts_of(load()) == [text(i) for i in range(60)]
    assert hub.downloaded() == ["data/train-00001.parquet"]
    hub.requests.clear()
    assert texts_of(load()) == [text(i) for i in range(60)] and hub.requests == []


def test_a_damaged_file_is_refused_offline(hub: Hub) -> None:
    load()
    path = cached("other/test.parquet").resolve()
    path.write_bytes(path.read_bytes() + b"x")
    done = child(CORPUS, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "is damaged" in done.stderr and "HF_HUB_OFFLINE" in done.stderr


def test_a_damaged_note_is_written_again(hub: Hub) -> None:
    load()
    (note,) = (cache_dir() / "hub").glob("dataset-*.json")
    intact = note.read_text()
    for torn in ("", intact[:100], "{}", "[]", "[1]"):
        note.write_text(torn)
        assert texts_of(load()) == [text(i) for i in range(60)]
        assert note.read_text() == intact
    assert len(hub.downloaded()) == 3


# -- refusals


@pytest.mark.parametrize(
    ("place", "branch", "commit", "fixed"),
    [
        ("", "main", COMMIT, f"hub:{REPO}@{COMMIT}#text"),
        ("@main", "main", COMMIT, f"hub:{REPO}@{COMMIT}#text"),
        ("@main/data/*", "main", COMMIT, f"hub:{REPO}@{COMMIT}/data/*#text"),
        ("@refs/convert/parquet/x/*", "refs/convert/parquet", "f" * 40, f"hub:{REPO}@{'f' * 40}/x/*#text"),
    ],
)
def test_without_a_full_commit_the_current_commit_is_stated(
    hub: Hub, place: str, branch: str, commit: str, fixed: str
) -> None:
    with pytest.raises(CorpusError, match="names no full commit of 40 digits") as e:
        load(f"hub:{REPO}{place}#text")
    assert f"the current commit of {branch} is {commit}; use --set corpus={fixed}" in str(e.value)
    assert hub.downloaded() == []


@pytest.mark.parametrize("place", [COMMIT[:39], COMMIT.upper(), "no-such-branch"])
def test_an_unknown_commit_is_refused(hub: Hub, place: str) -> None:
    with pytest.raises(CorpusError, match=r"names no full commit .* is not known: .* does not have") as e:
        load(f"hub:{REPO}@{place}#text")
    assert place in str(e.value) and hub.downloaded() == []


def test_a_commit_that_the_hub_lacks_is_refused(hub: Hub) -> None:
    with pytest.raises(HubError, match="does not have") as e:
        load(f"hub:{REPO}@{'a' * 40}#text")
    assert "a" * 40 in str(e.value) and REPO in str(e.value)


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        (f"hub:{REPO}@{COMMIT}", "names no column; write hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN"),
        (
            f"hub:texts@{COMMIT}#text",
            "is not a dataset on the hub; write hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN",
        ),
        (f"hub:ünï/çode@{COMMIT}#text", "ünï/çode is not the name of a repository; write OWNER/NAME with"),
        (f"hub:{REPO}@{COMMIT}/*.csv#text", "matches '*.csv'; its parquet files: data/train-00000.parquet,"),
        (f"hub:{REPO}@{COMMIT}/README.md#text", "no parquet file of someone/texts.v1 matches 'README.md'"),
        (
            f"hub:{REPO}@{COMMIT}#txt",
            "has no column 'txt' (did you mean 'text'?); its columns are 'id', 'text'",
        ),
        (f"hub:{REPO}@{COMMIT}#id", "column 'id' contains int64; it must contain strings"),
    ],
)
def test_bad_corpora_are_refused(hub: Hub, corpus: str, says: str) -> None:
    with pytest.raises(UsageError) as e:
        load(corpus)
    assert says in str(e.value) and corpus in str(e.value), str(e.value)
    if "#txt" in corpus:
        assert f"name one of them with hub:{REPO}@{COMMIT}#COLUMN" in str(e.value)


def test_a_file_with_a_wrong_checksum_is_deleted(hub: Hub) -> None:
    hub.wrong["data/train-00001.parquet"] = "ab" * 32
    with pytest.raises(HubError, match=r"its sha256 is .* the hub says abababababababab"):
        load()
    assert not list(cache_dir().rglob("train-00001.parquet"))
    hub.wrong.clear()
    assert len(texts_of(load())) == 60


def test_a_file_without_a_checksum_is_refused(hub: Hub) -> None:
    hub.plain.add("other/test.parquet")
    with pytest.raises(HubError, match=r"gives no sha256 for other/test\.parquet"):
        load()
    assert hub.downloaded() == []


def test_blank_datasets_and_small_datasets_are_refused(hub: Hub) -> None:
    with pytest.raises(CorpusError, match=r"has 60 titles, but num_titles=61; use --set num_titles=60"):
        load(n=61)
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["", None, " "]}), out)
    hub.contents = {"blank.parquet": out.getvalue()}
    with pytest.raises(CorpusError, match="has no texts: all 3 rows are blank"):
        load(f"hub:{REPO}@{'f' * 40}#text", 2)


def test_the_command_line_shows_one_message(hub: Hub, tmp_path: Path) -> None:
    arguments = [
        "train",
        "--preset",
        "demo:baseline",
        "--set",
        f"corpus=hub:{REPO}#text",
        "--out",
        tmp_path / "r",
    ]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    assert COMMIT in result.stderr and not (tmp_path / "r").exists()


@pytest.mark.parametrize("status", slow_unless([401], [401, 403, 404, 500]))
@pytest.mark.parametrize("corpus", [CORPUS, f"hub:{REPO}#text", "hn"])
def test_a_server_that_repeats_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, corpus: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.echo_status = status
    command = [sys.executable, "-m", "mainrun", "train", "--preset", "demo:baseline", "--debug"]
    command += ["--set", f"corpus={corpus}", "--out", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == HubError.exit_code, output
    assert hub.echoed and TOKEN not in output
    assert f"(status {status})" in output and "Traceback" in output


def test_a_reply_without_a_commit_is_refused(hub: Hub) -> None:
    hub.no_commit = True
    with pytest.raises(CorpusError, match=rf"did not return a commit for {REPO} at main"):
        load(f"hub:{REPO}#text")
