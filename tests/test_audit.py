"""The audit detects changes that keep all checksums valid. This file also tests the store commands."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mainrun.checks import audit as auditor
from mainrun.checks.audit import AuditResult, audit
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core import device, machine_class
from mainrun.data.corpus import load_corpus
from mainrun.files.hashing import sha256_file
from mainrun.run import batch
from mainrun.run.session import train
from mainrun.store.nodes import Node, Store

# A run has 37 steps. The store keeps nodes after steps 18 and 36 (scores), 27 (start of the decay) and 37.
SMALL: dict[str, Any] = {
    "num_titles": 200,
    "n_layer": 1,
    "optimizer": "adamw",
    "lr": 0.01,
    "dropout": 0.1,
    "schedule": "wsd",
    "decay_frac": 0.3,
}


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a store that contains one run."""
    out = tmp_path_factory.mktemp("made")
    train(config(), out, store=Store(out / "store"))
    return out / "store"


@pytest.fixture
def store(tmp_path: Path, made: Path) -> Store:
    shutil.copytree(made, tmp_path / "store")
    return Store(tmp_path / "store")


def at(store: Store, step: int) -> Node:
    (found,) = [node for node in store.summary()[0] if node.step == step]
    return store.node(found.key)


def rewrite(store: Store, node: Node, **changes: Any) -> Node:
    """Change the content of a node and keep its checksums valid."""
    found = Node(**(vars(node) | changes))
    (Path(str(store)) / "nodes" / found.key).write_bytes(found.dump())
    assert store.verify() == [], "the checksums must be valid"
    return found


def restate(store: Store, node: Node, change: Callable[[dict[str, Any]], object]) -> Node:
    """Change the state of a node and keep its checksums valid."""
    states = Path(str(store)) / "states"
    tensors = load_file(states / f"{node.state}.safetensors")
    change(tensors)
    save_file(tensors, states / "new")
    found = sha256_file(states / "new")
    (states / "new").rename(states / f"{found}.safetensors")
    (states / f"{node.state}.safetensors").unlink()
    return rewrite(store, node, state=found, size=(states / f"{found}.safetensors").stat().st_size)


def findings(store: Store, segments: int = 100) -> dict[int, AuditResult]:
    return {finding.node.step: finding for finding in audit(store, segments, seed=0)}


# -- an intact store

RECIPES: dict[str, dict[str, Any]] = {
    "muon, swa": {"optimizer": "muon", "momentum": 0.9, "swa": 0.5},
    "titles in a new order, dev": {
        "order": "shuffle_titles",
        "epochs": 2,
        "dev_frac": 0.2,
        "eval_per_epoch": 1,
    },
    "two passes, micro-batches, ema": {"rdrop": 0.5, "grad_accum": 2, "ema": 0.9},
    "members": {"members": 2, "rdrop": 0.5, "optimizer": "muon"},
    "growth": {
        "growth": {"ops": [{"name": "set_batch_size", "value": 4, "trigger": {"step": 20}}]},
        "log_every": 7,
    },
}


def test_every_segment_of_an_intact_store_is_the_same(store: Store) -> None:
    before = {path: path.read_bytes() for path in Path(str(store)).rglob("*") if path.is_file()}
    found = findings(store)
    assert {step: finding.status for step, finding in found.items()} == {
        18: "same",
        27: "same",
        36: "same",
        37: "same",
    }, found
    assert {path: path.read_bytes() for path in Path(str(store)).rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_recipe_gives_the_same_segments(tmp_path: Path, recipe: dict[str, Any]) -> None:
    store = Store(tmp_path / "store")
    train(config(**recipe), tmp_path, store=store)
    found = findings(store)
    assert len(found) >= 3 and {finding.status for finding in found.values()} == {"same"}, found


def test_scores_that_another_run_added_are_compared_too(tmp_path: Path, store: Store) -> None:
    store.files.remove(f"nodes/{at(store, 37).key}")
    train(config(official_geometry="2x8"), tmp_path, store=store)
    (end,) = [node for node in map(store.node, store.node_keys()) if node.step == 37]
    assert [row["step"] for row in end.rows if row["event"] == "eval"] == [36, 37] and end.begins == 36
    assert {finding.status for finding in audit(store, 100)} == {"same"}


def test_a_seed_picks_the_same_segments(store: Store) -> None:
    picked = [[finding.node.step for finding in audit(store, 2, seed)] for seed in (1, 1, 2, 3, 4)]
    assert (
        all(len(set(steps)) == 2 for steps in picked)
        and picked[0] == picked[1]
        and len({tuple(steps) for steps in picked}) > 1
    )


@pytest.mark.parametrize("evicted", [[18], [27], [18, 27, 36]])
def test_a_segment_begins_at_the_nearest_state_that_was_not_evicted(store: Store, evicted: list[int]) -> None:
    rewrite(store, at(store, 37), rows=changed(at(store, 37).rows, "step", 37, loss=1.0))
    for step in evicted:
        store.files.remove(f"states/{at(store, step).state}.safetensors")
    found = findings(store)
    assert {step for step, finding in found.items() if finding.status == "same"} == {18, 27, 36} - set(
        evicted
    )
    assert "loss at step 37 is 1.0 in the store" in found[37].why
    for step in evicted:
        assert (found[step].status, found[step].why) == (
            "skipped",
            "its state was evicted, so there is nothing to compare with",
        )


def test_a_segment_that_is_too_long_is_skipped_with_the_reason(store: Store) -> None:
    for step in (18, 27):
        store.files.remove(f"states/{at(store, step).state}.safetensors")
    found = {finding.node.step: finding for finding in audit(store, 100, reach=35)}
    assert (found[36].status, found[37].status) == ("skipped", "same")
    assert found[36].why == "the nearest earlier state is 36 steps before the node; use --reach 36"
    text = ask("audit", "--store", store, "--reach", 35)
    assert text.exit_code == 0 and text.stdout.count("skipped") == 2 and "use --reach 36" in text.stdout
    assert ask("audit", "--store", store, "--reach", 36, "--segments", 2).stdout.count("same ") == 2
    assert [finding.node.step for finding in audit(store, 1, reach=1)] == [37], (
        "segments that can be trained are picked first"
    )


def test_a_wrong_parent_is_detected(store: Store) -> None:
    node = at(store, 36)
    edited = Node(**(vars(node) | {"parent": at(store, 18).key}))
    (Path(str(store)) / "nodes" / node.key).write_bytes(edited.dump())
    assert (
        findings(store)[36].status == "differs"
        and "is not the parent that this node describes" in findings(store)[36].why
    )


# -- changes that no checksum detects


def test_one_changed_bit_of_an_optimizer_state_is_detected(store: Store) -> None:
    def flip(tensors: dict[str, Any]) -> None:
        name = next(
            name for name in sorted(tensors) if name.startswith("optimizer/") and tensors[name].dim() == 2
        )
        tensors[name].numpy().view("uint32")[1, 2] ^= 1
        names.append(name)

    names: list[str] = []
    tensors = len(load_file(Path(str(store)) / "states" / f"{at(store, 27).state}.safetensors"))
    restate(store, at(store, 27), flip)
    found = findings(store)
    assert (found[18].status, found[27].status, found[37].status) == ("same", "differs", "same")
    assert found[27].why == f"1 of {tensors} tensors differ: {names[0]}"


def test_a_state_with_a_missing_tensor_is_detected(store: Store) -> None:
    restate(store, at(store, 37), lambda tensors: tensors.pop("model/embed.weight"))
    why = "the tensor model/embed.weight exists only in the store or only after training again"
    assert findings(store)[37].why == why


def changed(
    rows: tuple[dict[str, Any], ...], event: str, step: int, **changes: Any
) -> tuple[dict[str, Any], ...]:
    assert any(row["event"] == event and row["step"] == step for row in rows)
    return tuple(row | changes if row["event"] == event and row["step"] == step else row for row in rows)


EDITS: dict[str, tuple[int, Callable[[Node], dict[str, Any]], str]] = {
    "a loss": (
        27,
        lambda n: {"rows": changed(n.rows, "step", 20, loss=math.nextafter(n.rows[1]["loss"], 9))},
        "loss at step 20 is ",
    ),
    "a rate": (
        27,
        lambda n: {"rows": changed(n.rows, "step", 20, lr=0.02)},
        "lr at step 20 is 0.02 in the store, but 0.01 after training again",
    ),
    "a score": (
        36,
        lambda n: {"rows": changed(n.rows, "eval", 36, full=1.0)},
        "full at step 36 is 1.0 in the store, but ",
    ),
    "a missing score": (
        36,
        lambda n: {"rows": changed(n.rows, "eval", 36, split="dev")},
        "the store has no eval row of step 36",
    ),
    "a missing row": (27, lambda n: {"rows": n.rows[1:]}, "the store has no step row of step 19"),
    "an extra row": (
        27,
        lambda n: {"rows": (*n.rows, n.rows[0] | {"step": 40})},
        "a row that training again does not produce: step of step 40",
    ),
    "an extra field": (
        27,
        lambda n: {"rows": changed(n.rows, "step", 20, note="?")},
        "note at step 20 is '?' in the store, but None after training again",
    ),
    "the tokens presented": (
        27,
        lambda n: {"tokens_processed": n.tokens_processed + 1},
        "3,457 tokens were processed, but its steps process 3,456 tokens",
    ),
    "its config": (27, lambda n: {"config": n.config | {"lr": 0.02}}, "its key does not match its config"),
}


@pytest.mark.parametrize(("step", "edit", "why"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_with_a_valid_checksum_is_detected(store: Store, step: int, edit: Any, why: str) -> None:
    rewrite(store, at(store, step), **edit(at(store, step)))
    found = findings(store)
    assert found[step].status == "differs" and why in found[step].why, found[step].why
    assert {finding.status for other, finding in found.items() if other != step} == {"same"}


def test_a_node_under_the_key_of_another_config_is_detected(store: Store) -> None:
    """Store a valid node under the key of a config whose learning rate decays at another step."""
    other = batch.share_steps([config(decay_frac=0.5)], None).chains[config(decay_frac=0.5).run_id][37]
    rewrite(store, at(store, 37), key=other)
    assert {finding.why for finding in audit(store, 100) if finding.node.key == other} == {
        "its key does not match its config"
    }


def test_damage_is_reported_and_does_not_crash(store: Store, tmp_path: Path) -> None:
    for step, spoil in (
        (18, lambda path: os.truncate(path, path.stat().st_size - 9)),
        (37, lambda path: path.write_bytes(b"{}")),
    ):
        spoil(tmp_path / "store" / "nodes" / at(store, step).key)
    state = tmp_path / "store" / "states" / f"{at(store, 36).state}.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    found = list(audit(store, 100))
    why = {finding.node.step: finding.why for finding in found}
    assert (
        {finding.status for finding in found if finding.node.step != 27} == {"differs"}
        and "incomplete" in why[0]
        and "state is incomplete" in why[36]
    )
    assert "rows are incomplete" in why[18]


# -- untrainable segments


def test_a_segment_without_its_corpus_is_skipped_with_the_reason(tmp_path: Path) -> None:
    titles, store = tmp_path / "titles.txt", Store(tmp_path / "store")
    cfg = config(corpus=f"file:{titles}")
    titles.write_text("\n".join(load_corpus(config()).train * 2))
    train(cfg, tmp_path, store=store)
    assert {finding.status for finding in audit(store, 1)} == {"same"}
    titles.write_text(titles.read_text().replace("a", "o"))
    assert {finding.status for finding in audit(store, 1)} == {"skipped"} and "data " in next(
        audit(store, 1)
    ).why
    titles.unlink()
    assert {finding.status for finding in audit(store, 1)} == {"skipped"} and "titles.txt" in next(
        audit(store, 1)
    ).why


@pytest.mark.parametrize("what", ["versions torch: ", "machine_class device: "])
def test_a_segment_of_another_version_or_machine_is_skipped_with_the_reason(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    here = machine_class.versions()
    if what.startswith("versions"):
        monkeypatch.setattr(auditor, "versions", lambda: here | {"torch": "9.9"})
    else:
        monkeypatch.setattr(device, "cpu_name", lambda: "Another CPU")
    found = findings(store)
    assert len(found) == 4 and all(
        finding.status == "skipped" and finding.why.startswith(what) for finding in found.values()
    ), found
    result = ask("audit", "--store", store)
    assert result.exit_code == 0 and result.stdout.count("skipped") == 3 and what in result.stdout


def test_a_segment_with_an_unknown_config_field_is_skipped(store: Store) -> None:
    rewrite(store, at(store, 18), config=at(store, 18).config | {"later": 1})
    assert findings(store)[18].status == "skipped" and "unknown field 'later'" in findings(store)[18].why


# -- the commands


def ask(*args: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, args)], catch_exceptions=False)


def say(*args: object) -> Any:
    result = ask(*args, "--json")
    return json.loads(result.stdout)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("error: "), (
        result.output
    )
    assert "Traceback" not in result.stderr and all(word in result.stderr for word in words), result.stderr


def test_ls_and_du_describe_the_store(store: Store) -> None:
    nodes = say("ls", "--store", store)
    assert nodes["damaged"] == [] and [node["step"] for node in nodes["nodes"]] == [18, 27, 36, 37]
    assert all(
        node["state"] and not node["pinned"] and node["size"] > 1000 and node["run"] == config().run_id
        for node in nodes["nodes"]
    )
    store.files.remove(f"states/{at(store, 18).state}.safetensors")
    text = ask("ls", "--store", store)
    assert text.exit_code == 0 and "evicted" in text.stdout and text.stdout.count(config().run_id) == 4
    used = say("du", "--store", store)
    assert (used["nodes"], used["states"], used["roots"], used["steps"], used["damaged"]) == (
        4,
        3,
        1,
        37,
        0,
    ) and used["seconds"] > 0
    assert used["bytes"] == sum(node["size"] for node in nodes["nodes"][1:])
    assert "37 steps that need not be trained again" in ask("du", "--store", store).stdout


def test_a_missing_store_is_reported_and_not_created(tmp_path: Path) -> None:
    for command in (["ls"], ["du"], ["gc"], ["verify"], ["audit"], ["pin", "a"], ["unpin", "a"]):
        refused(ask(*command, "--out", tmp_path / "runs"), "there is no store at", "--store")
        refused(ask(*command, "--store", tmp_path / "none"), "there is no store at", "--out")
    assert list(tmp_path.iterdir()) == []


def test_differences_exit_with_1(store: Store) -> None:
    assert ask("verify", "--store", store).exit_code == 0 and say("verify", "--store", store) == []
    assert "4 nodes; no file is damaged" in ask("verify", "--store", store).stdout
    same = ask("audit", "--store", store, "--segments", 4)
    assert same.exit_code == 0 and same.stdout.count("same ") == 4 and "steps 1 to 18 of" in same.stdout
    rewrite(store, at(store, 27), rows=changed(at(store, 27).rows, "step", 20, loss=1.0))
    result = ask("audit", "--store", store, "--segments", 4, "--json")
    assert result.exit_code == 1 and "that was trained again differs from the store" in result.stderr
    assert {entry["step"]: entry["status"] for entry in json.loads(result.stdout)} == {
        18: "same",
        27: "differs",
        36: "same",
        37: "same",
    }
    path = Path(str(store)) / "states" / f"{at(store, 36).state}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = ask("verify", "--store", store, "--json")
    assert (
        result.exit_code == 1
        and len(json.loads(result.stdout)) == 1
        and "step 36 of" in json.loads(result.stdout)[0]
    )
    assert "found 1 fault;" in result.stderr and "gc" in result.stderr
    assert say("gc", "--store", store)["damaged"] == 1 and ask("verify", "--store", store).exit_code == 0


def test_gc_keeps_pinned_nodes(store: Store) -> None:
    node = at(store, 18)
    for path in (Path(str(store)) / "states").iterdir():
        os.utime(path, (time.time() - 9999, time.time() - 9999))
    assert f"pinned: {node.key[:12]}, step 18 of" in ask("pin", node.key[:10], "--store", store).stdout
    assert [entry["pinned"] for entry in say("ls", "--store", store)["nodes"]] == [True, False, False, False]
    assert say("gc", "--store", store, "--store-size", "10")["evicted"] == 3 and set(store.states()) == {
        node.state
    }
    assert (
        f"not pinned: {node.key[:12]}" in ask("unpin", node.key, "--store", store).stdout
        and store.pinned() == set()
    )
    assert "1 evicted" in ask("gc", "--store", store, "--store-size", "10").stdout and store.states() == {}


def test_bad_arguments_exit_with_2(store: Store, tmp_path: Path) -> None:
    for command in ("pin", "unpin"):
        words = "begins with 'zz'" if command == "pin" else "node 'zz' is not pinned"
        refused(ask(command, "zz", "--store", store), words, "mainrun store ls")
        refused(ask(command, "", "--store", store), "begin with ''" if command == "pin" else "is not pinned")
    for size in ("much", "-1", "10X", ""):
        refused(ask("gc", "--store", store, "--store-size", size), "--store-size", "like 20GB")
    (tmp_path / "file").write_text("?")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("?")
    for command in ("ls", "du", "gc", "verify", "audit"):
        refused(ask(command, "--store", tmp_path / "file"), "is not a folder")
        refused(ask(command, "--store", tmp_path / "folder"), "thesis.txt", "it is not a store")
    result = CliRunner().invoke(
        app, ["train", "--store", str(tmp_path / "file"), "--out", str(tmp_path / "runs")]
    )
    refused(result, "is not a folder")
    result = CliRunner().invoke(app, ["train", "--store-size", "much", "--out", str(tmp_path / "runs")])
    refused(result, "--store-size")
    assert (
        not (tmp_path / "runs").exists() and ask("audit", "--segments", "0", "--store", store).exit_code == 2
    )
    (tmp_path / "store" / "store.json").write_text('{"format": 99}')
    refused(ask("ls", "--store", store), "format 99")
