"""The store of nodes. A node is the state of a run after a training step.

    store.json                   the format of the store
    nodes/KEY                    a line that describes the node, then a line per metric row since its parent
    states/SHA256.safetensors    weights, optimizer state and averages, named by the hash of the file
    roots/KEY                    the values from which the first key of a key chain is computed
    leases/KEY.TOKEN             the process that is training the steps up to a node (leases.py)
    wants/KEY                    a request from a waiting run to save this node
    pins/NAME                    the keys of nodes that must not be evicted

KEY is the key of the node in the key chain of its run (see lineage.py). The state of a node is written before
the file nodes/KEY. The node exists as soon as the file nodes/KEY exists. All data is verified when it is
read. Nodes that are incomplete or were modified are reported and skipped. Eviction removes the state of a
node but keeps its metric rows, so that the history of later nodes stays complete. This module imports torch
only when it loads a state.
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
SIZE = 20_000_000_000  # the default limit for the total size of all states, in bytes
KEY = re.compile(r"[0-9a-f]{64}")
STATE = re.compile(r"[0-9a-f]{64}\.safetensors")
LEASE = re.compile(r"[0-9a-f]{64}\.\d{6}")
# All file names in a folder must match the pattern of the folder.
FOLDERS = {"nodes": KEY, "states": STATE, "roots": KEY, "wants": KEY, "leases": LEASE}
BEFORE_FIRST_NODE = {"new", "leases", "wants", "pins"}  # folders that may be created before store.json

BATCH_PIN_LIFETIME = 7 * 86_400.0  # after this many seconds, the pin of a killed batch of runs is ignored
WANT_LIFETIME = 86_400.0  # a request to save a node expires after this many seconds
# A process may still be writing a file that was modified less than this number of seconds ago. The clocks of
# two machines may also differ by up to this number of seconds.
GRACE = 3600.0


class Damaged(Exception):
    """Raised if a node cannot be used. The error message gives the reason."""


class Missing(Damaged):
    """Raised if a node does not exist."""


class Unreadable(Damaged):
    """Raised if a node cannot be read at the moment. The node may be intact, so it is not removed."""


class Refused(Exception):
    """Raised if a node must not be written. The error message gives the reason."""


# -- nodes

# The fields of `Node` that have a different name in the file nodes/KEY.
JSON_KEYS = {
    "tokens_processed": "presented",
    "growth_state": "grown",
}


@dataclass(frozen=True)
class Node:
    """The content of a file nodes/KEY. `rows` is empty if only the first line of the file was read."""

    key: str
    parent: str  # the key of the run's previous node, or the root key of the run
    root: str
    step: int
    begins: int  # the training step of the parent node
    tokens_processed: int
    state: str  # the SHA-256 hash of the state file
    size: int  # the size of the state file, in bytes
    geometry: list[int]  # the number of rows and the row length of a batch for the official score
    seconds: float  # the training time since the parent node, in seconds
    run: str
    config: dict[str, Any]
    made: float  # the time at which the node was created, in seconds since 1970
    rows_sha256: str
    rows: tuple[dict[str, Any], ...] = ()
    # The growth state, which mainrun.growth.state defines.
    growth_state: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> bytes:
        """Return the content of the file nodes/KEY, including its checksums."""
        body = b"".join(json.dumps(row).encode() + b"\n" for row in self.rows)
        line: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            if name != "rows":
                line[JSON_KEYS.get(name, name)] = getattr(self, name)
        line["rows_sha256"] = hashlib.sha256(body).hexdigest()
        return canonical_json(line | {"sha256": sha256_json(line)}) + b"\n" + body

    @classmethod
    def parse(cls, key: str, content: bytes, *, rows: bool) -> Node:
        """Parse and verify a node, with or without its rows. Raise Damaged if the node cannot be used."""
        head, _, body = content.partition(b"\n")
        try:
            line = json.loads(head)
            checksum = line.pop("sha256")
            # `dump` computes the checksum of this line before it adds the checksum to the line.
            without_checksum = head.replace(b'"sha256": "%s", ' % checksum.encode(), b"", 1)
            if checksum != hashlib.sha256(without_checksum).hexdigest():
                raise Damaged("the first line was changed after it was written")
            if line["key"] != key:
                raise Damaged(f"the file contains a different node, {line['key'][:12]}")
            if not 0 <= line["begins"] < line["step"]:
                raise Damaged("the step of the node is not after the step of its parent")
            if rows and line["rows_sha256"] != hashlib.sha256(body).hexdigest():
                raise Damaged("the rows are incomplete or were changed after they were written")
            fault = records.fault(line, records.NODE)
            if fault:
                raise Damaged(f"the file does not contain a valid node: it {fault}")
            for name, json_key in JSON_KEYS.items():
                if json_key in line:
                    line[name] = line.pop(json_key)
            return cls(**line, rows=tuple(records.lines(body, records.any_row)) if rows else ())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Damaged("the file is incomplete, or is not a node") from None


def contradicts_parent(node: Node, parent: Node | None) -> bool:
    """Return whether a node contradicts the node that is stored under the parent key.

    parent: the stored parent node, or None if the store does not contain the parent node.
    """
    if not node.begins:
        return node.parent != node.root
    return parent is not None and (parent.step, parent.root) != (node.begins, node.root)


def default_place(out: Path) -> str:
    """Return the default location of the store for a folder of runs.

    The environment variable MAINRUN_STORE sets the location. If this variable is not set, the location is the
    folder .store in the folder `out`.
    """
    return os.environ.get("MAINRUN_STORE") or str(Path(out) / ".store")


# -- the store


class Store:
    """A store of nodes in a folder, or at a URL that fsspec can open.

    The store is created when its first node is saved.
    """

    def __init__(self, place: str | Path, size: int = SIZE) -> None:
        """Open a store.

        size: the limit for the total size of all states, in bytes.
        """
        self.files: Files = open_files(place)
        self.size = size
        another = "choose another location for the store"
        try:
            known = records.parse(self.files.read("store.json"))
            if known.get("format") != FORMAT:
                got = f"has format {known.get('format')}, but this version reads format {FORMAT}"
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
        """Refuse a folder that has no store.json but contains files of another program."""
        strays = self.files.names("") - BEFORE_FIRST_NODE
        # Another process may have just created the store. Every process writes store.json before the first
        # node.
        if strays and not self.files.exists("store.json"):
            got = f"store {place} contains {', '.join(sorted(strays)[:3])} but no store.json"
            raise ConfigError(f"{got}, so it is not a store; choose another location for the store")

    def __str__(self) -> str:
        return str(self.files)

    # -- reading

    def node_keys(self) -> set[str]:
        """Return the keys of all nodes, including damaged nodes."""
        return {name for name in self.files.names("nodes") if KEY.fullmatch(name)}

    def node(self, key: str, *, rows: bool = True) -> Node:
        """Read and verify a node, with or without its rows. Raise Damaged if the node cannot be used."""
        name = f"nodes/{key}"
        try:
            content = self.files.read(name) if rows else self.files.first_line(name)
        except FileNotFoundError:
            raise Missing("the file does not exist") from None
        except IsADirectoryError:
            raise Damaged("the file is a folder") from None
        except NotAFile as e:
            raise Damaged(str(e.strerror)) from None
        except OSError as e:
            raise Unreadable(f"the file cannot be read ({e.strerror or e})") from None
        return Node.parse(key, content, rows=rows)

    def history(self, node: Node, since: int = 0) -> Iterator[Node]:
        """Yield a node and its ancestors, newest first.

        The last yielded node contains the metric row of step `since + 1`.
        """
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
                raise Damaged(f"node {node.parent[:12]} cannot be the parent")
            node = parent

    def load(self, node: Node) -> dict[str, Tensor]:
        """Load the state of a node. Raise Damaged if the state cannot be used.

        A later `save` of the same node replaces a damaged state.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with self.files.local(_state_name(node.state)) as path:
                if sha256_file(path) != node.state:
                    raise Damaged("the state is incomplete or was changed after it was written")
                tensors = load_file(path)
        except FileNotFoundError:
            raise Damaged("the state does not exist") from None
        except OSError as e:
            raise Damaged(f"the state cannot be read ({e.strerror or e})") from None
        except SafetensorError as e:
            raise Damaged(f"the state is not a valid safetensors file ({e})") from None
        self.touch(node)
        return tensors

    def touch(self, node: Node) -> None:
        """Record that the state of a node has just been used.

        The least recently used states are evicted first.
        """
        with suppress(OSError):  # the store may be read-only
            self.files.touch(_state_name(node.state))

    def states(self) -> dict[str, Entry]:
        """Return a dict that maps the hash of each state to its size and the time of its last use."""
        entries = self.files.list("states")
        return {name.removesuffix(".safetensors"): e for name, e in entries.items() if STATE.fullmatch(name)}

    def roots(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each root key with the values from which the key is computed.

        Damaged root files are skipped.
        """
        for name in sorted(self._root_keys()):
            with suppress(OSError):
                origin = self._origin(name)
                if origin:
                    yield name, origin

    def _root_keys(self) -> set[str]:
        return {name for name in self.files.names("roots") if KEY.fullmatch(name)}

    def _origin(self, root: str) -> dict[str, Any] | None:
        """Return the values from which a root key is computed, or None if the values are lost or damaged."""
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
        """Prepare the store for the first node of a new key chain.

        Create the store if it does not exist, and write or repair the root file.
        """
        if not self.files.exists("store.json"):
            self.files.write("store.json", canonical_json({"format": FORMAT}))
        if self._origin(root) is None:
            self.files.write(f"roots/{root}", canonical_json(origin))

    def save(
        self, node: Node, tensors: dict[str, Tensor], allowed: Callable[[], None] = lambda: None
    ) -> Node:
        """Write a node and return the node that the store contains afterwards.

        An existing node is left unchanged. Refused is raised if the existing node and the new node have
        different states or different losses. If the state of the existing node was evicted or is damaged, the
        state is written again.

        allowed: a function that is called before the state is written, and again before the node is written.
        The function may raise Refused.
        """
        from mainrun.store.checkpoint import save_tensors

        with self.files.new() as path:
            save_tensors(tensors, path)
            node = replace(node, state=sha256_file(path), size=path.stat().st_size)
            if node.size > self.size:
                got = f"the state has {node.size:,} bytes, but the store may hold at most {self.size:,}"
                raise Refused(f"{got}; raise --store-size")
            existing = self._existing(node)
            if existing:
                _check_same_bits(existing, node)
            allowed()
            if self._is_intact(node.state):
                self.touch(node)
            else:
                self.files.put(path, _state_name(node.state))
        allowed()  # `allowed` is called again, because writing the state may take a long time
        if existing is None and not self.files.create(f"nodes/{node.key}", node.dump()):
            return self.save(node, tensors, allowed)  # another process has just created the node
        with suppress(OSError):
            self.files.remove(f"wants/{node.key}")
        return existing or node

    def _existing(self, node: Node) -> Node | None:
        """Return the stored node with the same key, or None. Remove the stored node if it is damaged."""
        name = f"nodes/{node.key}"
        try:
            return self.node(node.key)
        except Unreadable as e:
            raise Refused(f"the store already contains step {node.step}, but {e}") from None
        except Missing:
            return None
        except Damaged:
            if self.files.exists(name):
                self.files.remove(name)
            return None

    def _is_intact(self, state: str) -> bool | None:
        """Return whether a state is unchanged since it was written, or None if the state does not exist."""
        try:
            with self.files.local(_state_name(state)) as path:
                return sha256_file(path) == state
        except FileNotFoundError:
            return None
        except (IsADirectoryError, NotAFile):
            return False

    # -- wants, pins and eviction

    def want(self, key: str, run: str) -> None:
        """Ask other runs to save a node when they reach its training step.

        The request expires after a day.
        """
        self.files.create(f"wants/{key}", canonical_json({"run": run}))

    def wants(self) -> set[str]:
        """Return the keys of all nodes that runs are waiting for."""
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
        """Return the names of the pins that were left behind by killed batches of runs.

        A batch is assumed to have been killed if its pin is older than a week.
        """
        oldest = time.time() - BATCH_PIN_LIFETIME
        expired = set()
        for name, entry in self.files.list("pins").items():
            if name.startswith("batch-") and entry.modified < oldest:
                expired.add(name)
        return expired

    def _pin(self, name: str) -> set[str] | None:
        """Return the keys that a pin protects, or None if the pin is damaged."""
        try:
            keys = records.parse(self.files.read(f"pins/{name}"))
        except FileNotFoundError:  # another process has just removed the pin
            return set()
        except (IsADirectoryError, NotAFile, ValueError):
            return None
        if not isinstance(keys, list):
            return None
        if not all(isinstance(key, str) and KEY.fullmatch(key) for key in keys):
            return None
        return set(keys)

    def evict(self, keep: Set[str] = frozenset()) -> list[str]:
        """Evict the least recently used states until the size limit is met. Return the evicted states.

        keep: the keys of nodes whose states are kept. The states of pinned nodes are also kept.
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
        """Set every modification time that lies in the future to the current time.

        Modification times can lie in the future after the machine's clock was set back.
        """
        for name, entry in self.files.list(folder).items():
            if entry.modified > time.time() + GRACE:
                with suppress(OSError):
                    self.files.touch(f"{folder}/{name}")

    # -- housekeeping

    def summary(self) -> tuple[list[Node], list[tuple[str, str]]]:
        """Return all intact nodes and all damaged nodes.

        The intact nodes are returned without their rows, sorted by root and step. A damaged node is returned
        as a pair (key, reason).
        """
        nodes: list[Node] = []
        damaged: list[tuple[str, str]] = []
        for key in sorted(self.node_keys()):
            try:
                nodes.append(self.node(key, rows=False))
            except Damaged as e:
                damaged.append((key, str(e)))
        return sorted(nodes, key=lambda node: (node.root, node.step, node.key)), damaged

    def verify(self) -> list[str]:
        """Read and verify all files of the store. Return a message for each damaged or unknown file."""
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
                faults.append(f"root {root[:12]}: incomplete or changed after it was written")
        faults.extend(f"pin {name}: not a valid pin; it protects no nodes" for name in self._damaged_pins())
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
                    yield f"state {state[:12]} ({owner}): incomplete or changed after it was written"
            except OSError as e:
                yield f"state {state[:12]} ({owner}): the file cannot be read ({e.strerror or e})"
            if entry.modified > time.time() + GRACE:
                yield f"state {state[:12]}: last used in the future; the clock has been set back"

    def _damaged_pins(self) -> list[str]:
        return sorted(name for name in self.files.names("pins") if self._pin(name) is None)

    def _strays(self) -> list[str]:
        """Return the names of the files that do not belong to the store."""
        strays = sorted(self.files.names("") - {"store.json", "pins", "new", *FOLDERS})
        for folder, pattern in FOLDERS.items():
            for name in sorted(self.files.names(folder)):
                if not pattern.fullmatch(name):
                    strays.append(f"{folder}/{name}")
        return strays

    def gc(self) -> dict[str, int]:
        """Remove useless files and evict states beyond the size limit. Return the removed numbers and bytes.

        Damaged nodes, damaged states and states without a node are useless. A node is useless if its state is
        missing and no later node needs its rows. Nodes whose ancestor was lost are kept, because they become
        usable again when a run trains the lost steps.
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
        # The lease file of a living process is never old, because the process rewrites the file every few
        # seconds.
        for folder, age in (("new", GRACE), ("leases", GRACE), ("wants", WANT_LIFETIME)):
            for name, entry in self.files.list(folder).items():
                if entry.modified < now - age:
                    self.files.remove(f"{folder}/{name}")
        return counts

    def _sort_nodes(self) -> tuple[list[Node], list[str], bool]:
        """Return the intact nodes, the names of damaged files, and whether any node is unreadable."""
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
        """Remove damaged states, and states that belong to no node.

        counts: the numbers of removed files and bytes. This function updates the numbers.
        owned: the states that belong to a node, or None if the store contains an unreadable node.
        """
        for state, entry in self.states().items():
            try:
                torn = self._is_intact(state) is False
            except OSError:
                continue
            # A state is written before its node. A new state may therefore have no node yet.
            orphan = owned is not None and state not in owned and not _is_young(entry.modified, now)
            if torn or orphan:
                counts["damaged" if torn else "orphans"] += 1
                counts["bytes"] += entry.size
                self.files.remove(_state_name(state))

    def _remove_useless_nodes(self, nodes: list[Node], now: float) -> int:
        """Remove the nodes that have no state and that no later node needs.

        Return the number of removed nodes. Nodes that were written very recently are kept.
        """
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
    """Return whether a file is so new that a process may still be writing it.

    A modification time far in the future must be wrong, so a file with such a time does not count as new.
    """
    return now - GRACE < modified < now + GRACE


def _check_same_bits(existing: Node, node: Node) -> None:
    """Raise Refused if a new node and the stored node have different states or different losses."""
    audit = "`mainrun store audit` shows which result is correct"
    if existing.state != node.state:
        got = f"the store has a different state for step {node.step} (by {existing.run})"
        raise Refused(f"{got}, so training was not reproducible; {audit}")
    step = _first_other_loss(existing.rows, node.rows)
    if step:
        raise Refused(f"the store has a different loss for step {step} (by {existing.run}); {audit}")


def _first_other_loss(a: Iterable[dict[str, Any]], b: Iterable[dict[str, Any]]) -> int:
    """Return the first step at which two lists of rows have different losses, or 0 if no losses differ."""
    known = {(row.get("event"), row.get("step"), row.get("split")): row.get("loss") for row in a}
    for row in b:
        identity = (row.get("event"), row.get("step"), row.get("split"))
        if identity in known and known[identity] != row.get("loss"):
            return row.get("step") or 0
    return 0


def _node_faults(nodes: Mapping[str, Node], roots: Set[str]) -> Iterator[str]:
    """Yield a message for each node that contradicts its parent, or whose parent or root is lost."""
    for node in nodes.values():
        name = f"node {node.key[:12]} (step {node.step})"
        parent = nodes.get(node.parent)
        if node.begins and parent is None:
            yield f"{name}: the rows before step {node.begins} are lost with {node.parent[:12]}"
        elif contradicts_parent(node, parent):
            yield f"{name}: node {node.parent[:12]} cannot be the parent"
        if node.root not in roots:
            yield f"{name}: the file of its root {node.root[:12]} is lost"
