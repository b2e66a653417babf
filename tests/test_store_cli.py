"""Tests the output of `mainrun store` for a fake store in memory: columns, numbers and messages."""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from mainrun.errors import ConfigError, MainrunError, RunError, UsageError
from mainrun.store.files import Entry
from mainrun.store.nodes import Damaged, Node, Store
from mainrun.ui import store_cli as cli

KEYS = ["a" * 64, "ab" + "c" * 62, "d" * 64]


def node(place: int, step: int, begins: int, **changes: Any) -> Node:
    whole = Node(
        key=KEYS[place],
        parent=KEYS[place - 1] if begins else "0" * 64,
        root="0" * 64,
        step=step,
        begins=begins,
        tokens_processed=1,
        state=f"state {step}",
        size=1500,
        geometry=[1, 1],
        seconds=60.0,
        run=f"run {step}",
        config={},
        made=900.0,
        rows_sha256="",
    )
    return replace(whole, **changes)


class FakeStore:
    """A store with a chain of three nodes, in which the state of the second node was evicted."""

    def __init__(self) -> None:
        self.nodes = [node(0, 10, 0), node(1, 20, 10), node(2, 30, 20)]
        self.damaged: list[tuple[str, str]] = []
        self.present = {"state 10": Entry(1500, 940.0), "state 30": Entry(2500, 2000.0)}
        self.pins: dict[str, list[str]] = {"batch": [KEYS[2]]}
        self.findings: list[str] = []
        self.fault: OSError | None = None
        self.files = SimpleNamespace(names=lambda folder: set(self.pins) if folder == "pins" else set())

    def __str__(self) -> str:
        return "STORE"

    def summary(self) -> tuple[list[Node], list[tuple[str, str]]]:
        return self.nodes, self.damaged

    def states(self) -> dict[str, Entry]:
        return self.present

    def pinned(self) -> set[str]:
        return {key for keys in self.pins.values() for key in keys}

    def node_keys(self) -> set[str]:
        return {one.key for one in self.nodes} | {key for key, _ in self.damaged}

    def node(self, key: str, *, rows: bool = True) -> Node:
        assert not rows
        for one in self.nodes:
            if one.key == key:
                return one
        raise Damaged("it is torn")

    def verify(self) -> list[str]:
        return self.findings

    def gc(self) -> dict[str, int]:
        self.write()
        return {"damaged": 0, "rows": 1234}

    def pin(self, name: str, keys: list[str]) -> None:
        self.write()
        self.pins[name] = keys

    def unpin(self, name: str) -> None:
        self.write()
        del self.pins[name]

    def write(self) -> None:
        if self.fault:
            raise self.fault


@pytest.fixture
def opened() -> list[Any]:
    """Return the arguments with which the store was opened."""
    return []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, opened: list[Any]) -> FakeStore:
    store = FakeStore()

    def open_store(place: Any, out: Any, size: str = "20GB", *, must: bool = False) -> FakeStore:
        opened.append((place, out, size, must))
        return store

    monkeypatch.setattr(cli, "open_store", open_store)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    return store


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    shown: list[Any] = []
    monkeypatch.setattr(cli, "show_table", lambda head, lines: shown.append((head, lines)))
    return shown


# -- ls and du


def test_ls_has_a_row_for_each_node(
    store: FakeStore, tables: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store.damaged = [("e" * 64, "it is torn")]
    cli.ls()
    root = "0" * 12
    assert tables == [
        (
            ["node", "root", "step", "state", "by", "made", "used"],
            [
                ["a" * 12, root, "10", "1.5kB", "run 10", "1:40 ago", "1:00 ago"],
                ["ab" + "c" * 10, root, "20", "evicted", "run 20", "1:40 ago", ""],
                ["d" * 12, root, "30", "1.5kB, pinned", "run 30", "1:40 ago", "in the future"],
            ],
        )
    ]
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"damaged: {'e' * 12}: it is torn\n"


def test_ls_gives_every_figure_as_json(
    store: FakeStore, tables: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store.damaged = [("e" * 64, "it is torn")]
    cli.ls(as_json=True)
    captured = capsys.readouterr()
    given = json.loads(captured.out)
    common = {"root": "0" * 64, "size": 1500, "seconds": 60.0, "made": 900.0}
    assert given["nodes"] == [
        common
        | {
            "key": KEYS[0],
            "step": 10,
            "begins": 0,
            "run": "run 10",
            "state": True,
            "used": 940.0,
            "pinned": False,
        },
        common
        | {
            "key": KEYS[1],
            "step": 20,
            "begins": 10,
            "run": "run 20",
            "state": False,
            "used": None,
            "pinned": False,
        },
        common
        | {
            "key": KEYS[2],
            "step": 30,
            "begins": 20,
            "run": "run 30",
            "state": True,
            "used": 2000.0,
            "pinned": True,
        },
    ]
    assert given["damaged"] == [{"key": "e" * 64, "why": "it is torn"}] and given.keys() == {
        "nodes",
        "damaged",
    }
    assert tables == [] and captured.err == ""


@pytest.mark.parametrize(
    ("state", "pinned", "text"),
    [
        (True, False, "1.5kB"),
        (True, True, "1.5kB, pinned"),
        (False, False, "evicted"),
        (False, True, "evicted, pinned"),
    ],
)
def test_the_state_of_a_node_is_its_size_or_evicted(state: bool, pinned: bool, text: str) -> None:
    assert cli._state({"size": 1500, "state": state, "pinned": pinned}) == text


@pytest.mark.parametrize(
    ("when", "text"),
    [(None, ""), (1000.0, "0:00 ago"), (999.0, "0:01 ago"), (1001.0, "in the future"), (0.0, "16:40 ago")],
)
def test_a_time_is_shown_as_how_long_ago(
    monkeypatch: pytest.MonkeyPatch, when: float | None, text: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert cli._ago(when) == text


def test_du_counts_the_steps_that_lead_to_a_state(
    store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.nodes.append(node(0, 45, 40, key="f" * 64, root="1" * 64, state="gone"))
    store.nodes.append(node(0, 8, 0, key="e" * 64, state="gone too"))
    store.damaged = [("e" * 64, "it is torn")]
    cli.du(as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "store": "STORE",
        "nodes": 5,
        "damaged": 1,
        "states": 2,
        "bytes": 4000,
        "roots": 2,
        "steps": 30,
        "seconds": 180.0,
    }
    cli.du()
    assert capsys.readouterr().out == (
        "STORE: 4.0kB in 2 states of 5 nodes\n30 steps that need not be trained again: 3:00 of training\n"
    )


def test_du_separates_thousands(store: FakeStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.present |= {f"other {i}": Entry(0, 0.0) for i in range(998)}
    store.nodes[0] = replace(store.nodes[0], step=1234)
    cli.du()
    out = capsys.readouterr().out
    assert "1,000 states of 3 nodes" in out and "1,254 steps" in out


# -- gc, verify, pin, unpin


def test_gc_prints_what_it_removed(
    store: FakeStore, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.gc(size="5GB")
    assert capsys.readouterr().out == "removed: 0 damaged, 1,234 rows\n"
    cli.gc(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"damaged": 0, "rows": 1234}
    assert opened == [(None, Path("runs"), "5GB", True), (None, Path("runs"), "20GB", True)]


def test_verify_prints_that_everything_is_intact(
    store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.nodes = [node(0, 10, 0, key=f"{i:064}") for i in range(1000)]
    cli.verify()
    assert capsys.readouterr().out == "1,000 nodes; no file is damaged\n"
    cli.verify(as_json=True)
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_prints_a_finding_a_line_and_fails(
    store: FakeStore, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    store.findings = ["one is torn", "two is gone"]
    with pytest.raises(MainrunError, match=r"^found 2 faults;.*mainrun store gc"):
        cli.verify(as_json=as_json)
    out = capsys.readouterr().out
    assert json.loads(out) == store.findings if as_json else out == "one is torn\ntwo is gone\n"


def test_a_node_is_pinned_by_the_beginning_of_its_key(
    store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.pin("ab")
    assert store.pins[f"node-{KEYS[1]}"] == [KEYS[1]]
    assert capsys.readouterr().out == f"pinned: {KEYS[1][:12]}, step 20 of run 20\n"
    cli.unpin("ab")
    assert store.pins.keys() == {"batch"}
    assert capsys.readouterr().out == f"not pinned: {KEYS[1][:12]}\n"


@pytest.mark.parametrize(("beginning", "word"), [("a", "'a'"), ("b", "'b'"), ("", "''")])
def test_a_beginning_of_a_key_must_match_one_node(store: FakeStore, beginning: str, word: str) -> None:
    several = beginning != "b"
    with pytest.raises(UsageError, match=word) as e:
        cli._node(store, beginning)  # type: ignore[arg-type]
    assert ("mainrun store ls" in str(e.value)) is not several and "STORE" in str(e.value)


def test_a_damaged_node_is_not_pinned(store: FakeStore) -> None:
    store.damaged = [("e" * 64, "it is torn")]
    with pytest.raises(RunError, match=f"^node {'e' * 12} .*it is torn.*mainrun store gc"):
        cli.pin("e")


@pytest.mark.parametrize(
    ("beginning", "words"),
    [("a", "'a' is not unique"), ("d", "'d' is not pinned"), ("batch", "'batch' is not pinned")],
)
def test_only_one_pinned_node_is_unpinned(store: FakeStore, beginning: str, words: str) -> None:
    store.pins |= {f"node-{key}": [key] for key in KEYS[:2]}
    with pytest.raises(UsageError, match=f"{words}.*STORE"):
        cli.unpin(beginning)
    assert len(store.pins) == 3


@pytest.mark.parametrize(
    "command", [cli.gc, lambda: cli.pin("d"), lambda: cli.unpin("d")], ids=["gc", "pin", "unpin"]
)
@pytest.mark.parametrize(
    ("fault", "word"), [(OSError(errno.EROFS, "read-only"), "read-only"), (OSError("odd"), "odd")]
)
def test_a_store_that_cannot_be_written_is_named(
    store: FakeStore, command: Callable[[], None], fault: OSError, word: str
) -> None:
    store.pins[f"node-{KEYS[2]}"], store.fault = [KEYS[2]], fault
    with pytest.raises(RunError, match=rf"STORE cannot be written \({word}\).*--store"):
        command()


# -- audit


def audited(monkeypatch: pytest.MonkeyPatch, *findings: tuple[Node, str, str]) -> list[Any]:
    """Fake the results of an audit, and return the arguments of its calls."""
    asked: list[Any] = []

    def audit(*args: Any) -> list[SimpleNamespace]:
        asked.append(args)
        return [SimpleNamespace(node=one, status=status, why=why) for one, status, why in findings]

    monkeypatch.setitem(sys.modules, "mainrun.checks.audit", SimpleNamespace(audit=audit))
    return asked


def test_audit_prints_a_segment_a_line(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = audited(monkeypatch, (store.nodes[0], "same", ""), (store.nodes[1], "skipped", "another machine"))
    cli.audit(segments=7, seed=5, reach=9)
    assert asked == [(store, 7, 5, 9)]
    assert capsys.readouterr().out == (
        f"same     {'a' * 12}  steps 1 to 10 of run 10\n"
        f"skipped  {KEYS[1][:12]}  steps 11 to 20 of run 20: another machine\n"
    )


def test_audit_gives_every_finding_as_json(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = audited(monkeypatch, (store.nodes[1], "skipped", "another machine"))
    cli.audit(as_json=True)
    assert asked == [(store, 3, None, 10_000)]
    assert json.loads(capsys.readouterr().out) == [
        {
            "key": KEYS[1],
            "begins": 10,
            "step": 20,
            "run": "run 20",
            "status": "skipped",
            "why": "another machine",
        }
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_audit_fails_where_one_differs(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    audited(monkeypatch, (store.nodes[0], "same", ""), (store.nodes[1], "differs", "the weights"))
    with pytest.raises(MainrunError, match="differs from the store"):
        cli.audit(as_json=as_json)
    assert "differs" in capsys.readouterr().out


def test_audit_of_an_empty_store_says_so(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audited(monkeypatch)
    cli.audit()
    assert capsys.readouterr().out == "nothing to audit: the store has no nodes\n"
    cli.audit(as_json=True)
    assert json.loads(capsys.readouterr().out) == []


# -- options


@pytest.mark.parametrize(
    ("option", "accepted", "refused"),
    [
        ("--segments", [1, 1_000_000], [0, 1_000_001]),
        ("--seed", [0, 10**9], [-1]),
        ("--reach", [1, 10**9], [0]),
    ],
)
def test_the_numbers_of_audit_have_limits(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, option: str, accepted: list[int], refused: list[int]
) -> None:
    asked = audited(monkeypatch)
    for value in accepted:
        assert CliRunner().invoke(cli.app, ["audit", option, str(value)]).exit_code == 0
        assert value in asked[-1]
    for value in refused:
        assert CliRunner().invoke(cli.app, ["audit", option, str(value)]).exit_code == 2
    assert len(asked) == len(accepted)


COMMANDS: dict[str, list[str]] = {
    "ls": [],
    "du": [],
    "gc": ["--store-size", "1GB"],
    "verify": [],
    "audit": [],
    "pin": ["d"],
    "unpin": ["d"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_needs_an_existing_store(
    store: FakeStore, opened: list[Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    audited(monkeypatch)
    store.pins[f"node-{KEYS[2]}"] = [KEYS[2]]
    result = CliRunner().invoke(
        cli.app, [command, *COMMANDS[command], "--store", "PLACE", "--out", "elsewhere"]
    )
    assert result.exit_code == 0, result.output
    assert opened == [("PLACE", Path("elsewhere"), "1GB" if command == "gc" else "20GB", True)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ls", "--store PLACE|The store: a folder, or a URL"),
        ("gc", "--store-size SIZE|Evict the least recently used"),
        ("audit", "--reach STEPS|Maximum number of steps|Number of segments|the same segments"),
        ("pin", "NODE|a unique prefix"),
        ("unpin", "NODE|a unique prefix"),
    ],
)
def test_the_help_names_each_option_and_its_value(command: str, words: str) -> None:
    text = " ".join(CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output.split())
    for word in words.split("|"):
        assert word in text


def test_no_command_prints_json_or_a_traceback_unless_asked() -> None:
    for name in COMMANDS:
        parameters = inspect.signature(getattr(cli, name)).parameters
        assert all(
            parameters[option].default is False for option in ("as_json", "debug") if option in parameters
        )
        assert parameters["out"].default == Path("runs") and parameters["place"].default is None


# -- opening the store


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("10", 10),
        ("10B", 10),
        ("1k", 1000),
        ("1KB", 1000),
        ("1.5 MB", 1_500_000),
        ("20GB", 20 * 10**9),
        (" 2t ", 2 * 10**12),
        ("1" * 15, int("1" * 15)),
        ("0." + "5" * 15, 0),
        ("2g", 2 * 10**9),
    ],
)
def test_a_size_is_a_number_of_bytes_with_a_letter(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "10X", "1e9", "1.GB", "1" * 16, "0." + "5" * 16, "10 GiB", "1,5GB", "k"]
)
def test_any_other_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--store-size.*like 20GB"):
        cli.parse_size(text)


def test_a_size_that_is_refused_is_cut_to_eighty_characters() -> None:
    for length, whole in ((78, True), (79, False)):
        with pytest.raises(UsageError) as e:
            cli.parse_size("x" * length)
        assert ("x" * length in str(e.value)) is whole


def test_the_store_is_next_to_the_runs_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAINRUN_STORE", raising=False)
    assert str(cli.open_store(None, tmp_path)) == f"{tmp_path}/.store"
    assert cli.open_store(None, tmp_path).size == 20 * 10**9
    assert str(cli.open_store(f"file:{tmp_path}/other", tmp_path, "5k")) == f"{tmp_path}/other"
    assert cli.open_store(str(tmp_path / "other"), tmp_path, "5k").size == 5000
    monkeypatch.setenv("MAINRUN_STORE", f"{tmp_path}/third")
    assert str(cli.open_store(None, tmp_path)) == f"{tmp_path}/third"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no store at {tmp_path}/store.*--store or --out"):
        cli.open_store(str(tmp_path / "store"), tmp_path, must=True)
    Store(tmp_path / "store").begin("a" * 64, {})
    assert cli.open_store(str(tmp_path / "store"), tmp_path, must=True).files.exists("store.json")


@pytest.mark.parametrize("place", ["", " ", "\t"])
def test_an_empty_place_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="--store ''"):
        cli.open_store(place, tmp_path)


@pytest.mark.parametrize(
    ("place", "variable", "option"), [("a\0b", "", "--store"), (None, "a" * 256, "the store")]
)
def test_an_invalid_path_is_reported_with_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None, variable: str, option: str
) -> None:
    monkeypatch.setenv("MAINRUN_STORE", variable)
    with pytest.raises(UsageError, match=f"^got {option} '"):
        cli.open_store(place, tmp_path)


@pytest.mark.parametrize(
    "place", ["~no-such-user/a", "file:~no-such-user/a", "file://~no-such-user/a", "local:~no-such-user/a"]
)
def test_the_home_of_an_unknown_user_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match=r"--store.*~"):
        cli.open_store(place, tmp_path)


def test_a_file_in_the_place_of_out_is_reported_as_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAINRUN_STORE", raising=False)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/runs"):
        with pytest.raises(RunError, match=f"cannot write {out}: "):
            cli.open_store(None, out)
    with pytest.raises(ConfigError, match=f"store {tmp_path}/file is not a folder"):
        cli.open_store(str(tmp_path / "file"), tmp_path / "runs")
    cli.open_store(str(tmp_path / "store"), tmp_path / "file")


def test_a_read_only_store_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a store does not require write permission."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    for out in (tmp_path, tmp_path / "none"):
        assert str(cli.open_store(str(out / ".store"), out)) == f"{out}/.store"
    assert str(cli.open_store("memory://nobody/store", tmp_path)) == "memory://nobody/store"


@pytest.mark.parametrize("error", [RuntimeError("the key is wrong"), KeyError("host")])
def test_any_error_of_a_store_becomes_a_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from mainrun.store import nodes

    def fail(place: str, size: int) -> None:
        raise error

    monkeypatch.setattr(nodes, "Store", fail)
    with pytest.raises(
        UsageError,
        match=rf"^store 's3://a' cannot be opened \({type(error).__name__}: .*a URL that fsspec can open",
    ):
        cli._open("s3://a", "20GB")


@pytest.mark.parametrize(
    ("place", "why", "whole"),
    [("a" * 78, "b", True), ("a" * 79, "b", False), ("a", "b" * 186, True), ("a", "b" * 187, False)],
)
def test_a_message_cuts_long_places_and_reasons(
    monkeypatch: pytest.MonkeyPatch, place: str, why: str, whole: bool
) -> None:
    from mainrun.store import nodes

    def fail(place: str, size: int) -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(nodes, "Store", fail)
    with pytest.raises(UsageError) as e:
        cli._open(place, "20GB")
    assert ("characters ..." not in str(e.value)) is whole


def test_an_error_of_mainrun_stays_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from mainrun.store import nodes

    def fail(place: str, size: int) -> None:
        raise ConfigError("is not a folder")

    monkeypatch.setattr(nodes, "Store", fail)
    with pytest.raises(ConfigError, match=r"^is not a folder$"):
        cli._open("a", "20GB")
