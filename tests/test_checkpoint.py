"""Checkpoints are written atomically, verified when they are loaded, and used to resume runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.errors import RunError
from mainrun.files.hashing import sha256_json
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model/a": torch.randn(5, 3, generator=generator), "optimizer/a/step": torch.tensor(float(seed))}


def saved(folder: Path, step: int, **meta: Any) -> Path:
    return checkpoint.save(folder, step, tensors(step), {"digest": "d", "seconds": 1.5, **meta})


def newest(
    folder: Path, usable: Callable[[dict[str, Any]], str | None] = lambda meta: None
) -> tuple[int | None, list[str]]:
    """Load the newest checkpoint and check its tensors. Return its step and the notes of the loader."""
    notes: list[str] = []
    found = checkpoint.load_newest(folder, usable, notes.append)
    if found is None:
        return None, notes
    state, meta = found
    expected = tensors(meta["step"])
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    return meta["step"], notes


def edit_meta(place: Path, change: Callable[[dict[str, Any]], Any], **dump: Any) -> None:
    meta = json.loads((place / "meta.json").read_text())
    change(meta)
    (place / "meta.json").write_text(json.dumps(meta, **dump))


# -- saving and loading


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    raw=st.binary(min_size=8 * 64, max_size=8 * 64),
    transposed=st.booleans(),
)
@settings(max_examples=examples(40))
def test_every_bit_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    raw: bytes,
    transposed: bool,
) -> None:
    """A checkpoint keeps every bit, even of NaN payloads, negative zeros, subnormals and views."""
    n = torch.Size(shape).numel()
    bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    value = (bits[:n] > 127) if dtype == torch.bool else bits[: n * dtype.itemsize].view(dtype)
    value = value.reshape(shape)
    if transposed and len(shape) > 1:
        value = value.transpose(0, 1)
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(folder, 1, {"t": value}, {})
    found = checkpoint.load_newest(folder, lambda meta: None, lambda text: None)
    assert found is not None
    back = found[0]["t"]
    assert back.dtype == value.dtype and back.shape == value.shape
    assert (
        back.reshape(-1).view(torch.uint8).tolist()
        == value.contiguous().reshape(-1).view(torch.uint8).tolist()
    )
    assert checkpoint.sha256_tensors(iter({"t": back}.items())) == checkpoint.sha256_tensors(
        iter({"t": value}.items())
    )
    shutil.rmtree(folder)


def test_the_meta_comes_back_with_format_and_step(tmp_path: Path) -> None:
    saved(tmp_path, 7, note="Grüße", nested={"b": [1, 2.5, None]})
    found = checkpoint.load_newest(tmp_path, lambda meta: None, lambda text: None)
    assert found is not None
    meta = found[1]
    assert (
        meta["step"] == 7
        and meta["format"] == checkpoint.FORMAT
        and meta["note"] == "Grüße"
        and meta["nested"] == {"b": [1, 2.5, None]}
    )


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 200_000_000):
        saved(tmp_path, step)
        assert newest(tmp_path) == (step, [])
    assert checkpoint.KEEP == 2
    assert [p.name for p in checkpoint.paths(tmp_path)] == ["step-200000000", "step-100000000"]


def test_a_damaged_newer_checkpoint_does_not_displace_a_good_one(tmp_path: Path) -> None:
    """If a resumed run saves a checkpoint of step 12, it must replace the damaged later checkpoints."""
    for step in (10, 37):
        saved(tmp_path, step)
    shutil.copytree(tmp_path / "step-00000037", tmp_path / "step-00000038")
    for step in (37, 38):
        (tmp_path / f"step-{step:08}" / "state.safetensors").write_bytes(b"torn")
    assert newest(tmp_path)[0] == 10
    saved(tmp_path, 12)
    assert newest(tmp_path) == (12, [])
    assert [p.name for p in checkpoint.paths(tmp_path)] == ["step-00000012", "step-00000010"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    place = saved(tmp_path, 2)
    (place / "state.safetensors").write_bytes(b"")
    assert newest(tmp_path)[0] == 1
    saved(tmp_path, 2)
    assert newest(tmp_path) == (2, [])


def test_an_empty_or_absent_folder_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == newest(tmp_path / "nowhere") == (None, [])


# -- damage


def cut(name: str, at: float) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: int(at) if at >= 1 else int(at * len(data))])

    return damage


def flip(name: str, at: float) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        data = bytearray((place / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        (place / name).write_bytes(data)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


def another_step(meta: dict[str, Any]) -> None:
    meta["step"] += 1


def forged_pickle(place: Path) -> None:
    """Replace the tensors with a pickle and update every checksum, as a forger would."""
    (place / "state.safetensors").write_bytes(pickle.dumps(Trap()))
    meta = json.loads((place / "meta.json").read_text())
    del meta["meta_sha256"]
    meta["state_sha256"] = hashlib.sha256((place / "state.safetensors").read_bytes()).hexdigest()
    checkpoint.write_json(place / "meta.json", meta | {"meta_sha256": sha256_json(meta)})


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{f"state cut at {at}": cut("state.safetensors", at) for at in (0.0, 4, 9, 0.3, 0.5, 0.9, 0.999)},
    **{f"meta cut at {at}": cut("meta.json", at) for at in (0.0, 1, 0.3, 0.6, 0.95)},
    **{
        f"{name} flipped at {at}": flip(name, at)
        for name in ("state.safetensors", "meta.json")
        for at in (0.0, 0.2, 0.7, 1.0)
    },
    "step edited": lambda place: edit_meta(place, another_step, indent=1, ensure_ascii=False),
    "step edited, other format": lambda place: edit_meta(place, another_step, sort_keys=True),
    "seconds edited": lambda place: edit_meta(place, lambda meta: meta.update(seconds=0.5), indent=1),
    "field added": lambda place: edit_meta(place, lambda meta: meta.update(more=1)),
    "checksum removed": lambda place: edit_meta(place, lambda meta: meta.pop("meta_sha256")),
    "checksum is a number": lambda place: edit_meta(place, lambda meta: meta.update(meta_sha256=1)),
    "meta is a list": lambda place: (place / "meta.json").write_text("[]"),
    "meta is a word": lambda place: (place / "meta.json").write_text('"step"'),
    "meta is not text": lambda place: (place / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "another format": lambda place: edit_meta(place, lambda meta: meta.update(format=99)),
    "no state": remove("state.safetensors"),
    "no meta": remove("meta.json"),
    "an empty folder": lambda place: [f.unlink() for f in place.iterdir()],
    "a file, not a folder": lambda place: (shutil.rmtree(place), place.write_text("")),
    "a folder for the state": lambda place: (
        (place / "state.safetensors").unlink(),
        (place / "state.safetensors").mkdir(),
    ),
    "the older one's tensors": lambda place: shutil.copy(
        place.parent / "step-00000001" / "state.safetensors", place
    ),
    "the older one's meta": lambda place: shutil.copy(place.parent / "step-00000001" / "meta.json", place),
    "a pickle": forged_pickle,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_reported_and_the_checkpoint_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    saved(tmp_path, 1)
    place = saved(tmp_path, 2)
    damage(place)
    step, notes = newest(tmp_path)
    assert step == 1
    assert (
        len(notes) == 1 and notes[0].startswith(f"checkpoint {place} is skipped: ") and "\n" not in notes[0]
    )
    saved(tmp_path, 3)  # a run can save a new checkpoint in spite of the damage
    assert newest(tmp_path) == (3, [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    folder = tmp_path_factory.mktemp("checkpoints")
    place = saved(folder, 3, note="ü", machine_class={"device": "x", "threads": 1})
    return {p: p.read_bytes() for p in sorted(place.iterdir())}


@given(st.data())
@settings(max_examples=examples(300))
def test_any_changed_byte_is_detected(whole: dict[Path, bytes], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(whole)))
    at = data.draw(st.integers(0, len(whole[path]) - 1))
    changed = bytearray(whole[path])
    changed[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        step, notes = newest(path.parents[1])
        assert step is None and len(notes) == 1 and str(path.parent) in notes[0]
    finally:
        path.write_bytes(whole[path])
    assert newest(path.parents[1]) == (3, [])


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_each_changed_byte_is_detected(whole: dict[Path, bytes], name: str) -> None:
    """Change each space, newline and zero byte of a file, and truncate the file at every seventh byte."""
    path = next(p for p in whole if p.name == name)
    for at, byte in enumerate(whole[path]):
        if byte in b" \n\x00":
            path.write_bytes(whole[path][:at] + b"\t" + whole[path][at + 1 :])
            assert newest(path.parents[1])[0] is None, f"byte {at}"
    for size in range(0, len(whole[path]), 7):
        path.write_bytes(whole[path][:size])
        assert newest(path.parents[1])[0] is None, f"{size} bytes"
    path.write_bytes(whole[path])
    assert newest(path.parents[1]) == (3, [])


def test_a_foreign_checkpoint_is_reported_with_the_reason(tmp_path: Path) -> None:
    saved(tmp_path, 1, digest="ours")
    saved(tmp_path, 2, digest="theirs")
    step, notes = newest(
        tmp_path, lambda meta: None if meta["digest"] == "ours" else "it belongs to another config"
    )
    assert step == 1 and notes == [
        f"checkpoint {tmp_path}/step-00000002 is skipped: it belongs to another config"
    ]


# -- writing is atomic


def test_a_temporary_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    """A process that is killed before the rename leaves a .tmp folder, which may even be complete."""
    saved(tmp_path, 1)
    left = shutil.copytree(saved(tmp_path, 2), tmp_path / ".tmp-step-00000003")
    torn = tmp_path / ".tmp-step-00000002"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == (2, [])
    saved(tmp_path, 4)
    assert newest(tmp_path) == (4, []) and not left.exists() and not torn.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("function", ["write_json", "sha256_file", "save_file", "rename"])
def test_an_error_while_writing_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    place = saved(tmp_path, 1)
    before = {p: p.read_bytes() for p in place.iterdir()}
    monkeypatch.setattr(Path if function == "rename" else checkpoint, function, killed)
    with pytest.raises(Killed):
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and {
        p: p.read_bytes() for p in place.iterdir()
    } == before
    assert newest(tmp_path) == (1, [])


def test_an_unwritable_place_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot write .*step-00000001.*--out"):
        saved(tmp_path / "checkpoints", 1)


# -- runs that resume


class Notes(Progress):
    def __init__(self) -> None:
        self.all: list[str] = []
        self.first_step = 0

    def note(self, text: str) -> None:
        self.all.append(text)

    def step(self, row: dict[str, Any]) -> None:
        self.first_step = self.first_step or row["step"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, RunDir]:
    from conftest import TINY

    from mainrun.config import from_dict

    cfg = from_dict(
        TINY | {"num_titles": 200, "dropout": 0.1, "checkpoint_every": 8, "optimizer": "adamw", "lr": 1e-3}
    )
    out = tmp_path_factory.mktemp("runs")
    train(cfg, out)
    return cfg, RunDir(out / cfg.run_id)


def again(cfg: TrainConfig, run: RunDir, out: Path, damage: Callable[[list[Path]], None]) -> Notes:
    """Copy a run without its summary, damage its checkpoints and resume it.

    The resumed run must end with the same bits as the original run. `damage` receives the paths of the
    checkpoints, newest first.
    """
    notes = Notes()
    copy = RunDir(shutil.copytree(run.path, out / cfg.run_id))
    (copy.path / "summary.json").unlink()
    damage(checkpoint.paths(copy.checkpoints))
    summary = train(cfg, out, progress=notes)
    expected = run.summary()
    assert expected is not None and summary["weights"] == expected["weights"]
    clean = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.metrics()] for r in (run, copy)]
    assert clean[0] == clean[1]
    return notes


def test_a_run_resumes_from_its_newest_checkpoint(
    finished: tuple[TrainConfig, RunDir], tmp_path: Path
) -> None:
    notes = again(*finished, tmp_path, lambda places: None)
    assert notes.first_step == 0 and not any("is skipped" in n for n in notes.all)


def test_a_run_falls_back_to_the_checkpoint_before(
    finished: tuple[TrainConfig, RunDir], tmp_path: Path
) -> None:
    notes = again(*finished, tmp_path, lambda places: flip("state.safetensors", 0.6)(places[0]))
    steps = [int(p.name.split("-")[1]) for p in checkpoint.paths(finished[1].checkpoints)]
    assert notes.first_step == steps[1] + 1
    assert any(f"step-{steps[0]:08}" in n and "incomplete or was changed" in n for n in notes.all)


def test_a_run_without_a_usable_checkpoint_starts_over(
    finished: tuple[TrainConfig, RunDir], tmp_path: Path
) -> None:
    def damage(places: list[Path]) -> None:
        edit_meta(places[0], another_step, indent=1)
        remove("state.safetensors")(places[1])

    notes = again(*finished, tmp_path, damage)
    assert notes.first_step == 1
    assert sum("is skipped" in n for n in notes.all) == 2 and "starts over at step 0" in notes.all[-1]


def test_a_run_does_not_use_a_checkpoint_of_another_config(
    finished: tuple[TrainConfig, RunDir], tmp_path: Path
) -> None:
    cfg = TrainConfig(**finished[0].model_dump() | {"seed": 2})
    (tmp_path / cfg.run_id / "checkpoints").mkdir(parents=True)
    own = tmp_path / "own"
    train(cfg, own)
    target = RunDir(tmp_path / cfg.run_id)
    for place in checkpoint.paths(finished[1].checkpoints):
        shutil.copytree(place, target.checkpoints / place.name)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy((own / cfg.run_id if name == "config.json" else finished[1].path) / name, target.path)
    notes = Notes()
    summary = train(cfg, tmp_path, progress=notes)
    assert sum("it belongs to another config" in n for n in notes.all) == 2 and notes.first_step == 1
    undisturbed = RunDir(own / cfg.run_id).summary()
    assert undisturbed is not None and summary["weights"] == undisturbed["weights"]


def test_a_run_whose_log_was_changed_is_refused(finished: tuple[TrainConfig, RunDir], tmp_path: Path) -> None:
    """A run cannot be resumed if its metrics.jsonl was edited."""

    def damage(places: list[Path]) -> None:
        path = places[0].parents[1] / "metrics.jsonl"
        path.write_text(
            path.read_text().replace('"loss": 5.', '"loss": 4.', 1).replace('"loss": 6.', '"loss": 5.', 1)
        )

    with pytest.raises(RunError, match=r"metrics.jsonl does not match.*--fresh"):
        again(*finished, tmp_path, damage)
    assert len(checkpoint.paths(tmp_path / finished[0].run_id / "checkpoints")) == 2, (
        "the weights are still there"
    )


def test_a_run_without_env_json_is_refused(finished: tuple[TrainConfig, RunDir], tmp_path: Path) -> None:
    """Without env.json, nothing proves that the first session used the same evaluation code."""
    with pytest.raises(RunError, match=r"env.json.*is missing.*--fresh"):
        again(*finished, tmp_path, lambda places: (places[0].parents[1] / "env.json").unlink())
