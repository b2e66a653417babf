"""`mainrun store`: what the store has, and its housekeeping. No torch until something is trained again."""

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
    from mainrun.store.nodes import Node, Store

StorePlace = Annotated[
    str | None,
    typer.Option("--store", metavar="PLACE", help="The store: a folder, or a URL that fsspec knows."),
]


def open_store(place: str | None, out: Path, size: str = "20GB", *, must: bool = False) -> Store:
    """must: there has to be one already."""
    from mainrun.store import nodes
    from mainrun.store.files import folder_of
    from mainrun.store.rundir import check_writable

    if place is not None and not place.strip():
        raise UsageError("got --store ''; give a folder, or a URL that fsspec knows")
    option = "--store" if place is not None else "the store"
    place = place or nodes.whereabouts(out)
    inputs.expanded(re.sub("^(file|local):(//)?", "", place), option)
    folder = folder_of(place)
    if folder:
        inputs.check_path(folder, option)
    if (
        folder
        and out.resolve() in folder.resolve().parents
        and not next(p for p in (out, *out.absolute().parents) if p.exists()).is_dir()
    ):
        check_writable(out)  # it is --out that is wrong, not the store
    store = _opened(place, size)
    if must and not store.files.exists("store.json"):
        raise UsageError(
            f"there is no store at {store}; runs make one there, or give another with --store or --out"
        )
    return store


def _opened(place: str, size: str) -> Store:
    """fsspec's places fail in ways of their own: no library, no such scheme, a URL that one cannot read."""
    from mainrun.store import nodes

    try:
        return nodes.Store(place, _bytes(size))
    except MainrunError:
        raise
    except Exception as e:
        why = inputs.shortened(f"{type(e).__name__}: {e}", 200)
        raise UsageError(
            f"store {inputs.shown(place, 80)} cannot be opened ({why}); give a folder, or a URL that fsspec knows"
        ) from None


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kmgt]?)b?", text.strip().lower())
    if not found:
        raise UsageError(
            f"got --store-size {inputs.shown(text, 80)}; write a number of bytes with K, M, G or T behind it, like 20GB"
        )
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))


app = commands("The steps that runs share: ls, du, gc, verify, audit, pin, unpin.")


@app.command("ls")
def ls(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """List the nodes: where runs can begin."""
    store = open_store(place, out, must=True)
    nodes, damaged = store.summary()
    states, pinned = store.states(), store.pinned()
    rows = [
        {
            name: getattr(node, name)
            for name in ("key", "root", "step", "begins", "run", "size", "seconds", "made")
        }
        | {
            "state": node.state in states,
            "used": states[node.state].modified if node.state in states else None,
            "pinned": node.key in pinned,
        }
        for node in nodes
    ]
    if as_json:
        emit({"nodes": rows, "damaged": [{"key": key, "why": why} for key, why in damaged]})
        return
    lines = [
        [
            r["key"][:12],
            r["root"][:12],
            str(r["step"]),
            _state(r),
            str(r["run"]),
            _ago(r["made"]),
            _ago(r["used"]),
        ]
        for r in rows
    ]
    show_table(["node", "root", "step", "state", "by", "made", "used"], lines)
    for key, why in damaged:
        print(f"damaged: {key[:12]}: {why}", file=sys.stderr)


def _state(row: dict[str, Any]) -> str:
    from mainrun.run.progress import short

    return (f"{short(row['size'])}B" if row["state"] else "evicted") + (", pinned" if row["pinned"] else "")


def _ago(when: float | None) -> str:
    from mainrun.run.progress import clock

    if when is None:
        return ""
    seconds = time.time() - when
    return f"{clock(seconds)} ago" if seconds >= 0 else "in the future"


@app.command("du")
def du(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """What the store holds, and the training that it saves."""
    from mainrun.run.progress import clock, short

    store = open_store(place, out, must=True)
    nodes, damaged = store.summary()
    states = store.states()
    needed, ways = [], set()  # what leads to a state
    for node in sorted(nodes, key=lambda node: -node.step):
        if node.state in states or node.key in ways:
            needed.append(node)
            ways.add(node.parent)
    found = {
        "store": str(store), "nodes": len(nodes), "damaged": len(damaged), "states": len(states),
        "bytes": sum(entry.size for entry in states.values()), "roots": len({node.root for node in nodes}),
        "steps": sum(node.step - node.begins for node in needed), "seconds": sum(node.seconds for node in needed),
    }  # fmt: skip
    if as_json:
        emit(found)
        return
    print(
        f"{found['store']}: {short(found['bytes'])}B in {found['states']:,} states of {found['nodes']:,} nodes"
    )
    print(f"{found['steps']:,} steps that need not be trained again: {clock(found['seconds'])} of training")


@app.command("gc")
def gc(
    out: Out = Path("runs"),
    place: StorePlace = None,
    size: Annotated[
        str, typer.Option("--store-size", metavar="SIZE", help="Evict the least recently used beyond this.")
    ] = "20GB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Clear what is damaged or leads nowhere, and evict beyond the size.

    No run breaks by it; what is gone is trained again when it is wanted.
    """
    store = open_store(place, out, size, must=True)
    with _writing(store):
        counts = store.gc()
    if as_json:
        emit(counts)
    else:
        print(f"cleared: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")


@app.command("verify")
def verify(
    out: Out = Path("runs"), place: StorePlace = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Read everything, and name what is not as it was written.

    Exits with 1 when there is any.
    """
    store = open_store(place, out, must=True)
    found = store.verify()
    if as_json:
        emit(found)
    else:
        print(
            *found,
            *([] if found else [f"{len(store.node_keys()):,} nodes, all as they were written"]),
            sep="\n",
        )
    if found:
        count = "1 finding" if len(found) == 1 else f"{len(found)} findings"
        raise MainrunError(
            f"{count}; runs pass over what is damaged, and `mainrun store gc` clears what is the store's own"
        )


@app.command("audit")
def audit(
    segments: Annotated[int, typer.Option("--segments", min=1, max=1_000_000, help="How many.")] = 3,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="The same seed takes the same ones; without it, others each time."
        ),
    ] = None,
    reach: Annotated[
        int,
        typer.Option("--reach", metavar="STEPS", min=1, help="The longest way back to a state to begin at."),
    ] = 10_000,
    out: Out = Path("runs"),
    place: StorePlace = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train random segments again and compare every bit.

    Each begins at the nearest earlier state that is still there, or at step 0. Exits with 1 when one differs.
    """
    store, found = open_store(place, out, must=True), list[dict[str, Any]]()
    with process_group(), stoppable():
        from mainrun.checks.audit import audit

        for finding in audit(store, segments, seed, reach):
            node = finding.node
            found.append(
                {
                    "key": node.key,
                    "begins": node.begins,
                    "step": node.step,
                    "run": node.run,
                    "status": finding.status,
                    "why": finding.why,
                }
            )
            if not as_json:
                why = f": {finding.why}" if finding.why else ""
                print(
                    f"{finding.status:7}  {node.key[:12]}  steps {node.begins + 1} to {node.step} of {node.run}{why}",
                    flush=True,
                )
    if as_json:
        emit(found)
    elif not found:
        print("nothing to audit: the store has no node")
    if any(finding["status"] == "differs" for finding in found):
        raise MainrunError("a segment trained again is not what the store holds; the lines above say which")


NodeKey = Annotated[str, typer.Argument(metavar="NODE", help="A node, or the unique beginning of one.")]


@app.command("pin")
def pin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Keep a node from eviction."""
    store = open_store(place, out, must=True)
    node = _node(store, key)
    with _writing(store):
        store.pin(f"node-{node.key}", [node.key])
    print(f"pinned: {node.key[:12]}, step {node.step} of {node.run}")


@app.command("unpin")
def unpin(key: NodeKey, out: Out = Path("runs"), place: StorePlace = None, debug: Debug = False) -> None:
    """Let a node be evicted again."""
    store = open_store(place, out, must=True)
    hits = [name for name in store.files.names("pins") if name.startswith(f"node-{key}")]
    if len(hits) != 1:
        raise UsageError(
            f"node {key!r} is {'not unique' if hits else 'not pinned'} in the store {store}; `mainrun store ls` shows what is"
        )
    with _writing(store):
        store.unpin(hits[0])
    print(f"not pinned: {hits[0].removeprefix('node-')[:12]}")


def _node(store: Store, beginning: str) -> Node:
    from mainrun.store.nodes import Damaged

    hits = sorted(key for key in store.node_keys() if key.startswith(beginning))
    if len(hits) != 1:
        if hits:
            raise UsageError(
                f"{len(hits):,} nodes of the store {store} begin with {beginning!r}; give more characters of the key"
            )
        raise UsageError(
            f"no node of the store {store} begins with {beginning!r}; `mainrun store ls` lists them"
        )
    try:
        return store.node(hits[0], rows=False)
    except Damaged as e:
        raise RunError(f"node {hits[0][:12]} cannot be used: {e}; `mainrun store gc` clears it") from None


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise RunError(
            f"the store {store} cannot be written ({e.strerror or e}); make it writable, or give another with --store"
        ) from None
