"""Tests that the store keeps every bit, reports damage, never uses damaged files, and keeps intact ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import examples
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainrun.errors import ConfigError
from mainrun.store import lineage
from mainrun.store.files import Folder, Remote, open_files
from mainrun.store.leases import Leases
from mainrun.store.nodes import GRACE, Damaged, Node, Refused, Store

BEGUN = {
    "fields": {"seed": 1},
    "data": {"train": "a"},
    "versions": {"torch": "2"},
    "machine_class": {"threads": 1},
}
ROOT = lineage.root(BEGUN)
HOUR = 3600.0
STEPS = (10, 20, 30)


def key(step: int, chain: str = "a") -> str:
    return hashlib.sha256(f"{chain} {step}".encode()).hexdigest() if step else ROOT


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"model/a": torch.randn(5, 3, generator=generator), "optimizer/a/step": torch.tensor(float(step))}


def row(step: int) -> dict[str, Any]:
    return {"event": "step", "step": step, "loss": 1 / step, "grad_norm": float("nan"), "note": "ü\r\u2028"}


def node(step: int, begins: int | None = None, **changes: Any) -> Node:
    begins = step - 10 if begins is None else begins
    rows = tuple(row(i) for i in range(begins + 1, step + 1))
    whole = Node(
        key=key(step),
        parent=key(begins),
        root=ROOT,
        step=step,
        begins=begins,
        tokens_processed=step * 100,
        state="",
        size=0,
        geometry=[16, 1],
        seconds=0.1 + step,
        run="run ü",
        config={"lr": 0.1, "preset": "tiny"},
        made=time.time(),
        rows_sha256="",
        rows=rows,
    )
    return replace(whole, **changes)


def save(store: Store, *steps: int, **changes: Any) -> list[Node]:
    store.begin(ROOT, BEGUN)
    return [store.save(node(step, **changes), tensors(step)) for step in steps]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(t: Tensor) -> tuple[Any, ...]:
        return t.dtype, t.shape, bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy())

    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def usable(store: Store) -> set[int]:
    """Return the steps from which a run could continue, and check that their states are unchanged."""
    found = set()
    for step in STEPS:
        try:
            there = store.node(key(step))
            past = list(store.history(there))
            state = store.load(there)
        except Damaged:
            continue
        assert json.dumps([r for part in past[::-1] for r in part.rows]) == json.dumps(
            [row(i) for i in range(1, step + 1)]
        )
        assert there.tokens_processed == step * 100 and same(state, tensors(step)), (
            "what is not what was saved was believed"
        )
        found.add(step)
    return found


def age(store: Store, ages: dict[str, float]) -> None:
    """Pretend that each state was last used the given number of seconds ago."""
    for state, seconds in ages.items():
        os.utime(Path(str(store)) / f"states/{state}.safetensors", (time.time() - seconds,) * 2)


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield {
        "folder": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{tmp_path.name}/store",
    }[request.param]
    if request.param == "memory":
        with suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# -- kinds of stores


def test_every_kind_of_store_has_the_same_methods(place: str, tmp_path: Path) -> None:
    files = open_files(place)
    assert (
        files.names("") == files.names("a") == set() and files.list("a") == {} and not files.exists("a/one")
    )
    with pytest.raises(FileNotFoundError):
        files.read("a/one")
    files.write("a/one", b"first\nsecond\n")
    files.write("top", b"")
    assert (
        files.read("a/one") == b"first\nsecond\n"
        and files.first_line("a/one") == b"first\n"
        and files.read("top") == b""
    )
    files.write("a/one", b"other")
    assert files.read("a/one") == b"other" and files.first_line("a/one").rstrip() == b"other"
    with files.new() as path:
        path.write_bytes(b"x" * 1000)
        files.put(path, "b/two")
    assert not path.exists() and files.read("b/two") == b"x" * 1000
    with files.local("b/two") as path:
        assert path.read_bytes() == b"x" * 1000
    assert (
        files.names("a") == {"one"}
        and {"a", "b", "top"} <= files.names("") <= {"a", "b", "top", "new"}
        and files.names("new") == set()
    )
    before = files.list("b")["two"]
    assert before.size == 1000 and abs(before.modified - time.time()) < 60
    time.sleep(0.02)
    files.touch("b/two")
    assert files.list("b")["two"].modified > before.modified and files.read("b/two") == b"x" * 1000
    for name in ("a/one", "b", "never/was"):
        files.remove(name)
    assert not files.exists("a/one") and not files.exists("b/two") and files.exists("top")


def test_a_folder_may_be_written_in_several_ways(tmp_path: Path) -> None:
    for place in (tmp_path, f"file://{tmp_path}", f"file:{tmp_path}", f"local:{tmp_path}"):
        assert isinstance(open_files(place), Folder) and str(open_files(place)) == str(tmp_path)
    assert str(open_files("file:here/store")) == "here/store" and str(open_files("odd:name")) == "odd:name"
    assert str(open_files("~/store")) == str(open_files("file:~/store")) == str(Path.home() / "store")
    assert isinstance(open_files("memory://x"), Remote) and str(open_files("memory://x")) == "memory://x"


def test_recording_a_use_does_not_read_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state in a remote store is read only when it is loaded."""
    store = Store(f"memory://{tmp_path.name}/store")
    nodes = save(store, *STEPS)
    memory, moved = type(fsspec.filesystem("memory")), 0
    original = {name: getattr(memory, name) for name in ("pipe_file", "put_file", "cat_file", "get_file")}

    def count(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal moved
            found = original[name](self, *args, **kwargs)
            moved += {
                "pipe_file": lambda: len(args[1]),
                "cat_file": lambda: len(found),
                "put_file": lambda: Path(args[0]).stat().st_size,
                "get_file": lambda: Path(args[1]).stat().st_size,
            }[name]()
            return found

        return call

    for name in original:
        monkeypatch.setattr(memory, name, count(name))
    used = store.states()[nodes[0].state].modified
    time.sleep(0.02)
    store.touch(nodes[0])
    assert moved == 0 and store.states()[nodes[0].state].modified > used
    store.load(nodes[0])
    assert moved == nodes[0].size
    assert store.states().keys() == {node.state for node in nodes} and store.verify() == []
    store.files.remove(f"states/{nodes[0].state}.safetensors")
    assert not any(
        nodes[0].state in path for path in fsspec.filesystem("memory").find(f"/{tmp_path.name}")
    ), "no mark stays behind"


def test_an_existing_file_is_not_created_again(place: str) -> None:
    files = open_files(place)
    assert files.create("a/one", b"first") and not files.create("a/one", b"second")
    assert files.read("a/one") == b"first"
    files.remove("a/one")
    assert files.create("a/one", b"second") and files.read("a/one") == b"second"


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_of_many_threads_that_create_a_file_one_succeeds(tmp_path: Path, scheme: str) -> None:
    """The store must not use fsspec's local files, which do not check and create a file atomically."""
    files, ready = open_files(f"{scheme}{tmp_path}/store"), threading.Barrier(4)

    def create(me: int) -> list[bool]:
        won = []
        for i in range(12):
            ready.wait()
            won.append(files.create(f"a/{i}", b"%d" % me * 5000))
        return won

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(create, range(4)))
    for i in range(12):
        (winner,) = [me for me in range(4) if won[me][i]]
        assert files.read(f"a/{i}") == b"%d" % winner * 5000


def test_create_works_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    files = Folder(tmp_path)
    assert (
        files.create("a/one", b"first")
        and not files.create("a/one", b"second")
        and files.read("a/one") == b"first"
    )


def test_other_users_can_read_the_files(store: Store) -> None:
    """A team shares a store, so the store's files get the usual permissions of the writer's files."""
    (one,) = save(store, 10)
    folder = Path(str(store))
    (folder / "plain").touch()
    Leases(store.files).acquire(key(20)).release(unfinished=True)  # type: ignore[union-attr]
    expected = stat.S_IMODE((folder / "plain").stat().st_mode)
    names = [
        "store.json",
        f"nodes/{one.key}",
        f"states/{one.state}.safetensors",
        f"roots/{ROOT}",
        f"leases/{key(20)}.000001",
    ]
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in names} == dict.fromkeys(
        names, expected
    )


def test_a_reader_never_sees_a_partly_written_file(tmp_path: Path) -> None:
    files, over, seen = Folder(tmp_path), threading.Event(), set()
    files.write("one", b"a" * 300_000)

    def look() -> None:
        while not over.is_set():
            seen.add(files.read("one"))

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(20):
        files.write("one", (b"a", b"b")[i % 2] * 300_000)
    over.set()
    thread.join()
    assert seen <= {b"a" * 300_000, b"b" * 300_000}


class Moody(MemoryFileSystem):
    """An fsspec file system that temporarily cannot read some files, and raises its own exceptions."""

    protocol = "moody"
    store: dict[str, Any] = {}  # noqa: RUF012 - as fsspec does
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    withheld: str | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("moody://").strip("/") if path.strip("/") else ""

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._mood(path)
        return super().cat_file(path, *args, **kwargs)

    def get_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._mood(path)
        return super().get_file(path, *args, **kwargs)

    def _mood(self, path: str) -> None:
        if Moody.withheld and Moody.withheld in path:
            raise RuntimeError("the network is down")


@pytest.fixture
def moody() -> Iterator[Store]:
    fsspec.register_implementation("moody", Moody, clobber=True)
    yield Store("moody://store")
    Moody.withheld = None
    Moody.store.clear()
    Moody.pseudo_dirs[:] = [""]


def test_every_error_of_fsspec_becomes_an_os_error(moody: Store) -> None:
    save(moody, *STEPS)
    Moody.withheld = "store"
    with pytest.raises(OSError, match="RuntimeError: the network is down"):
        moody.files.read("store.json")
    with pytest.raises(
        ConfigError,
        match=r"moody://store cannot be read \(RuntimeError: the network is down\); choose another",
    ):
        Store("moody://store")


def test_gc_keeps_what_cannot_be_read_now(moody: Store) -> None:
    """An unreadable node may be intact and may need any state and any rows, so gc removes none of them."""
    nodes = save(moody, *STEPS, made=time.time() - 2 * HOUR)
    for file in Moody.store.values():
        file.created -= type(file.created - file.created)(hours=2)
    moody.files.remove(f"states/{nodes[0].state}.safetensors")
    Moody.withheld = f"nodes/{key(20)}"
    assert usable(moody) == set()
    assert any(re.search(rf"node {key(20)[:12]}: the file cannot be read", line) for line in moody.verify())
    with pytest.raises(Refused, match="cannot be read"):
        save(moody, 20)
    assert not any(moody.gc().values())
    Moody.withheld = f"states/{nodes[1].state}"
    assert usable(moody) == {30}
    assert [line for line in moody.verify() if "cannot be read" in line] and not any(moody.gc().values())
    Moody.withheld = None
    assert usable(moody) == {20, 30} and moody.verify() == []


@pytest.mark.parametrize("url", ["nosuch://place", "nosuch://"])
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"store '{url}' cannot be opened .*fsspec"):
        Store(url)


# -- saving and loading


def test_every_bit_of_a_state_comes_back(place: str) -> None:
    """The states include NaNs with payloads, negative zeros, subnormals, views, scalars and empty tensors."""
    raw = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
    ]
    state = {str(dtype): raw.clone().view(dtype) for dtype in dtypes}
    state |= {
        "nan": torch.tensor([0x7FC00001, -0x80000000, 1], dtype=torch.int32).view(torch.float32),
        "bool": raw > 127,
    }
    state |= {
        "transposed": raw.clone().view(8, 8).T,
        "strided": raw.clone()[::3],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
    }
    store = Store(place)
    store.begin(ROOT, BEGUN)
    store.save(node(10), state)
    again = Store(place)
    assert same(again.load(again.node(key(10))), state)


def test_a_node_comes_back_with_its_rows(place: str) -> None:
    store = Store(place)
    saved = save(store, *STEPS)
    again = Store(place)
    for before in saved:
        found = again.node(before.key)
        assert json.dumps(found.rows) == json.dumps([row(i) for i in range(before.step - 9, before.step + 1)])
        assert (
            replace(found, rows=()) == replace(again.node(before.key, rows=False), rows=())
            and found.state == before.state
        )
        assert (found.run, found.config, found.seconds) == (
            "run ü",
            {"lr": 0.1, "preset": "tiny"},
            0.1 + before.step,
        )
    assert again.node_keys() == {key(step) for step in STEPS} and set(again.states()) == {
        n.state for n in saved
    }
    assert [n.step for n in again.summary()[0]] == list(STEPS) and again.summary()[1] == []
    assert list(again.roots()) == [(ROOT, BEGUN)] and again.verify() == [] and usable(again) == set(STEPS)
    assert not any(again.gc().values())


def test_nothing_is_created_before_the_first_node(tmp_path: Path, place: str) -> None:
    store = Store(place)
    assert (
        store.summary() == ([], [])
        and store.verify() == []
        and not any(store.gc().values())
        and store.evict() == []
    )
    with pytest.raises(Damaged, match="the file does not exist"):
        store.node(key(10))
    assert list(tmp_path.iterdir()) == [] and not store.files.exists("")


def test_the_same_node_twice_is_one(place: str) -> None:
    store = Store(place)
    (first,) = save(store, 10)
    before = {name: store.files.read(f"nodes/{name}") for name in store.node_keys()}
    (second,) = save(store, 10, run="another", made=1.0)
    assert second.state == first.state and second.run == "run ü", "what is there is what it gives"
    assert {name: store.files.read(f"nodes/{name}") for name in store.node_keys()} == before and len(
        store.states()
    ) == 1


def test_equal_states_of_two_nodes_are_one_file(store: Store) -> None:
    store.begin(ROOT, BEGUN)
    for step in STEPS:
        store.save(node(step), tensors(0))
    assert len(store.states()) == 1 and store.verify() == []


def test_other_bits_under_the_same_key_are_refused(place: str) -> None:
    store = Store(place)
    save(store, 10)
    with pytest.raises(Refused, match=r"a different state for step 10 \(by run ü\).*audit"):
        store.save(node(10), tensors(11))
    assert (
        same(store.load(store.node(key(10))), tensors(10))
        and len(store.states()) == 1
        and store.verify() == []
    )


def test_a_refused_writer_leaves_nothing(place: str) -> None:
    store = Store(place)
    save(store, 10)

    def refuse() -> None:
        raise Refused("no more")

    with pytest.raises(Refused, match="no more"):
        store.save(node(20), tensors(20), refuse)
    assert store.node_keys() == {key(10)} and len(store.states()) == 1


def test_permission_is_checked_again_after_the_state_is_written(store: Store) -> None:
    """Writing a large state may take longer than a lease lasts."""
    store.begin(ROOT, BEGUN)

    def once(asked: list[int]) -> None:
        asked.append(1)
        if len(asked) > 1:
            raise Refused("too late")

    asked: list[int] = []
    with pytest.raises(Refused, match="too late"):
        store.save(node(10), tensors(10), lambda: once(asked))
    assert store.node_keys() == set()


def test_saving_again_restores_an_evicted_state(place: str) -> None:
    store = Store(place)
    nodes = save(store, *STEPS)
    store.size = nodes[0].size * 2
    (gone,) = store.evict({nodes[1].key, nodes[2].key})
    assert gone == nodes[0].state and usable(store) == {20, 30} and store.verify() == []
    store.save(node(10), tensors(10))
    assert usable(store) == set(STEPS)


@pytest.mark.parametrize("damage", ["flipped", "cut", "a folder"])
def test_saving_again_restores_a_damaged_state(store: Store, damage: str) -> None:
    """Saving verifies the content of an existing file, even if the file has the right size."""
    nodes = save(store, *STEPS)
    path = Path(str(store)) / f"states/{nodes[1].state}.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
        store.gc()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert usable(store) == {10, 30}
    save(store, 20)
    assert usable(store) == set(STEPS) and store.verify() == []


def test_a_node_bigger_than_the_budget_is_refused(place: str) -> None:
    store = Store(place, size=100)
    with pytest.raises(
        Refused, match=r"the state has \d+ bytes, but the store may hold at most 100; raise --store-size"
    ):
        save(store, 10)
    assert store.node_keys() == set() and store.states() == {} and store.files.names("new") == set()


def test_a_history_goes_back_to_the_given_step(store: Store) -> None:
    nodes = save(store, *STEPS)
    for since, steps in (
        (0, [30, 20, 10]),
        (9, [30, 20, 10]),
        (10, [30, 20]),
        (19, [30, 20]),
        (20, [30]),
        (29, [30]),
    ):
        assert [part.step for part in store.history(nodes[2], since)] == steps


def test_a_history_with_a_missing_node_names_it(store: Store) -> None:
    nodes = save(store, *STEPS)
    store.files.remove(f"nodes/{key(20)}")
    with pytest.raises(
        Damaged, match=rf"the rows before step 20 are lost: node {key(20)[:12]}: the file does not exist"
    ):
        list(store.history(nodes[2]))
    assert [part.step for part in store.history(nodes[2], 20)] == [30], "who is there already needs no more"


def test_many_threads_that_save_one_node_leave_one(store: Store) -> None:
    store.begin(ROOT, BEGUN)
    with ThreadPoolExecutor(4) as pool:
        for step in STEPS:
            found = list(
                pool.map(lambda run, step=step: store.save(node(step, run=run), tensors(step)), "abcd")
            )
            assert {(n.state, n.run) for n in found} == {
                (store.node(key(step)).state, store.node(key(step)).run)
            }, "each is told whose"
    assert usable(store) == set(STEPS) and store.verify() == [] and store.files.names("new") == set()


def test_savers_and_cleaners_do_not_disturb_each_other(store: Store) -> None:
    """Evict, gc and verify run while other threads save and load.

    A missing state is the only damage that may occur.
    """
    nodes = save(store, *STEPS)
    store.size, over = int(nodes[0].size * 1.5), threading.Event()

    def clean() -> list[str]:
        found = []
        while not over.is_set():
            store.gc()
            found += store.verify()
            store.summary()
        return found

    def train(steps: tuple[int, ...]) -> None:
        for _ in range(8):
            save(store, *steps)
            usable(store)

    with ThreadPoolExecutor(3) as pool:
        cleaner = pool.submit(clean)
        try:
            list(pool.map(train, (STEPS, STEPS[::-1])))
        finally:
            over.set()
        assert cleaner.result() == []


# -- damage is reported and never used


def state_of(store: Store, step: int) -> Path:
    return Path(str(store)) / f"states/{store.node(key(step)).state}.safetensors"


def node_of(store: Store, step: int) -> Path:
    return Path(str(store)) / f"nodes/{key(step)}"


def root_of(store: Store) -> Path:
    return Path(str(store)) / f"roots/{ROOT}"


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def header(path: Path) -> float:
    """Return the length of the first line of a node's file, as a fraction of the size of the file."""
    return (len(path.read_bytes().split(b"\n")[0]) - 1) / path.stat().st_size


def rewrite(store: Store, step: int, **changes: Any) -> None:
    """Change a node as a forger would, with valid checksums."""
    node_of(store, step).write_bytes(replace(store.node(key(step)), **changes).dump())


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


LOST = rf"node {key(30)[:12]} \(step 30\): the rows before step 20 are lost with {key(20)[:12]}"
TORN = r"state [0-9a-f]{12} \(step 20 of run ü\): incomplete or changed after it was written"
NODE = rf"node {key(20)[:12]}: "
UNROOTED = rf"the file of its root {ROOT[:12]} is lost"
# Each row has the damage, the report of verify, the steps that remain usable, the files that gc removes, and
# the report of verify after gc.
Damage = tuple[Callable[[Store], Any], str, set[int], set[str], str | None]
DAMAGES: dict[str, Damage] = {
    **{
        f"state flipped at {at}": (
            lambda s, at=at: flip(state_of(s, 20), at),
            TORN,
            {10, 30},
            {"state"},
            None,
        )
        for at in (0.0, 0.05, 0.3, 0.6, 0.9, 1.0)
    },
    **{
        f"state cut at {at}": (lambda s, at=at: cut(state_of(s, 20), at), TORN, {10, 30}, {"state"}, None)
        for at in (0.0, 0.02, 0.3, 0.9, 0.999)
    },
    "state grew": (
        lambda s: state_of(s, 20).write_bytes(state_of(s, 20).read_bytes() + b"x"),
        TORN,
        {10, 30},
        {"state"},
        None,
    ),
    "another's state": (
        lambda s: shutil.copy(state_of(s, 10), state_of(s, 20)),
        TORN,
        {10, 30},
        {"state"},
        None,
    ),
    "a folder for a state": (lambda s: folder_instead(state_of(s, 20)), TORN, {10, 30}, {"state"}, None),
    **{
        f"node line flipped at {at}": (
            lambda s, at=at: flip(node_of(s, 20), at * header(node_of(s, 20))),
            NODE + "(the first line|the file is incomplete)",
            {10},
            {"node"},
            LOST,
        )
        for at in (0.0, 0.1, 0.5, 0.8, 1.0)
    },
    "node rows flipped": (
        lambda s: flip(node_of(s, 20), 0.9),
        NODE + "the rows are incomplete or were changed",
        {10},
        {"node"},
        LOST,
    ),
    "node flipped at its end": (
        lambda s: flip(node_of(s, 20), 1.0),
        NODE + "the rows are incomplete or were changed",
        {10},
        {"node"},
        LOST,
    ),
    **{
        f"node cut at {at}": (
            lambda s, at=at: cut(node_of(s, 20), at),
            NODE + "(the file is incomplete|the rows are incomplete)",
            {10},
            {"node"},
            LOST,
        )
        for at in (0.0, 0.1, 0.5, 0.999)
    },
    "node of another key": (
        lambda s: shutil.copy(node_of(s, 10), node_of(s, 20)),
        NODE + f"the file contains a different node, {key(10)[:12]}",
        {10},
        {"node"},
        LOST,
    ),
    "node deleted": (lambda s: node_of(s, 20).unlink(), LOST, {10}, set(), LOST),
    "node is a list": (
        lambda s: node_of(s, 20).write_text("[]\n"),
        NODE + "the file is incomplete, or is not a node",
        {10},
        {"node"},
        LOST,
    ),
    "node is not text": (
        lambda s: node_of(s, 20).write_bytes(b"\xff\xfe\0"),
        NODE + "the file is incomplete, or is not a node",
        {10},
        {"node"},
        LOST,
    ),
    "a folder for a node": (
        lambda s: folder_instead(node_of(s, 20)),
        NODE + "the file is a folder",
        {10},
        {"node"},
        LOST,
    ),
    "parent of another step": (
        lambda s: rewrite(s, 20, parent=key(30)),
        rf"\(step 20\): node {key(30)[:12]} cannot be the parent",
        {10},
        {"node"},
        LOST,
    ),
    "step of another node": (
        lambda s: rewrite(s, 20, begins=5),
        rf"\(step 20\): node {key(10)[:12]} cannot be the parent",
        {10},
        {"node"},
        LOST,
    ),
    "parent that does not exist": (
        lambda s: rewrite(s, 20, parent=key(15)),
        rf"\(step 20\): the rows before step 10 are lost with {key(15)[:12]}",
        {10},
        set(),
        rf"\(step 20\): the rows before step 10 are lost with {key(15)[:12]}",
    ),
    "root torn": (
        lambda s: cut(root_of(s), 0.5),
        f"root {ROOT[:12]}: incomplete or changed",
        {10, 20, 30},
        {"root"},
        UNROOTED,
    ),
    "root edited": (
        lambda s: root_of(s).write_text(json.dumps(BEGUN | {"data": {}})),
        f"root {ROOT[:12]}: incomplete or changed",
        {10, 20, 30},
        {"root"},
        UNROOTED,
    ),
    "root deleted": (lambda s: root_of(s).unlink(), UNROOTED, {10, 20, 30}, set(), UNROOTED),
    "pin torn": (
        lambda s: s.files.write("pins/mine", b'["0123'),
        "pin mine: not a valid pin",
        {10, 20, 30},
        {"pin"},
        None,
    ),
    "pin is a number": (
        lambda s: s.files.write("pins/mine", b"3"),
        "pin mine: not a valid pin",
        {10, 20, 30},
        {"pin"},
        None,
    ),
}


def files_in(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_reported_skipped_and_removed(store: Store, case: Damage) -> None:
    damage, named, left, taken, after = case
    nodes = save(store, *STEPS)
    folder = Path(str(store))
    assert store.verify() == [] and usable(store) == set(STEPS)
    whole = files_in(folder)
    damage(store)
    assert any(re.search(named, line) for line in store.verify()), store.verify()
    assert usable(store) == left
    store.summary()
    kinds = {
        "state": f"states/{nodes[1].state}.safetensors",
        "node": f"nodes/{key(20)}",
        "root": f"roots/{ROOT}",
        "pin": "pins/mine",
    }
    damaged = files_in(folder)
    counts = store.gc()
    gone = {name: data for name, data in damaged.items() if name not in files_in(folder)}
    assert {name.split("/inside")[0] for name in gone} == {kinds[kind] for kind in taken}
    assert counts["damaged"] == len(taken) and not any(
        counts[name] for name in ("orphans", "rows", "evicted")
    )
    assert usable(store) == left, "gc took what was good"
    found = store.verify()
    assert (found and all(re.search(after, line) for line in found)) if after else found == []
    if damage is not DAMAGES["parent that does not exist"][0]:  # no run can train the missing parent
        save(store, *STEPS)  # simulates a run that trains these steps again
        assert (
            store.verify() == [] and usable(store) == set(STEPS) and files_in(folder).keys() == whole.keys()
        )


def test_each_changed_byte_and_each_cut_is_detected(store: Store) -> None:
    """The test changes every byte of a node and its state, and replaces blanks with tabs."""
    good = save(store, 10, rows=(row(1), row(2)))[0]
    for path, read in (
        (node_of(store, 10), lambda: store.node(good.key)),
        (state_of(store, 10), lambda: store.load(good)),
    ):
        data = path.read_bytes()
        changes = [(at, byte ^ 1 << at % 8) for at, byte in enumerate(data)]
        changes += [(at, ord("\t")) for at, byte in enumerate(data) if byte in b" \n\0"]
        with path.open("r+b", buffering=0) as f:
            for at, byte in changes:
                os.pwrite(f.fileno(), bytes([byte]), at)
                with pytest.raises(Damaged):
                    read()
                os.pwrite(f.fileno(), data[at : at + 1], at)
            read()
            for size in range(len(data) - 1, -1, -7):
                f.truncate(size)
                with pytest.raises(Damaged):
                    read()
        path.write_bytes(data)
    assert store.verify() == []


def test_the_first_line_alone_is_verified_too(store: Store) -> None:
    """Lists and plans read only the first line of a node, so damage to this line must be detected."""
    save(store, 10)
    path = node_of(store, 10)
    path.write_bytes(path.read_bytes().replace(b'"step": 10', b'"step": 11', 1))
    with pytest.raises(Damaged, match="the first line was changed"):
        store.node(key(10), rows=False)
    assert store.summary() == ([], [(key(10), "the first line was changed after it was written")])


FOREIGN = [
    "notes.txt",
    "nodes/readme",
    f"nodes/{key(10)}.tmp",
    "nodes/folder/x",
    "states/x.bin",
    f"states/{'A' * 64}.safetensors",
    "roots/readme.json",
    "leases/x",
    f"leases/{key(10)}.1",
    "wants/x",
]


def test_foreign_files_are_reported_and_kept(store: Store) -> None:
    save(store, *STEPS)
    for name in FOREIGN:
        (Path(str(store)) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(str(store)) / name).write_text("{}")
        os.utime(Path(str(store)) / name, (time.time() - 10,) * 2)
    expected = sorted({"/".join(name.split("/")[:2]) for name in FOREIGN})
    assert sorted(store.verify()) == [f"{name}: not a file of a store; move it away" for name in expected]
    assert not any(store.gc().values())
    assert (
        usable(store) == set(STEPS)
        and store.summary()[1] == []
        and all((Path(str(store)) / name).exists() for name in FOREIGN)
    )
    assert Store(str(store)).node_keys() == {key(step) for step in STEPS} and Leases(
        store.files
    ).active().keys() <= {key(10), "x"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "store.json is damaged; restore it"),
        ('{"form', "store.json is damaged"),
        ("[]", "store.json is damaged"),
        ("7", "store.json is damaged"),
        ('{"format": 2}', "has format 2, but this version reads format 1"),
        ("{}", "has format None"),
    ],
)
def test_a_store_of_another_format_is_not_opened(store: Store, text: str, named: str) -> None:
    save(store, 10)
    before = files_in(Path(str(store))) | {"store.json": text.encode()}
    (Path(str(store)) / "store.json").write_text(text)
    with pytest.raises(ConfigError, match=named):
        Store(str(store))
    assert files_in(Path(str(store))) == before


def test_a_store_without_store_json_is_not_opened(store: Store) -> None:
    save(store, 10)
    (Path(str(store)) / "store.json").unlink()
    with pytest.raises(ConfigError, match=r"contains .*nodes.* but no store.json"):
        Store(str(store))


def test_a_foreign_file_or_folder_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file is not a folder; choose another location for the store"):
        Store(tmp_path / "file")
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(
        ConfigError, match=r"contains file, thesis.doc but no store.json, so it is not a store"
    ):
        Store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis.doc"]


def test_a_store_opens_before_its_first_node_is_written(place: str) -> None:
    """A run that is killed early may leave a lease or a pin in a store that has no nodes."""
    store = Store(place)
    lease = Leases(store.files).acquire(key(10))
    assert lease
    store.pin("batch", [key(10)])
    assert Store(place).node_keys() == set()
    lease.release()
    save(Store(place), 10)
    assert Store(place).verify() == []


@pytest.mark.parametrize("text", ["", '{"fie', "[]", "{}"])
def test_the_next_run_repairs_the_file_of_a_root(store: Store, text: str) -> None:
    save(store, 10)
    root_of(store).write_text(text)
    save(store, 20)
    assert store.verify() == [] and list(store.roots()) == [(ROOT, BEGUN)]


# -- garbage collection


def test_gc_removes_old_states_without_a_node(store: Store) -> None:
    nodes = save(store, *STEPS)
    age(store, {nodes[1].state: 2 * HOUR, nodes[2].state: 0.5 * HOUR, nodes[0].state: 5 * HOUR})
    for step in (20, 30):
        node_of(store, step).unlink()
    counts = store.gc()
    assert set(store.states()) == {nodes[0].state, nodes[2].state}, (
        "a young one may be a node's that is being written"
    )
    assert counts["orphans"] == 1 and counts["bytes"] == nodes[1].size and store.verify() == []
    age(store, {nodes[2].state: -2 * HOUR})
    assert store.gc()["orphans"] == 1, "a clock that was put back makes none immortal"


def test_gc_removes_only_nodes_that_lead_to_no_state(store: Store) -> None:
    nodes = save(store, *STEPS, made=time.time() - 2 * HOUR)
    for evicted, kept in ((20, {10, 20, 30}), (10, {10, 20, 30}), (30, set())):
        store.files.remove(f"states/{nodes[STEPS.index(evicted)].state}.safetensors")
        counts = store.gc()
        assert (
            store.node_keys() == {key(step) for step in kept}
            and counts["rows"] == 3 - len(kept)
            and store.verify() == []
        )


def test_gc_keeps_the_ancestors_of_a_young_node(store: Store) -> None:
    """A node without a state is kept while it is young, so its older ancestors must be kept too."""
    save(store, 10, 20, made=time.time() - 2 * HOUR)
    save(store, 30)
    for state in store.states():
        store.files.remove(f"states/{state}.safetensors")
    assert (
        store.gc()["rows"] == 0
        and store.verify() == []
        and store.node_keys() == {key(step) for step in STEPS}
    )


def test_gc_removes_the_old_files_of_killed_writers(store: Store) -> None:
    save(store, 10)
    folder = Path(str(store))
    for name, seconds in (
        ("new/1-old", 2 * HOUR),
        ("new/1-young", 60),
        (f"leases/{key(20)}.000001", 2 * HOUR),
        (f"leases/{key(30)}.000001", 60),
        (f"wants/{key(20)}", 25 * HOUR),
        (f"wants/{key(30)}", 23 * HOUR),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        os.utime(folder / name, (time.time() - seconds,) * 2)
    store.gc()
    assert store.files.names("new") == {"1-young"} and store.files.names("leases") == {f"{key(30)}.000001"}
    assert store.wants() == {key(30)} and store.verify() == []


def test_a_want_ends_when_its_node_is_saved(place: str) -> None:
    store = Store(place)
    store.want(key(10), "one")
    store.want(key(10), "another")
    store.want(key(20), "one")
    assert Store(place).wants() == {key(10), key(20)}, "they may be there before all else"
    save(store, 10)
    assert store.wants() == {key(20)} and store.verify() == []


def test_gc_evicts_after_removing(store: Store) -> None:
    nodes = save(store, *STEPS, made=time.time() - 2 * HOUR)
    age(store, {nodes[i].state: 100.0 - i for i in range(3)})
    flip(state_of(store, 30), 0.9)
    store.size = nodes[0].size
    counts = store.gc()
    assert counts["damaged"] == 1 and counts["evicted"] == 1 and set(store.states()) == {nodes[1].state}
    assert store.node_keys() == {key(10), key(20)} and store.verify() == []


# -- eviction


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    pinned=st.sets(st.integers(0, 7)),
    keep=st.sets(st.integers(0, 7), max_size=2),
    budget=st.integers(0, 200),
)
@settings(max_examples=examples(40))
def test_the_least_recently_used_states_are_evicted_first_and_no_more(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    order: Any,
    pinned: set[int],
    keep: set[int],
    budget: int,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    ages = list(range(1, len(sizes) + 1))
    order.shuffle(ages)
    states = [key(i + 1, "state") for i in range(len(sizes))]
    for sub in ("nodes", "states", "pins"):
        (folder / sub).mkdir()
    (folder / "store.json").write_text('{"format": 1}')
    for i, size in enumerate(sizes):
        (folder / f"states/{states[i]}.safetensors").write_bytes(b"x" * size)
        (folder / f"nodes/{key(i + 1)}").write_bytes(node(i + 1, 0, state=states[i]).dump())
    store = Store(folder, budget)
    age(store, {state: ages[i] * 60.0 for i, state in enumerate(states)})
    (folder / "pins/p").write_text(json.dumps([key(i + 1) for i in sorted(pinned)]))
    expected, total = [], sum(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -ages[i]):
        if total > budget and i not in pinned | keep:
            total -= sizes[i]
            expected.append(states[i])
    assert store.evict({key(i + 1) for i in keep}) == expected
    assert set(store.states()) == set(states) - set(expected) and len(store.node_keys()) == len(sizes)
    assert store.evict({key(i + 1) for i in keep}) == []
    shutil.rmtree(folder)


def test_a_state_that_is_loaded_or_saved_again_is_evicted_later(place: str) -> None:
    store = Store(place)
    nodes = save(store, *STEPS)
    store.size = nodes[0].size * 2
    time.sleep(0.02)
    store.load(nodes[0])
    assert store.evict() == [nodes[1].state]
    time.sleep(0.02)
    save(store, 30)
    save(store, 20)
    assert store.evict() == [nodes[0].state]


def test_pinned_nodes_are_kept_until_they_are_unpinned(place: str) -> None:
    store = Store(place, size=10**6)
    nodes = save(store, *STEPS)
    store.pin("a", [nodes[0].key])
    store.pin("b", [nodes[0].key, nodes[1].key, key(99)])
    assert store.pinned() == {nodes[0].key, nodes[1].key, key(99)}
    store.size = 1
    assert store.evict() == [nodes[2].state]
    store.unpin("b")
    store.unpin("never was")
    assert store.evict() == [nodes[1].state]
    store.unpin("a")
    assert store.evict() == [nodes[0].state] and store.states() == {}


def test_rows_are_kept_after_their_states_are_evicted(place: str) -> None:
    store = Store(place)
    nodes = save(store, *STEPS)
    store.size = nodes[0].size
    assert len(store.evict({nodes[2].key})) == 2
    assert usable(store) == {30} and len(store.summary()[0]) == 3 and store.verify() == []
    with pytest.raises(Damaged, match="the state does not exist"):
        store.load(nodes[0])


def test_a_state_from_the_future_is_evicted_in_its_turn(store: Store) -> None:
    nodes = save(store, *STEPS)
    age(store, {nodes[0].state: -10 * 24 * HOUR, nodes[1].state: 60.0, nodes[2].state: 30.0})
    (found,) = store.verify()
    assert f"state {nodes[0].state[:12]}: last used in the future" in found
    store.size = nodes[0].size * 2
    assert store.evict() == [nodes[1].state], "as if used now"
    assert store.verify() == []
    time.sleep(0.02)
    save(store, 20, 30)  # these states are used now, so the other state is the least recently used
    assert store.evict() == [nodes[0].state] and usable(store) == {20, 30}


def test_gc_sets_times_in_the_future_to_now(store: Store) -> None:
    nodes = save(store, *STEPS)
    store.pin("batch-1", [key(10)])
    late = (
        f"states/{nodes[0].state}.safetensors",
        f"leases/{key(20)}.000001",
        f"wants/{key(20)}",
        "new/1-x",
        "pins/batch-1",
    )
    for name in late:
        (Path(str(store)) / name).parent.mkdir(exist_ok=True)
        (Path(str(store)) / name).touch()
        os.utime(Path(str(store)) / name, (time.time() + 10 * 24 * HOUR,) * 2)
    assert ["last used in the future" in finding for finding in store.verify()] == [True]
    store.gc()
    assert store.verify() == []
    for name in late:
        assert abs((Path(str(store)) / name).stat().st_mtime - time.time()) < 60, "it ages from now on"


def test_a_small_difference_of_clocks_is_not_reported(store: Store) -> None:
    nodes = save(store, *STEPS)
    age(store, {nodes[0].state: -GRACE / 2})
    assert store.verify() == []


# -- stores that cannot be written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_read_only_store_can_be_read(disk: Path) -> None:
    nodes = save(Store(disk / "store"), *STEPS)
    before = Store(disk / "store").states()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    store = Store(disk / "store")
    assert (
        usable(store) == set(STEPS)
        and store.verify() == []
        and len(store.summary()[0]) == 3
        and store.states() == before
    )
    for write in (
        lambda: save(store, 40),
        lambda: store.pin("a", [key(10)]),
        lambda: Leases(store.files).acquire(key(40)),
    ):
        with pytest.raises(OSError) as e:
            write()
        assert e.value.errno == errno.EROFS
    store.size = nodes[0].size
    with pytest.raises(OSError):
        store.evict()
    assert usable(store) == set(STEPS)


@pytest.mark.parametrize("leave", [0, 4096, 20_000])
def test_a_full_disk_leaves_no_partial_node(disk: Path, leave: int) -> None:
    """Safetensors raises its own error for a full disk, which the store turns into an OSError."""
    store = Store(disk / "store")
    save(store, 10)
    big = {"w": torch.zeros(50_000)}
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - leave))
    with pytest.raises(OSError) as e:
        store.save(node(20), big)
    assert e.value.errno == errno.ENOSPC
    assert (
        store.files.names("new") == set()
        and store.verify() == []
        and store.node_keys() == {key(10)}
        and len(store.states()) == 1
    )
    (disk / "ballast").unlink()
    assert same(store.load(store.save(node(20), big)), big)


def test_a_limit_on_file_size_leaves_no_partial_node(store: Store) -> None:
    save(store, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError) as e:
            store.save(node(20), {"w": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert e.value.errno == errno.EFBIG
    assert store.files.names("new") == set() and store.verify() == [] and store.node_keys() == {key(10)}


# -- size


@pytest.mark.slow
def test_ten_thousand_nodes_are_read_within_a_second(tmp_path: Path) -> None:
    from mainrun.config import TrainConfig

    for folder in ("nodes", "states", "roots"):
        (tmp_path / folder).mkdir()
    (tmp_path / "store.json").write_text('{"format": 1}')
    (tmp_path / f"roots/{ROOT}").write_text(json.dumps(BEGUN))
    config, now = TrainConfig().model_dump(mode="json"), time.time()
    for i in range(1, 10_001):
        state = b"%d" % i
        sha256 = hashlib.sha256(state).hexdigest()
        (tmp_path / f"states/{sha256}.safetensors").write_bytes(state)
        one = node(i, i - 1, state=sha256, size=len(state), config=config, made=now)
        (tmp_path / f"nodes/{one.key}").write_bytes(one.dump())
    store = Store(tmp_path)

    def best(function: Callable[[], Any]) -> float:
        """Return the shortest CPU time of three calls. CPU time does not depend on other processes."""
        taken = []
        for _ in range(3):
            before = time.process_time()
            function()
            taken.append(time.process_time() - before)
        return min(taken)

    nodes, damaged = store.summary()
    assert [n.step for n in nodes] == list(range(1, 10_001)) and damaged == []
    assert best(store.summary) < 1.5, "a second, and half of one for a slower core"
    assert best(lambda: (store.node_keys(), store.states())) < 0.3
    assert store.verify() == []
    store.size = store.states()[nodes[0].state].size * 5000
    before = time.perf_counter()
    counts = store.gc()
    assert (
        counts["evicted"]
        and not counts["damaged"]
        and not counts["rows"]
        and time.perf_counter() - before < 60
    )
    assert store.verify() == []
