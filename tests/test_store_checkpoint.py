"""Tests the files of checkpoints, what saving replaces, and the message for each kind of damage."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mainrun.errors import ConfigError, DiskFull, RunError
from mainrun.files.hashing import sha256_json
from mainrun.store import checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3)}


def save(folder: Path, step: int, **meta: Any) -> Path:
    return checkpoint.save(folder, step, TENSORS, meta)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


# -- saving


def test_a_checkpoint_has_two_files_with_checksums(tmp_path: Path) -> None:
    place = save(tmp_path / "run/checkpoints", 7, digest="d")
    assert place == tmp_path / "run/checkpoints/step-00000007"
    assert names(place.parent) == ["step-00000007"] and names(place) == ["meta.json", "state.safetensors"]
    text = (place / "meta.json").read_text()
    meta = json.loads(text)
    assert list(meta) == ["format", "step", "digest", "state_sha256", "meta_sha256"]
    assert (meta["format"], meta["step"], meta["digest"]) == (1, 7, "d")
    assert meta["state_sha256"] == hashlib.sha256((place / "state.safetensors").read_bytes()).hexdigest()
    claimed = meta.pop("meta_sha256")
    assert claimed == hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def test_the_tensors_the_meta_and_the_folder_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    save(tmp_path, 7)
    assert synced == ["state.safetensors", ".meta.json.tmp", ".tmp-step-00000007", tmp_path.name]


def test_files_of_a_killed_process_are_removed_first(tmp_path: Path) -> None:
    for name in (".tmp-step-00000003", ".tmp-step-00000007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").touch()
    (tmp_path / ".tmp-step-00000008").touch()
    (tmp_path / ".tmp-file").touch()
    (tmp_path / "notes").mkdir()
    save(tmp_path, 7)
    assert names(tmp_path) == [".tmp-file", "notes", "step-00000007"]


def test_a_checkpoint_replaces_those_of_its_step_and_later_ones(tmp_path: Path) -> None:
    for step in (3, 7):
        save(tmp_path, step, note="old")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-00000008").mkdir()
    seen: list[list[str]] = []
    place = checkpoint.save(tmp_path, 7, TENSORS, {"note": "new"}, lambda: seen.append(names(tmp_path)))
    assert seen == [
        [".tmp-step-00000007", "step-00000003", "step-00000007", "step-00000008", "step-00000009"]
    ]
    assert names(tmp_path) == ["step-00000003", "step-00000007"]
    assert json.loads((place / "meta.json").read_text())["note"] == "new"


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (3, 5, 7):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000005", "step-00000007"]


def test_a_failed_check_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 7, note="old")
    (tmp_path / "step-00000009").mkdir()
    with pytest.raises(RunError, match="taken over"):
        checkpoint.save(tmp_path, 7, TENSORS, {"note": "new"}, fail(RunError("taken over")))
    assert names(tmp_path) == ["step-00000007", "step-00000009"]
    assert json.loads((tmp_path / "step-00000007/meta.json").read_text())["note"] == "old"


def test_an_error_while_writing_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_tensors", fail(OSError(28, "No space left on device")))
    with pytest.raises(DiskFull, match=f"{tmp_path}/step-00000007"):
        save(tmp_path, 7)
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/file/step-00000007"):
        save(tmp_path / "file", 7)


def test_a_temporary_folder_that_cannot_be_removed_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_tensors(tensors: Any, path: Path) -> None:
        path.parent.rmdir()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "save_tensors", save_tensors)
    with pytest.raises(RunError, match="Input/output error"):
        save(tmp_path, 7)


# -- tensors


def test_tensors_with_a_gradient_and_views_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    checkpoint.save_tensors({"a": weight, "b": weight.T, "c": torch.arange(9.0)[::3]}, tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert (
        torch.equal(found["a"], weight)
        and torch.equal(found["b"], weight.T)
        and found["c"].tolist() == [0, 3, 6]
    )


def test_the_number_in_the_text_of_safetensors_becomes_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint, "save_file", fail(SafetensorError("I/O error: No space left (os error 28)"))
    )
    with pytest.raises(OSError) as e:
        checkpoint.save_tensors({}, tmp_path / "x")
    assert (e.value.errno, e.value.strerror) == (28, os.strerror(28))
    monkeypatch.setattr(checkpoint, "save_file", fail(SafetensorError("something else")))
    with pytest.raises(SafetensorError, match="something else"):
        checkpoint.save_tensors({}, tmp_path / "x")


def sha256(**named: torch.Tensor) -> str:
    return checkpoint.sha256_tensors(iter(named.items()))


def test_the_hash_of_tensors_covers_names_types_shapes_and_bits() -> None:
    one = torch.tensor([1.0, -0.0])
    expected = hashlib.sha256(b"a:torch.float32:(2,);" + one.numpy().tobytes()).hexdigest()
    assert (
        sha256(a=one)
        == sha256(a=torch.nn.Parameter(one))
        == sha256(a=torch.tensor([1.0, 5.0, -0.0])[::2])
        == expected
    )
    others = [torch.tensor([1.0, 0.0]), one.reshape(1, 2), one.view(torch.int32), one.double()]
    assert len({sha256(a=one), sha256(b=one), *(sha256(a=other) for other in others)}) == 6
    assert sha256(a=one, b=others[0]) == sha256(b=others[0], a=one) != sha256(a=others[0], b=one)


# -- listing


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("step-00000003", "step-00000010", ".tmp-step-00000020", "notes", "old-step-00000030"):
        (tmp_path / name).mkdir()
    assert [place.name for place in checkpoint.paths(tmp_path)] == ["step-00000010", "step-00000003"]
    assert checkpoint.paths(tmp_path / "none") == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"{tmp_path}/file is damaged: it cannot be read .*--fresh"):
        checkpoint.paths(tmp_path / "file")


# -- damage and its messages


def written(place: Path, **changes: Any) -> None:
    """Edit meta.json and correct its checksum. A value of None removes the key."""
    meta = json.loads((place / "meta.json").read_text()) | changes
    meta = {name: value for name, value in meta.items() if value is not None and name != "meta_sha256"}
    checkpoint.write_json(place / "meta.json", meta | {"meta_sha256": sha256_json(meta)})


def text_of(place: Path, text: str | bytes) -> None:
    (place / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def other_bytes(place: Path) -> None:
    path = place / "state.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def not_safetensors(place: Path) -> None:
    (place / "state.safetensors").write_bytes(b"junk")
    written(place, state_sha256=hashlib.sha256(b"junk").hexdigest())


def spaced(place: Path) -> None:
    text_of(place, json.dumps(json.loads((place / "meta.json").read_text())))


TORN = "meta.json is incomplete or was changed after it was written"
CHANGED = "meta.json was changed after it was written"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another format": (
        lambda place: written(place, format=2),
        "meta.json has format 2, but this version reads format 1",
    ),
    "another step": (
        lambda place: text_of(place, (place / "meta.json").read_text().replace('"step": 7', '"step": 8')),
        CHANGED,
    ),
    "other spaces": (spaced, CHANGED),
    "other tensors": (other_bytes, "state.safetensors is incomplete or was changed after it was written"),
    "no tensors": (
        lambda place: (place / "state.safetensors").unlink(),
        "state.safetensors cannot be read (No such file or directory)",
    ),
    "no meta": (
        lambda place: (place / "meta.json").unlink(),
        "meta.json cannot be read (No such file or directory)",
    ),
    "half": (lambda place: text_of(place, '{"format": 1'), TORN),
    "not UTF-8": (lambda place: text_of(place, b"\xff"), TORN),
    "no checksum": (lambda place: text_of(place, '{"format": 1}'), TORN),
    "no format": (lambda place: written(place, format=None), TORN),
    "no checksum of the state": (lambda place: written(place, state_sha256=None), TORN),
    "a list": (lambda place: text_of(place, "[]"), TORN),
    "a word": (lambda place: text_of(place, '"format"'), TORN),
    "deep lists": (lambda place: text_of(place, "[" * 100 * sys.getrecursionlimit()), TORN),
    "junk that its checksum fits": (not_safetensors, "state.safetensors is not a valid safetensors file ("),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_reported(tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    place = save(tmp_path, 7)
    assert checkpoint._load(place, lambda meta: None)[1]["step"] == 7
    damage(place)
    with pytest.raises(ValueError) as e:
        checkpoint._load(place, lambda meta: None)
    assert words in str(e.value) and type(e.value) is ValueError


def test_tensors_that_cannot_be_read_are_damage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path, 7)
    monkeypatch.setattr(checkpoint, "load_file", fail(OSError("gone")))
    with pytest.raises(ValueError, match=r"safetensors file \(gone\)"):
        checkpoint._load(place, lambda meta: None)


def test_the_newest_intact_and_usable_checkpoint_is_loaded(tmp_path: Path) -> None:
    for step in (3, 7):
        save(tmp_path, step)
    notes: list[str] = []
    metas: list[Any] = []

    def usable(meta: dict[str, Any]) -> str | None:
        metas.append(meta)
        return "it is of another run" if meta["step"] == 7 else None

    found = checkpoint.load_newest(tmp_path, usable, notes.append)
    assert found is not None and torch.equal(found[0]["a"], TENSORS["a"]) and found[1] == metas[1]
    assert metas[1].keys() == {"format", "step", "state_sha256"} and metas[1]["step"] == 3
    assert notes == [f"checkpoint {tmp_path}/step-00000007 is skipped: it is of another run"]
    assert checkpoint.load_newest(tmp_path, lambda meta: "no", notes.append) is None and len(notes) == 3


WHOLE = {
    "step": 1,
    "digest": "a",
    "metrics": {"bytes": 1, "sha256": "a"},
    "resumed": 0,
    "presented": 1,
    "spent": {},
}


def test_a_meta_must_have_the_shape_of_a_checkpoint() -> None:
    assert checkpoint.fault(WHOLE) == ""
    assert checkpoint.fault({"step": 1}) == "meta.json lacks 'digest'"


# -- states that do not fit


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("odd"),
        RunError("odd"),
        KeyError("odd"),
        IndexError("odd"),
        TypeError("odd"),
        ValueError("odd"),
        AttributeError("odd"),
        AssertionError("odd"),
        RuntimeError("odd"),
    ],
)
def test_a_state_that_does_not_fit_is_a_run_error(error: Exception) -> None:
    with (
        pytest.raises(
            RunError, match=rf"^FILE does not fit .*\({type(error).__name__}: '?odd'?\); .*--fresh"
        ),
        checkpoint.fit_errors("FILE"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), OSError("gone"), KeyboardInterrupt(), ZeroDivisionError("odd")]
)
def test_other_errors_are_raised_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as e, checkpoint.fit_errors("FILE"):
        raise error
    assert e.value is error


def test_a_long_reason_is_put_on_one_line_and_cut() -> None:
    with pytest.raises(RunError) as e, checkpoint.fit_errors("FILE"):
        raise RuntimeError("a\n  b " + "c" * 400)
    assert "(RuntimeError: a b " + "c" * 296 + ");" in str(e.value)
    with checkpoint.fit_errors("FILE"):
        pass
