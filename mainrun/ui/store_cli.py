"""`mainrun store`: list, check and clean the store of shared training steps.

Only the command `audit` imports torch.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.files import inputs
from mainrun.ui.console import Debug, Json, Out, commands, emit, process_group, show_table, stoppable

if TYPE_CHECKING:
    from mainrun.store.files import Entry
    from mainrun.store.nodes import Node, Store

ALLOWED = "give a folder, or a URL that fsspec can open"
NODE_COLUMNS = ("key", "root", "step", "begins", "run", "size", "seconds", "made")

StorePlace = Annotated[
    str | None,
    typer.Option("--store", metavar="PLACE", help="The store: a folder, or a URL that fsspec can open."),
]


def open_store(place: str | None, out: Path, size: str = "20GB", *, must: bool = False) -> Store:
    """Open the store that a command uses.

    must: whether to raise UsageError if the store does not exist.
    """
    from mainrun.store import nodes
    from mainrun.store.files import folder_of

    if place is not None and not place.strip():
        raise UsageError(f"got --store ''; {ALLOWED}")
    option = "--store" if place is not None else "the store"
    place = place or nodes.default_place(out)
    inputs.expanded(re.sub("^(file|local):(//)?", "", place), option)
    folder = folder_of(place)
    if folder:
        inputs.check_path(folder, option)
        _check_out(folder, out)
    store = _open(place, size)
    if must and not store.files.exists("store.json"):
        fix = "train a run to create it, or give another place with --store or --out"
        raise UsageError(f"there is no store at {store}; {fix}")
    return store


def _check_out(folder: Path, out: Path) -> None:
    """Raise an error that names --out if the store is inside `out` and `out` is not a folder.

    Without this check, the error message would name the store instead of the option --out.
    """
    from mainrun.store.rundir import check_writable

    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if out.resolve() in folder.resolve().parents and not existing.is_dir():
        check_writable(out)


def _open(place: str, size: str) -> Store:
    """Open a store. Convert every error of fsspec, such as an unknown URL scheme, to UsageError."""
    from mainrun.store import nodes

    try:
        return nodes.Store(place, parse_size(size))
    except MainrunError:
        raise
    except Exception as e:
        why = inputs.shortened(f"{type(e).__name__}: {e}", 200)
        raise UsageError(f"store {inputs.shown(place, 80)} cannot be opened ({why}); {ALLOWED}") from None


def parse_size(text: str, option: str = "--store-size") -> int:
    """Parse the value of an option such as 20GB and return the number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kmgt]?)b?", text.strip().lower())
    if not match:
        fix = "give a number with the unit KB, MB, GB or TB, like 20GB"
        raise UsageError(f"got {option} {inputs.shown(text, 80)}; {fix}")
    number, unit = match.groups()
    return int(float(number) * 1000 ** " kmgt".index(unit or " "))


app = commands("List, check and clean the store of shared training steps.")


@app.command("ls")
def ls(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """List the nodes, which are the states from which runs can continue."""
    store = open_store(place, out, must=True)
    nodes, damaged = store.summary()
    states = store.states()
    pinned = store.pinned()
    rows = [_node_row(node, states, pinned) for node in nodes]
    if as_json:
        emit({"nodes": rows, "damaged": [{"key": key, "why": why} for key, why in damaged]})
        return
    lines = [
        [
            row["key"][:12],
            row["root"][:12],
            str(row["step"]),
            _state(row),
            str(row["run"]),
            _ago(row["made"]),
            _ago(row["used"]),
        ]
        for row in rows
    ]
    show_table(["node", "root", "step", "state", "by", "made", "used"], lines)
    for key, why in damaged:
        print(f"damaged: {key[:12]}: {why}", file=sys.stderr)


def _node_row(node: Node, states: dict[str, Entry], pinned: set[str]) -> dict[str, Any]:
    """Return the values that `ls` prints for a node."""
    row: dict[str, Any] = {name: getattr(node, name) for name in NODE_COLUMNS}
    entry = states.get(node.state)
    row["state"] = entry is not None
    row["used"] = entry.modified if entry else None
    row["pinned"] = node.key in pinned
    return row


def _state(row: dict[str, Any]) -> str:
    from mainrun.run.progress import short

    state = f"{short(row['size'])}B" if row["state"] else "evicted"
    return f"{state}, pinned" if row["pinned"] else state


def _ago(when: float | None) -> str:
    from mainrun.run.progress import clock

    if when is None:
        return ""
    seconds = time.time() - when
    if seconds < 0:
        return "in the future"
    return f"{clock(seconds)} ago"


@app.command("du")
def du(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Show the size of the store, and the training time that it saves."""
    from mainrun.run.progress import clock, short

    store = open_store(place, out, must=True)
    nodes, damaged = store.summary()
    states = store.states()
    useful: list[Node] = []  # nodes with a stored state, and the ancestors of these nodes
    ancestors: set[str] = set()
    for node in sorted(nodes, key=lambda node: -node.step):
        if node.state in states or node.key in ancestors:
            useful.append(node)
            ancestors.add(node.parent)
    size = sum(entry.size for entry in states.values())
    steps = sum(node.step - node.begins for node in useful)
    seconds = sum(node.seconds for node in useful)
    if as_json:
        emit(
            {
                "store": str(store),
                "nodes": len(nodes),
                "damaged": len(damaged),
                "states": len(states),
                "bytes": size,
                "roots": len({node.root for node in nodes}),
                "steps": steps,
                "seconds": seconds,
            }
        )
        return
    print(f"{store}: {short(size)}B in {len(states):,} states of {len(nodes):,} nodes")
    print(f"{steps:,} steps that need not be trained again: {clock(seconds)} of training")


@app.command("gc")
def gc(
    out: Out = Path("runs"),
    place: StorePlace = None,
    size: Annotated[
        str,
        typer.Option(
            "--store-size", metavar="SIZE", help="Evict the least recently used states above this store size."
        ),
    ] = "20GB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove damaged and useless files, and evict states beyond the size limit.

    Runs are not affected. If a run needs a removed state, it trains the steps of this state again.
    """
    store = open_store(place, out, size, must=True)
    with _writing(store):
        counts = store.gc()
    if as_json:
        emit(counts)
    else:
        removed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        print(f"removed: {removed}")


@app.command("verify")
def verify(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Read all files of the store, and list the files that are damaged or do not belong to the store.

    The exit code is 1 if any file is damaged or does not belong to the store.
    """
    store = open_store(place, out, must=True)
    faults = store.verify()
    if as_json:
        emit(faults)
    elif faults:
        print(*faults, sep="\n")
    else:
        print(f"{len(store.node_keys()):,} nodes; no file is damaged")
    if faults:
        count = "found 1 fault" if len(faults) == 1 else f"found {len(faults)} faults"
        raise MainrunError(f"{count}; runs skip damaged files, and `mainrun store gc` removes them")


@app.command("audit")
def audit(
    segments: Annotated[
        int, typer.Option("--segments", min=1, max=1_000_000, help="Number of segments to train again.")
    ] = 3,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="The same seed chooses the same segments."),
    ] = None,
    reach: Annotated[
        int,
        typer.Option(
            "--reach",
            metavar="STEPS",
            min=1,
            help="Maximum number of steps to train again for one segment.",
        ),
    ] = 10_000,
    out: Out = Path("runs"),
    place: StorePlace = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train random segments of the store again and compare every bit.

    Each segment is trained from the nearest earlier state in the store, or from step 0. The exit code is 1 if
    a segment differs.
    """
    store = open_store(place, out, must=True)
    rows: list[dict[str, Any]] = []
    with process_group(), stoppable():
        from mainrun.checks.audit import audit

        for finding in audit(store, segments, seed, reach):
            node = finding.node
            row = {name: getattr(node, name) for name in ("key", "begins", "step", "run")}
            rows.append(row | {"status": finding.status, "why": finding.why})
            if not as_json:
                steps = f"steps {node.begins + 1} to {node.step} of {node.run}"
                why = f": {finding.why}" if finding.why else ""
                print(f"{finding.status:7}  {node.key[:12]}  {steps}{why}", flush=True)
    if as_json:
        emit(rows)
    elif not rows:
        print("nothing to audit: the store has no nodes")
    if any(row["status"] == "differs" for row in rows):
        raise MainrunError("a segment that was trained again differs from the store; see the lines above")


NodeKey = Annotated[str, typer.Argument(metavar="NODE", help="A node key, or a unique prefix of a node key.")]


@app.command("pin")
def pin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Protect a node from eviction."""
    store = open_store(place, out, must=True)
    node = _node(store, key)
    with _writing(store):
        store.pin(f"node-{node.key}", [node.key])
    print(f"pinned: {node.key[:12]}, step {node.step} of {node.run}")


@app.command("unpin")
def unpin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Allow a pinned node to be evicted again."""
    store = open_store(place, out, must=True)
    pins = [name for name in store.files.names("pins") if name.startswith(f"node-{key}")]
    if len(pins) != 1:
        state = "not unique" if pins else "not pinned"
        raise UsageError(
            f"node {key!r} is {state} in the store {store}; `mainrun store ls` lists pinned nodes"
        )
    with _writing(store):
        store.unpin(pins[0])
    print(f"not pinned: {pins[0].removeprefix('node-')[:12]}")


def _node(store: Store, beginning: str) -> Node:
    """Return the node whose key starts with a prefix. Raise UsageError if no node or several nodes match."""
    from mainrun.store.nodes import Damaged

    matches = sorted(key for key in store.node_keys() if key.startswith(beginning))
    if not matches:
        got = f"no node key in the store {store} begins with {beginning!r}"
        raise UsageError(f"{got}; `mainrun store ls` lists all nodes")
    if len(matches) > 1:
        got = f"{len(matches):,} node keys in the store {store} begin with {beginning!r}"
        raise UsageError(f"{got}; give more characters of the key")
    key = matches[0]
    try:
        return store.node(key, rows=False)
    except Damaged as e:
        raise RunError(f"node {key[:12]} cannot be used: {e}; `mainrun store gc` removes it") from None


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    """Convert an OSError of the store to a RunError with a clear message."""
    try:
        yield
    except OSError as e:
        got = f"the store {store} cannot be written ({e.strerror or e})"
        raise RunError(f"{got}; make it writable, or give another store with --store") from None
