"""The store of nodes: states that runs came through, each under the key of the chain that leads to it. No torch until one is loaded.

    store.json                   what this folder is
    nodes/KEY                    one line about the node, then the metric rows since its parent, one a line
    states/SHA256.safetensors    weights, moments and averages, under the hash of their own bytes
    roots/KEY                    what the chains below a root began with, for people and for `audit`
    leases/KEY.TOKEN             who trains the way to a node now (leases.py)
    wants/KEY                    somebody waits for this node, which whoever trains that way would not keep by himself
    pins/NAME                    keys that eviction passes over

A node is there once its file is; its state was there before. What is read is checked: a node that is torn, changed or foreign is
named and passed over. Eviction takes a state away and leaves the rows, so that the history of what comes after stays whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.errors import ConfigError
from mainrun.store import records
from mainrun.store.files import Files, open_files
from mainrun.store.records import NotAFile, open_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SIZE = 20_000_000_000  # bytes of states, unless asked otherwise
KEY = re.compile(r"[0-9a-f]{64}")
STATE = re.compile(r"[0-9a-f]{64}\.safetensors")
BATCH = 7 * 86_400.0  # seconds that a batch may pin its nodes
WANT = 86_400.0  # seconds after which nobody waits any more
AHEAD = 3600.0  # seconds that a clock may differ from another before it is worth a word


class Damaged(Exception):
    """A node that cannot be used, and why."""


class Unreadable(Damaged):
    """It may be whole: the place did not give it. Nothing is thrown away for that."""


class Refused(Exception):
    """A node that may not be written, and why."""


@dataclass(frozen=True)
class Node:
    """One line of nodes/KEY. `rows` are read with it or not at all."""

    key: str
    parent: str  # the key of the node before it on the chain, or its root
    root: str
    step: int
    begins: int  # step of the parent
    presented: int
    state: str  # sha256 of the state's file
    size: int  # its bytes
    geometry: list[int]  # of the official scores in its rows
    seconds: float  # that training from the parent took
    run: str
    config: dict[str, Any]
    made: float
    rows_sha256: str
    rows: tuple[dict[str, Any], ...] = ()
    grown: dict[str, Any] = field(
        default_factory=dict
    )  # of a run with a schedule: the ops that fired, the config in force (growth/live.py)

    def dump(self) -> bytes:
        body = _lines(self.rows)
        line = {name: getattr(self, name) for name in _FIELDS} | {
            "rows_sha256": hashlib.sha256(body).hexdigest()
        }
        return _dump(line | {"sha256": hashlib.sha256(_dump(line)).hexdigest()}) + b"\n" + body


_FIELDS = [name for name in Node.__dataclass_fields__ if name != "rows"]


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _parse(key: str, text: bytes, *, whole: bool) -> Node:
    head, _, body = text.partition(b"\n")
    try:
        line = json.loads(head)
        claimed = line.pop("sha256")
        # what `dump` hashed are these very bytes without the hash
        if (
            claimed
            != hashlib.sha256(head.replace(b'"sha256": "%s", ' % claimed.encode(), b"", 1)).hexdigest()
        ):
            raise Damaged("its first line was changed after it was written")
        if line["key"] != key:
            raise Damaged(f"it is the node {line['key'][:12]} under another name")
        if not 0 <= line["begins"] < line["step"]:
            raise Damaged("it says that it comes before itself")
        if whole and line["rows_sha256"] != hashlib.sha256(body).hexdigest():
            raise Damaged("its rows are torn or were changed after they were written")
        if fault := records.fault(line, records.NODE):
            raise Damaged(f"it is no node: it {fault}")
        return Node(**line, rows=tuple(records.lines(body, records.any_row)) if whole else ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("it is torn, or no node at all") from None


class Store:
    """Open with `Store(place)`: a folder, or a URL that fsspec knows. Nothing is made until something is kept."""

    def __init__(self, place: str | Path, size: int = SIZE) -> None:
        self.files: Files = open_files(place)
        self.size = size
        try:
            found = records.parse(self.files.read("store.json"))
            if found.get("format") != FORMAT:
                got = f"has format {found.get('format')}, this version reads {FORMAT}"
                raise ConfigError(f"store {place} {got}; give another place for the store")
        except FileNotFoundError:
            strays = self.files.names("") - {
                "new",
                "leases",
                "wants",
                "pins",
            }  # those may be there before the first node is
            # Another process may have begun the store since: it writes store.json before the first node.
            if strays and not self.files.exists("store.json"):
                got = f"{', '.join(sorted(strays)[:3])} but no store.json"
                raise ConfigError(
                    f"store {place} holds {got}, so it is not a store of mainrun; give another place for the store"
                ) from None
        except NotADirectoryError:
            raise ConfigError(f"store {place} is not a folder; give another place for the store") from None
        except (ValueError, AttributeError):
            raise ConfigError(
                f"store {place}: store.json is damaged; restore it (it holds {_dump({'format': FORMAT}).decode()})"
            ) from None
        except OSError as e:
            raise ConfigError(
                f"store {place} cannot be read ({e.strerror or e}); give another place for the store"
            ) from None

    def __str__(self) -> str:
        return str(self.files)

    # -- reading

    def node_keys(self) -> set[str]:
        """Of every node, damaged ones too."""
        return {name for name in self.files.names("nodes") if KEY.fullmatch(name)}

    def node(self, key: str, *, rows: bool = True) -> Node:
        try:
            text = self.files.read(f"nodes/{key}") if rows else self.files.first_line(f"nodes/{key}")
        except FileNotFoundError:
            raise Damaged("it is gone") from None
        except IsADirectoryError:
            raise Damaged("it is a folder") from None
        except NotAFile as e:
            raise Damaged(str(e.strerror)) from None
        except OSError as e:
            raise Unreadable(f"it cannot be read ({e.strerror or e})") from None
        return _parse(key, text, whole=rows)

    def history(self, node: Node, since: int = 0) -> Iterator[Node]:
        """The node and those before it, back to the one that covers the step after `since`, newest first."""
        while True:
            yield node
            if node.begins <= since:
                return
            try:
                before = self.node(node.parent)
            except Damaged as e:
                raise Damaged(
                    f"the rows before step {node.begins} are lost: node {node.parent[:12]}: {e}"
                ) from None
            if before.step != node.begins or before.root != node.root:
                raise Damaged(f"node {node.parent[:12]} is not what it says was before it")
            node = before

    def load(self, node: Node) -> dict[str, Tensor]:
        """Its state, or Damaged when it is not what was written; `save` replaces one that is not."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name = f"states/{node.state}.safetensors"
        try:
            with self.files.local(name) as path:
                if sha256(path) != node.state:
                    raise Damaged("its state is torn or was changed after it was written")
                found = load_file(path)
        except FileNotFoundError:
            raise Damaged("its state is gone") from None
        except OSError as e:
            raise Damaged(f"its state cannot be read ({e.strerror or e})") from None
        except SafetensorError as e:
            raise Damaged(f"its state is no safetensors file ({e})") from None
        self.touch(node)
        return found

    def touch(self, node: Node) -> None:
        """Just used: it is the last to be evicted. Where one may not write, nothing is."""
        with suppress(OSError):
            self.files.touch(f"states/{node.state}.safetensors")

    def states(self) -> dict[str, Any]:
        """sha256 -> size and time of last use, of every state that is there."""
        found = self.files.list("states")
        return {
            name.removesuffix(".safetensors"): entry for name, entry in found.items() if STATE.fullmatch(name)
        }

    def roots(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in sorted(self.files.names("roots")):
            if not KEY.fullmatch(name):
                continue
            with suppress(OSError):
                if begun := self._root(name):
                    yield name, begun

    # -- writing

    def begin(self, root: str, begun: dict[str, Any]) -> None:
        """Before the first node of a root. One that was damaged is whole again after it."""
        if not self.files.exists("store.json"):
            self.files.write("store.json", _dump({"format": FORMAT}))
        if self._root(root) is None:
            self.files.write(f"roots/{root}", _dump(begun))

    def save(
        self, node: Node, tensors: dict[str, Tensor], allowed: Callable[[], None] = lambda: None
    ) -> Node:
        """Write a node; `allowed` is asked at the last moment and may raise Refused. Gives the node as it is in the store.

        A node that is there already is left alone, but its state must be the same to the bit: it is written again where it was evicted
        or damaged.
        """
        from mainrun.store.checkpoint import save_tensors

        with self.files.new() as path:
            save_tensors(tensors, path)
            found = sha256(path)
            node = replace(node, state=found, size=path.stat().st_size)
            if node.size > self.size:
                raise Refused(
                    f"its {node.size:,} bytes are more than the store may hold ({self.size:,}); raise --store-size"
                )
            try:
                there: Node | None = self.node(node.key)
            except Unreadable as e:
                raise Refused(f"the store has step {node.step} already, but {e}") from None
            except Damaged as e:
                there = None
                if self.files.exists(f"nodes/{node.key}") and str(e) != "it is gone":
                    self.files.remove(f"nodes/{node.key}")  # it helps nobody, and would be in the way
            if there and there.state != found:
                other = f"the store has other bits for step {node.step} (by {there.run})"
                raise Refused(
                    f"{other}: two trainings of one thing differ; `mainrun store audit` finds out which is right"
                )
            if there and (step := _other_loss(there.rows, node.rows)):
                raise Refused(
                    f"the store has another loss for step {step} (by {there.run}); `mainrun store audit` finds out which is right"
                )
            allowed()
            if self._sound(found):
                self.touch(node)
            else:
                self.files.put(path, f"states/{found}.safetensors")
        allowed()  # writing may have taken a while
        if there is None and not self.files.create(f"nodes/{node.key}", node.dump()):
            return self.save(node, tensors, allowed)  # somebody was faster by a moment
        with suppress(OSError):
            self.files.remove(f"wants/{node.key}")
        return there or node

    def _sound(self, state: str) -> bool | None:
        """Whether a state is what was written; None when there is none."""
        try:
            with self.files.local(f"states/{state}.safetensors") as path:
                return sha256(path) == state
        except FileNotFoundError:
            return None
        except (IsADirectoryError, NotAFile):
            return False

    # -- wants, pins and room

    def want(self, key: str, run: str) -> None:
        """Ask whoever trains that way to keep this node. It is forgotten when the node is there, or after a while."""
        self.files.create(f"wants/{key}", _dump({"run": run}))

    def wants(self) -> set[str]:
        return self.files.names("wants")

    def pin(self, name: str, keys: Iterable[str]) -> None:
        """Keep these from eviction until `unpin(name)`."""
        self.files.write(f"pins/{name}", _dump(sorted(keys)))

    def unpin(self, name: str) -> None:
        self.files.remove(f"pins/{name}")

    def pinned(self) -> set[str]:
        keys: set[str] = set()
        for name in self.files.names("pins") - self._old_pins():
            keys |= self._pin(name) or set()
        return keys

    def _old_pins(self) -> set[str]:
        """Of batches that were killed, presumably: one that lives is done within a week, or its nodes are used."""
        old = time.time() - BATCH
        return {
            name
            for name, entry in self.files.list("pins").items()
            if name.startswith("batch-") and entry.modified < old
        }

    def _pin(self, name: str) -> set[str] | None:
        """None when it is damaged: it pins nothing then."""
        try:
            found = records.parse(self.files.read(f"pins/{name}"))
        except FileNotFoundError:  # just now
            return set()
        except (IsADirectoryError, NotAFile, ValueError):
            return None
        return (
            set(found)
            if isinstance(found, list) and all(isinstance(key, str) and KEY.fullmatch(key) for key in found)
            else None
        )

    def evict(self, keep: Set[str] = frozenset()) -> list[str]:
        """Take the least recently used states away until the rest fits. Pinned ones stay, and `keep`, whatever they weigh."""
        there = self.states()
        excess = sum(entry.size for entry in there.values()) - self.size
        if excess <= 0:
            return []
        pinned = keep | self.pinned()
        held = set()
        for key in pinned & self.node_keys():
            with suppress(Damaged):
                held.add(self.node(key, rows=False).state)
        now, gone = time.time(), []
        self._date("states")
        oldest = sorted(there, key=lambda state: (min(there[state].modified, now), state))
        for state in oldest:
            if excess <= 0:
                break
            if state not in held:
                self.files.remove(f"states/{state}.safetensors")
                excess -= there[state].size
                gone.append(state)
        return gone

    def _date(self, folder: str) -> None:
        """A time in the future says nothing about use: the clock was put back since. Such a file ages from now on."""
        for name, entry in self.files.list(folder).items():
            if entry.modified > time.time() + AHEAD:
                with suppress(OSError):
                    self.files.touch(f"{folder}/{name}")

    # -- housekeeping

    def summary(self) -> tuple[list[Node], list[tuple[str, str]]]:
        """Every node without its rows, by root and step; and those that cannot be read, with the reason."""
        nodes, damaged = [], []
        for key in sorted(self.node_keys()):
            try:
                nodes.append(self.node(key, rows=False))
            except Damaged as e:
                damaged.append((key, str(e)))
        return sorted(nodes, key=lambda node: (node.root, node.step, node.key)), damaged

    def verify(self) -> list[str]:
        """Everything that is not as it was written, one sentence each."""
        found: list[str] = []
        nodes: dict[str, Node] = {}
        for key in sorted(self.node_keys()):
            try:
                nodes[key] = replace(self.node(key), rows=())
            except Damaged as e:
                found.append(f"node {key[:12]}: {e}")
        roots = {root for root in self.files.names("roots") if KEY.fullmatch(root)}
        for node in nodes.values():
            name, before = f"node {node.key[:12]} (step {node.step})", nodes.get(node.parent)
            if node.begins and before is None:
                found.append(f"{name}: the rows before step {node.begins} are lost with {node.parent[:12]}")
            elif misplaced(node, before):
                found.append(f"{name}: {node.parent[:12]} is not what it says was before it")
            if node.root not in roots:
                found.append(f"{name}: what its root {node.root[:12]} began with is lost")
        sizes = {node.state: node for node in nodes.values()}
        for state, entry in sorted(self.states().items()):
            whose = f"step {sizes[state].step} of {sizes[state].run}" if state in sizes else "no node"
            try:
                if self._sound(state) is False:
                    found.append(f"state {state[:12]} ({whose}): torn or changed after it was written")
            except OSError as e:
                found.append(f"state {state[:12]} ({whose}): it cannot be read ({e.strerror or e})")
            if entry.modified > time.time() + AHEAD:
                found.append(f"state {state[:12]}: last used in the future; the clock was put back since")
        found += [
            f"root {root[:12]}: torn or changed after it was written"
            for root in sorted(roots)
            if self._root(root) is None
        ]
        found += [f"pin {name}: torn, or no pin at all; it keeps nothing" for name in self._torn_pins()]
        found += [f"{name}: no file of a store; move it away" for name in self._strays()]
        return found

    def _root(self, root: str) -> dict[str, Any] | None:
        """What its chains began with; None when that is lost or damaged."""
        from mainrun.store import lineage

        try:
            begun = records.parse(self.files.read(f"roots/{root}"))
        except (FileNotFoundError, IsADirectoryError, NotAFile, ValueError):
            return None
        return begun if isinstance(begun, dict) and lineage.root(begun) == root else None

    def _torn_pins(self) -> list[str]:
        return sorted(name for name in self.files.names("pins") if self._pin(name) is None)

    def _strays(self) -> list[str]:
        ours = {"store.json", "nodes", "states", "roots", "leases", "wants", "pins", "new"}
        found = sorted(self.files.names("") - ours)
        lease = re.compile(r"[0-9a-f]{64}\.\d{6}")
        for folder, pattern in (
            ("nodes", KEY),
            ("states", STATE),
            ("roots", KEY),
            ("wants", KEY),
            ("leases", lease),
        ):
            found += sorted(
                f"{folder}/{name}" for name in self.files.names(folder) if not pattern.fullmatch(name)
            )
        return found

    def gc(self) -> dict[str, int]:
        """Clear what helps nobody: damaged nodes and states, states without a node, rows that lead to no state; then the budget.

        What comes after a node that is lost stays: it is whole again when somebody trains the way there.
        """
        counts = {"damaged": 0, "orphans": 0, "rows": 0, "evicted": 0, "bytes": 0}
        there, now = self.states(), time.time()
        old = now - AHEAD
        nodes: dict[str, Node] = {}
        damaged, unread = [], False
        for key in self.node_keys():
            try:
                nodes[key] = replace(self.node(key), rows=())
            except Unreadable:
                unread = True  # what it may stand for stays
            except Damaged:
                damaged.append(f"nodes/{key}")
        damaged += [f"nodes/{node.key}" for node in nodes.values() if misplaced(node, nodes.get(node.parent))]
        damaged += [
            f"roots/{root}"
            for root in self.files.names("roots")
            if KEY.fullmatch(root) and self._root(root) is None
        ]
        damaged += [f"pins/{name}" for name in self._torn_pins()]
        for name in self._old_pins():
            self.files.remove(f"pins/{name}")
        counts["damaged"] = len(damaged)
        for name in damaged:
            self.files.remove(name)
            nodes.pop(name.removeprefix("nodes/"), None)
        named = {node.state for node in nodes.values()}
        for state, entry in there.items():
            try:
                torn = self._sound(state) is False
            except OSError:
                continue
            # a young one may be a node's that is being written; a time far in the future is that of a clock put back since
            orphan = state not in named and not unread and not old < entry.modified < now + AHEAD
            if torn or orphan:
                counts["damaged" if torn else "orphans"] += 1
                counts["bytes"] += entry.size
                self.files.remove(f"states/{state}.safetensors")
        for folder in ("states", "new", "leases", "wants", "pins"):
            self._date(folder)
        gone = self.evict()
        counts["evicted"] = len(gone)
        counts["bytes"] += sum(there[state].size for state in gone if state in there)
        there = self.states()
        needed: set[str] = set()
        for node in sorted(nodes.values(), key=lambda node: -node.step):
            if node.state in there or node.key in needed or unread or old < node.made < now + AHEAD:
                needed.add(node.parent)
            else:
                counts["rows"] += 1
                self.files.remove(f"nodes/{node.key}")
        # by writers that were killed; a holder that lives writes its lease all the time
        for folder, age in (("new", AHEAD), ("leases", AHEAD), ("wants", WANT)):
            for name, entry in self.files.list(folder).items():
                if entry.modified < now - age:
                    self.files.remove(f"{folder}/{name}")
        return counts


def _other_loss(a: Iterable[dict[str, Any]], b: Iterable[dict[str, Any]]) -> int:
    """The first step for which both have a loss, and not the same; 0: none."""

    def losses(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], Any]:
        return {(row.get("event"), row.get("step"), row.get("split")): row.get("loss") for row in rows}

    known = losses(a)
    return next((what[1] for what, loss in losses(b).items() if known.get(what, loss) != loss), 0)


def misplaced(node: Node, before: Node | None) -> bool:
    """Whether what is stored as its parent cannot be that."""
    if not node.begins:
        return node.parent != node.root
    return before is not None and (before.step, before.root) != (node.begins, node.root)


def sha256(path: Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def whereabouts(out: Path) -> str:
    """Where the store of a folder of runs is, unless it is said."""
    return os.environ.get("MAINRUN_STORE") or str(Path(out) / ".store")
