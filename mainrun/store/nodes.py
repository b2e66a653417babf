"""The store of nodes: states of runs, each under its key of the chain. Only loading a state needs torch.

    store.json                   the format of the store
    nodes/KEY                    one line about the node, then the metric rows since its parent, one a line
    states/SHA256.safetensors    weights, optimiser state and averages, named by the hash of the file
    roots/KEY                    what the first key of a chain is the hash of
    leases/KEY.TOKEN             which process is training the steps up to a node (leases.py)
    wants/KEY                    another run waits for this node, which a run that passes it should keep
    pins/NAME                    keys of nodes that are not evicted

A node exists once its file does; its state is written first. Everything that is read is verified: a node that
is torn, changed or foreign is reported and skipped. Eviction removes a state and keeps the rows, so that the
history of later nodes stays complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.errors import ConfigError
from mainrun.files.hashing import canonical_json, sha256_file, sha256_json
from mainrun.files.inputs import NotAFile
from mainrun.store import records
from mainrun.store.files import Entry, Files, open_files

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SIZE = 20_000_000_000  # default limit of all states, in bytes
KEY = re.compile(r"[0-9a-f]{64}")
STATE = re.compile(r"[0-9a-f]{64}\.safetensors")
LEASE = re.compile(r"[0-9a-f]{64}\.\d{6}")
FOLDERS = {"nodes": KEY, "states": STATE, "roots": KEY, "wants": KEY, "leases": LEASE}  # and their file names
BEFORE_FIRST_NODE = {"new", "leases", "wants", "pins"}  # folders that may exist before store.json

BATCH_PIN_LIFETIME = 7 * 86_400.0  # seconds
WANT_LIFETIME = 86_400.0  # seconds
# Seconds for which a file may belong to a process that is still writing, and by which clocks may differ.
GRACE = 3600.0


class Damaged(Exception):
    """A node cannot be used. The message says why."""


class Missing(Damaged):
    """A node does not exist."""


class Unreadable(Damaged):
    """A node cannot be read now, but may be intact. It is not removed."""


class Refused(Exception):
    """A node may not be written. The message says why."""


# -- nodes

JSON_KEYS = {
    "tokens_processed": "presented",
    "growth_state": "grown",
}  # fields with another name in nodes/KEY


@dataclass(frozen=True)
class Node:
    """The content of nodes/KEY. `rows` are empty if only its first line was read."""

    key: str
    parent: str  # the key of the node before it on the chain, or the root
    root: str
    step: int
    begins: int  # step of the parent
    tokens_processed: int
    state: str  # SHA-256 of the state's file
    size: int  # of the state's file, in bytes
    geometry: list[int]  # of the official scores in the rows
    seconds: float  # of training since the parent
    run: str
    config: dict[str, Any]
    made: float  # seconds since 1970
    rows_sha256: str
    rows: tuple[dict[str, Any], ...] = ()
    growth_state: dict[str, Any] = field(default_factory=dict)  # of a run that grows (mainrun.growth.state)

    def dump(self) -> bytes:
        """Return the content of nodes/KEY, with checksums."""
        body = b"".join(json.dumps(row).encode() + b"\n" for row in self.rows)
        line: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            if name != "rows":
                line[JSON_KEYS.get(name, name)] = getattr(self, name)
        line["rows_sha256"] = hashlib.sha256(body).hexdigest()
        return canonical_json(line | {"sha256": sha256_json(line)}) + b"\n" + body

    @classmethod
    def parse(cls, key: str, content: bytes, *, rows: bool) -> Node:
        """Return a verified node, with or without its rows. Raise Damaged if it cannot be used."""
        head, _, body = content.partition(b"\n")
        try:
            line = json.loads(head)
            checksum = line.pop("sha256")
            # `dump` computed the checksum of this very line without the checksum
            without_checksum = head.replace(b'"sha256": "%s", ' % checksum.encode(), b"", 1)
            if checksum != hashlib.sha256(without_checksum).hexdigest():
                raise Damaged("its first line was changed after it was written")
            if line["key"] != key:
                raise Damaged(f"it is the node {line['key'][:12]} under another name")
            if not 0 <= line["begins"] < line["step"]:
                raise Damaged("its step is not after that of its parent")
            if rows and line["rows_sha256"] != hashlib.sha256(body).hexdigest():
                raise Damaged("its rows are torn or were changed after they were written")
            fault = records.fault(line, records.NODE)
            if fault:
                raise Damaged(f"it is not a node: it {fault}")
            for name, json_key in JSON_KEYS.items():
                if json_key in line:
                    line[name] = line.pop(json_key)
            return cls(**line, rows=tuple(records.lines(body, records.any_row)) if rows else ())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Damaged("it is torn, or not a node") from None


def contradicts_parent(node: Node, parent: Node | None) -> bool:
    """Whether a node and the one that is stored as its parent, if any, contradict each other."""
    if not node.begins:
        return node.parent != node.root
    return parent is not None and (parent.step, parent.root) != (node.begins, node.root)


def default_place(out: Path) -> str:
    """Return where the store of a folder of runs is: MAINRUN_STORE, or .store in that folder."""
    return os.environ.get("MAINRUN_STORE") or str(Path(out) / ".store")


# -- the store


class Store:
    """A store in a folder, or at a URL that fsspec can open. It is created when the first node is saved."""

    def __init__(self, place: str | Path, size: int = SIZE) -> None:
        """Open a store. size: the limit of all states, in bytes."""
        self.files: Files = open_files(place)
        self.size = size
        another = "give another place for the store"
        try:
            known = records.parse(self.files.read("store.json"))
            if known.get("format") != FORMAT:
                got = f"has format {known.get('format')}, this version reads {FORMAT}"
                raise ConfigError(f"store {place} {got}; {another}")
        except FileNotFoundError:
            self._check_empty(place)
        except NotADirectoryError:
            raise ConfigError(f"store {place} is not a folder; {another}") from None
        except (ValueError, AttributeError):
            content = canonical_json({"format": FORMAT}).decode()
            got = f"store {place}: store.json is damaged"
            raise ConfigError(f"{got}; restore it (its content is {content})") from None
        except OSError as e:
            raise ConfigError(f"store {place} cannot be read ({e.strerror or e}); {another}") from None

    def _check_empty(self, place: str | Path) -> None:
        """Refuse a folder without store.json that holds the files of another program."""
        strays = self.files.names("") - BEFORE_FIRST_NODE
        # Another process may have created the store since; it writes store.json before the first node.
        if strays and not self.files.exists("store.json"):
            got = f"store {place} holds {', '.join(sorted(strays)[:3])} but no store.json"
            raise ConfigError(f"{got}, so it is not a store of mainrun; give another place for the store")

    def __str__(self) -> str:
        return str(self.files)

    # -- reading

    def node_keys(self) -> set[str]:
        """Return the keys of all nodes, damaged ones too."""
        return {name for name in self.files.names("nodes") if KEY.fullmatch(name)}

    def node(self, key: str, *, rows: bool = True) -> Node:
        """Return a node, with or without its rows. Raise Damaged if it cannot be used."""
        name = f"nodes/{key}"
        try:
            content = self.files.read(name) if rows else self.files.first_line(name)
        except FileNotFoundError:
            raise Missing("it does not exist") from None
        except IsADirectoryError:
            raise Damaged("it is a folder") from None
        except NotAFile as e:
            raise Damaged(str(e.strerror)) from None
        except OSError as e:
            raise Unreadable(f"it cannot be read ({e.strerror or e})") from None
        return Node.parse(key, content, rows=rows)

    def history(self, node: Node, since: int = 0) -> Iterator[Node]:
        """Yield the node and its ancestors, newest first, back to the one with the step after `since`."""
        while True:
            yield node
            if node.begins <= since:
                return
            try:
                parent = self.node(node.parent)
            except Damaged as e:
                got = f"the rows before step {node.begins} are lost: node {node.parent[:12]}: {e}"
                raise Damaged(got) from None
            if contradicts_parent(node, parent):
                raise Damaged(f"node {node.parent[:12]} cannot be its parent")
            node = parent

    def load(self, node: Node) -> dict[str, Tensor]:
        """Return the state of a node. Raise Damaged if it cannot be used; `save` then replaces it."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with self.files.local(_state_name(node.state)) as path:
                if sha256_file(path) != node.state:
                    raise Damaged("its state is torn or was changed after it was written")
                tensors = load_file(path)
        except FileNotFoundError:
            raise Damaged("its state does not exist") from None
        except OSError as e:
            raise Damaged(f"its state cannot be read ({e.strerror or e})") from None
        except SafetensorError as e:
            raise Damaged(f"its state is not a safetensors file ({e})") from None
        self.touch(node)
        return tensors

    def touch(self, node: Node) -> None:
        """Record that the state of a node was used now, so that it is evicted last."""
        with suppress(OSError):  # a store that is read only
            self.files.touch(_state_name(node.state))

    def states(self) -> dict[str, Entry]:
        """Return hash -> size and time of last use of every state in the store."""
        entries = self.files.list("states")
        return {name.removesuffix(".safetensors"): e for name, e in entries.items() if STATE.fullmatch(name)}

    def roots(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each root with the origin that it is the hash of. Damaged ones are skipped."""
        for name in sorted(self._root_keys()):
            with suppress(OSError):
                origin = self._origin(name)
                if origin:
                    yield name, origin

    def _root_keys(self) -> set[str]:
        return {name for name in self.files.names("roots") if KEY.fullmatch(name)}

    def _origin(self, root: str) -> dict[str, Any] | None:
        """Return what a root is the hash of, or None if that is lost or damaged."""
        from mainrun.store import lineage

        try:
            origin = records.parse(self.files.read(f"roots/{root}"))
        except (FileNotFoundError, IsADirectoryError, NotAFile, ValueError):
            return None
        if not isinstance(origin, dict) or lineage.root(origin) != root:
            return None
        return origin

    # -- writing

    def begin(self, root: str, origin: dict[str, Any]) -> None:
        """Prepare for the first node of a root: create the store, and write or repair the root's file."""
        if not self.files.exists("store.json"):
            self.files.write("store.json", canonical_json({"format": FORMAT}))
        if self._origin(root) is None:
            self.files.write(f"roots/{root}", canonical_json(origin))

    def save(
        self, node: Node, tensors: dict[str, Tensor], allowed: Callable[[], None] = lambda: None
    ) -> Node:
        """Write a node, and return it as the store holds it. `allowed` is called last and may raise Refused.

        An existing node is left unchanged, but its state must have the same bits. A state that was evicted or
        is damaged is written again.
        """
        from mainrun.store.checkpoint import save_tensors

        with self.files.new() as path:
            save_tensors(tensors, path)
            node = replace(node, state=sha256_file(path), size=path.stat().st_size)
            if node.size > self.size:
                got = f"its {node.size:,} bytes are more than the store may hold ({self.size:,})"
                raise Refused(f"{got}; raise --store-size")
            existing = self._existing(node)
            if existing:
                _check_same_bits(existing, node)
            allowed()
            if self._is_intact(node.state):
                self.touch(node)
            else:
                self.files.put(path, _state_name(node.state))
        allowed()  # writing may have taken a while
        if existing is None and not self.files.create(f"nodes/{node.key}", node.dump()):
            return self.save(node, tensors, allowed)  # another process was faster
        with suppress(OSError):
            self.files.remove(f"wants/{node.key}")
        return existing or node

    def _existing(self, node: Node) -> Node | None:
        """Return the node that the store has under a key. Remove it if it is damaged."""
        name = f"nodes/{node.key}"
        try:
            return self.node(node.key)
        except Unreadable as e:
            raise Refused(f"the store has step {node.step} already, but {e}") from None
        except Missing:
            return None
        except Damaged:
            if self.files.exists(name):
                self.files.remove(name)
            return None

    def _is_intact(self, state: str) -> bool | None:
        """Whether a state is as it was written. None: it does not exist."""
        try:
            with self.files.local(_state_name(state)) as path:
                return sha256_file(path) == state
        except FileNotFoundError:
            return None
        except (IsADirectoryError, NotAFile):
            return False

    # -- wants, pins and eviction

    def want(self, key: str, run: str) -> None:
        """Ask the runs that pass a node to keep it. The request lasts until it is saved, or for a day."""
        self.files.create(f"wants/{key}", canonical_json({"run": run}))

    def wants(self) -> set[str]:
        """Return the keys of the nodes that runs wait for."""
        return self.files.names("wants")

    def pin(self, name: str, keys: Iterable[str]) -> None:
        """Protect nodes from eviction until `unpin(name)`."""
        self.files.write(f"pins/{name}", canonical_json(sorted(keys)))

    def unpin(self, name: str) -> None:
        """Remove a pin."""
        self.files.remove(f"pins/{name}")

    def pinned(self) -> set[str]:
        """Return the keys of all pinned nodes."""
        keys: set[str] = set()
        for name in self.files.names("pins") - self._expired_pins():
            keys |= self._pin(name) or set()
        return keys

    def _expired_pins(self) -> set[str]:
        """Return the pins of killed batches: one that still runs is done within a week."""
        oldest = time.time() - BATCH_PIN_LIFETIME
        expired = set()
        for name, entry in self.files.list("pins").items():
            if name.startswith("batch-") and entry.modified < oldest:
                expired.add(name)
        return expired

    def _pin(self, name: str) -> set[str] | None:
        """Return the keys of a pin, or None if it is damaged."""
        try:
            keys = records.parse(self.files.read(f"pins/{name}"))
        except FileNotFoundError:  # removed since the listing
            return set()
        except (IsADirectoryError, NotAFile, ValueError):
            return None
        if not isinstance(keys, list):
            return None
        if not all(isinstance(key, str) and KEY.fullmatch(key) for key in keys):
            return None
        return set(keys)

    def evict(self, keep: Set[str] = frozenset()) -> list[str]:
        """Remove the least recently used states until the rest fits the limit, and return them.

        keep: keys of nodes that are kept like pinned ones, whatever their size.
        """
        states = self.states()
        excess = sum(entry.size for entry in states.values()) - self.size
        if excess <= 0:
            return []
        kept = set()
        for key in (keep | self.pinned()) & self.node_keys():
            with suppress(Damaged):
                kept.add(self.node(key, rows=False).state)
        now = time.time()
        self._correct_future_times("states")
        evicted = []
        for state in sorted(states, key=lambda state: (min(states[state].modified, now), state)):
            if excess <= 0:
                break
            if state not in kept:
                self.files.remove(_state_name(state))
                excess -= states[state].size
                evicted.append(state)
        return evicted

    def _correct_future_times(self, folder: str) -> None:
        """Set times in the future to now. The clock was set back, so they say nothing about the last use."""
        for name, entry in self.files.list(folder).items():
            if entry.modified > time.time() + GRACE:
                with suppress(OSError):
                    self.files.touch(f"{folder}/{name}")

    # -- housekeeping

    def summary(self) -> tuple[list[Node], list[tuple[str, str]]]:
        """Return all nodes without rows, by root and step, and (key, reason) of those that are damaged."""
        nodes: list[Node] = []
        damaged: list[tuple[str, str]] = []
        for key in sorted(self.node_keys()):
            try:
                nodes.append(self.node(key, rows=False))
            except Damaged as e:
                damaged.append((key, str(e)))
        return sorted(nodes, key=lambda node: (node.root, node.step, node.key)), damaged

    def verify(self) -> list[str]:
        """Read everything, and return a sentence for each thing that is not as it was written."""
        nodes: dict[str, Node] = {}
        faults: list[str] = []
        for key in sorted(self.node_keys()):
            try:
                nodes[key] = replace(self.node(key), rows=())
            except Damaged as e:
                faults.append(f"node {key[:12]}: {e}")
        roots = self._root_keys()
        faults.extend(_node_faults(nodes, roots))
        faults.extend(self._state_faults(nodes.values()))
        for root in sorted(roots):
            if self._origin(root) is None:
                faults.append(f"root {root[:12]}: torn or changed after it was written")
        faults.extend(f"pin {name}: torn, or not a pin; it protects nothing" for name in self._damaged_pins())
        faults.extend(f"{name}: not a file of a store; move it away" for name in self._strays())
        return faults

    def _state_faults(self, nodes: Iterable[Node]) -> Iterator[str]:
        owners = {node.state: node for node in nodes}
        for state, entry in sorted(self.states().items()):
            owner = "no node"
            if state in owners:
                owner = f"step {owners[state].step} of {owners[state].run}"
            try:
                if self._is_intact(state) is False:
                    yield f"state {state[:12]} ({owner}): torn or changed after it was written"
            except OSError as e:
                yield f"state {state[:12]} ({owner}): it cannot be read ({e.strerror or e})"
            if entry.modified > time.time() + GRACE:
                yield f"state {state[:12]}: last used in the future; the clock has been set back"

    def _damaged_pins(self) -> list[str]:
        return sorted(name for name in self.files.names("pins") if self._pin(name) is None)

    def _strays(self) -> list[str]:
        """Return the names of files that are not part of a store."""
        strays = sorted(self.files.names("") - {"store.json", "pins", "new", *FOLDERS})
        for folder, pattern in FOLDERS.items():
            for name in sorted(self.files.names(folder)):
                if not pattern.fullmatch(name):
                    strays.append(f"{folder}/{name}")
        return strays

    def gc(self) -> dict[str, int]:
        """Remove what cannot be used, evict states beyond the limit, and return the counts.

        This removes damaged nodes and states, states without a node, and nodes that lead to no state. The
        nodes after a lost node stay: they are usable again once a run trains the lost steps.
        """
        now = time.time()
        nodes, damaged, unreadable = self._sort_nodes()
        for name in self._expired_pins():
            self.files.remove(f"pins/{name}")
        for name in damaged:
            self.files.remove(name)
        counts = {"damaged": len(damaged), "orphans": 0, "rows": 0, "evicted": 0, "bytes": 0}
        owned = {node.state for node in nodes}
        self._remove_useless_states(counts, None if unreadable else owned, now)
        for folder in ("states", "new", "leases", "wants", "pins"):
            self._correct_future_times(folder)
        states = self.states()
        evicted = self.evict()
        counts["evicted"] = len(evicted)
        counts["bytes"] += sum(states[state].size for state in evicted if state in states)
        if not unreadable:
            counts["rows"] = self._remove_useless_nodes(nodes, now)
        # A process that lives rewrites its lease all the time.
        for folder, age in (("new", GRACE), ("leases", GRACE), ("wants", WANT_LIFETIME)):
            for name, entry in self.files.list(folder).items():
                if entry.modified < now - age:
                    self.files.remove(f"{folder}/{name}")
        return counts

    def _sort_nodes(self) -> tuple[list[Node], list[str], bool]:
        """Return the intact nodes, the names of damaged files, and whether some node cannot be read now."""
        nodes: dict[str, Node] = {}
        damaged: list[str] = []
        unreadable = False
        for key in self.node_keys():
            try:
                nodes[key] = replace(self.node(key), rows=())
            except Unreadable:
                unreadable = True
            except Damaged:
                damaged.append(f"nodes/{key}")
        misplaced = [node.key for node in nodes.values() if contradicts_parent(node, nodes.get(node.parent))]
        for key in misplaced:
            damaged.append(f"nodes/{key}")
            del nodes[key]
        damaged.extend(f"roots/{root}" for root in self._root_keys() if self._origin(root) is None)
        damaged.extend(f"pins/{name}" for name in self._damaged_pins())
        return list(nodes.values()), damaged, unreadable

    def _remove_useless_states(self, counts: dict[str, int], owned: Set[str] | None, now: float) -> None:
        """Remove torn and orphaned states. owned: the states of all nodes, or None if not all are known."""
        for state, entry in self.states().items():
            try:
                torn = self._is_intact(state) is False
            except OSError:
                continue
            # the node of a young state may not be written yet
            orphan = owned is not None and state not in owned and not _is_young(entry.modified, now)
            if torn or orphan:
                counts["damaged" if torn else "orphans"] += 1
                counts["bytes"] += entry.size
                self.files.remove(_state_name(state))

    def _remove_useless_nodes(self, nodes: list[Node], now: float) -> int:
        """Remove nodes that lead to no state, unless they are young. Return how many."""
        states = self.states()
        needed: set[str] = set()
        removed = 0
        for node in sorted(nodes, key=lambda node: -node.step):
            if node.state in states or node.key in needed or _is_young(node.made, now):
                needed.add(node.parent)
            else:
                removed += 1
                self.files.remove(f"nodes/{node.key}")
        return removed


def _state_name(state: str) -> str:
    return f"states/{state}.safetensors"


def _is_young(modified: float, now: float) -> bool:
    """Whether a file may belong to a process that is writing. A time far in the future is not believed."""
    return now - GRACE < modified < now + GRACE


def _check_same_bits(existing: Node, node: Node) -> None:
    """Refuse a node whose state or losses differ from those in the store."""
    audit = "`mainrun store audit` finds out which is right"
    if existing.state != node.state:
        got = f"the store has other bits for step {node.step} (by {existing.run})"
        raise Refused(f"{got}: two trainings of the same steps differ; {audit}")
    step = _first_other_loss(existing.rows, node.rows)
    if step:
        raise Refused(f"the store has another loss for step {step} (by {existing.run}); {audit}")


def _first_other_loss(a: Iterable[dict[str, Any]], b: Iterable[dict[str, Any]]) -> int:
    """Return the first step for which both have a loss, and not the same; 0 if there is none."""
    known = {(row.get("event"), row.get("step"), row.get("split")): row.get("loss") for row in a}
    for row in b:
        identity = (row.get("event"), row.get("step"), row.get("split"))
        if identity in known and known[identity] != row.get("loss"):
            return row.get("step") or 0
    return 0


def _node_faults(nodes: Mapping[str, Node], roots: Set[str]) -> Iterator[str]:
    """Yield a sentence for each node whose parent or root is lost or contradicts it."""
    for node in nodes.values():
        name = f"node {node.key[:12]} (step {node.step})"
        parent = nodes.get(node.parent)
        if node.begins and parent is None:
            yield f"{name}: the rows before step {node.begins} are lost with {node.parent[:12]}"
        elif contradicts_parent(node, parent):
            yield f"{name}: node {node.parent[:12]} cannot be its parent"
        if node.root not in roots:
            yield f"{name}: the file of its root {node.root[:12]} is lost"
