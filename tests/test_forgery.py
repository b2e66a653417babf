"""Edit the files of a real run between two sessions. Every edit that improves a figure must be detected."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mainrun.config import TrainConfig
from mainrun.data import token_cache
from mainrun.data.corpus import load_corpus
from mainrun.errors import Interrupted, RunError
from mainrun.files.hashing import sha256_json
from mainrun.run import resume
from mainrun.run.progress import Progress
from mainrun.run.session import train as train_run
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir, to_json, write_json
from mainrun.ui import compare


class StopAt(Progress):
    def __init__(self, step: int) -> None:
        self.stop_step = step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.stop_step:
            os.kill(os.getpid(), signal.SIGTERM)


def failed(summary: dict[str, Any]) -> set[str]:
    return {g["name"] for g in summary["guards"] if g["status"] == "fail"}


def interrupted(cfg: TrainConfig, out: Path, step: int = 12) -> RunDir:
    with pytest.raises(Interrupted):
        train_run(cfg, out, progress=StopAt(step))
    return RunDir(out / cfg.run_id)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAINRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_a_cache_that_trains_on_val(
    tiny: Callable[..., TrainConfig], tmp_path: Path, own_cache: Path
) -> None:
    """A forger replaces the cached train tokens with the val tokens and updates the checksum."""
    cfg = tiny()
    data = token_cache.prepare(cfg, load_corpus(cfg))
    [entry] = own_cache.iterdir()
    train_stream = np.resize(data.splits["val"], len(data.splits["train"]))
    np.save(entry / "train.npy", train_stream)
    meta = json.loads((entry / "meta.json").read_text())
    meta["digest"] = token_cache._digest(
        data.tokenizer, {**data.splits, "train": train_stream}, meta["chars"], meta["bytes"]
    )
    (entry / "meta.json").write_text(json.dumps(meta))
    assert "lossless_tokens" in failed(train_run(cfg, tmp_path / "runs"))


def test_scores_that_the_weights_contradict(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A forger halves the scores in metrics.jsonl, updates its checksum and deletes the summary."""
    cfg = tiny()
    train_run(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    rows = run.metrics()
    for row in rows:
        if row["event"] == "eval":
            for key in ("loss", "full", "official", "bits_per_byte"):
                row[key] /= 2
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (run.path / "metrics.jsonl").write_bytes(text)
    newest = checkpoint.paths(run.checkpoints)[0]
    meta = json.loads((newest / "meta.json").read_text())
    del meta["meta_sha256"]
    meta["metrics"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (newest / "meta.json").write_text(to_json(meta | {"meta_sha256": sha256_json(meta)}))
    (run.path / "summary.json").unlink()
    assert {"same_evaluate", "random_start"} & failed(train_run(cfg, tmp_path))


@pytest.mark.parametrize("name", ["last", "best"])
def test_an_edited_summary_is_not_compared(
    tiny: Callable[..., TrainConfig], tmp_path: Path, name: str
) -> None:
    cfg = tiny()
    summary = train_run(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    assert compare.load_summary(run) == summary
    write_json(run.path / "summary.json", summary | {name: summary[name] | {"full": 0.5}})
    with pytest.raises(RunError, match=rf"says 0.5 for full of the {name} score, but metrics.jsonl says"):
        compare.load_summary(run)


@pytest.mark.parametrize("damage", [{"last": {}}, {"best": {"full": 1.0}}, {"fingerprints": None}])
def test_an_incomplete_summary_is_damaged(
    tiny: Callable[..., TrainConfig], tmp_path: Path, damage: dict[str, Any]
) -> None:
    cfg = tiny()
    summary = train_run(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    write_json(run.path / "summary.json", {k: v for k, v in (summary | damage).items() if v is not None})
    with pytest.raises(RunError, match="is damaged"):
        compare.load_summary(run)


def test_an_edited_config_is_not_compared(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    cfg = tiny()
    train_run(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    record = json.loads((run.path / "config.json").read_text())
    record["config"]["lr"] = 0.5
    write_json(run.path / "config.json", record)
    with pytest.raises(RunError, match=r"config.json was changed.*--fresh"):
        compare.load_summary(run)


def test_removed_fingerprints(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Without fingerprints, nothing proves which titles the run was started with."""
    titles = tmp_path / "titles.txt"
    titles.write_text("\n".join(f"title number {i} of the {i * 7 % 50} kind" for i in range(300)))
    cfg = tiny(corpus=f"file:{titles}", num_titles=300, vocab_size=320)
    run = interrupted(cfg, tmp_path / "runs", step=5)
    begun = json.loads((run.path / "config.json").read_text())
    del begun["fingerprints"]
    write_json(run.path / "config.json", begun)
    with pytest.raises(RunError, match=r"its fingerprints differ from config\.json"):
        train_run(cfg, tmp_path / "runs")


def test_the_versions_of_every_session_are_kept(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary shows that the first session used edited code and another machine."""
    cfg = tiny()
    versions = resume.versions()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "versions", lambda: versions | {"mainrun": "edited"})
        patch.setattr(resume.scoring, "evaluate_source_hash", lambda: "another")
        patch.setattr("mainrun.core.device.cpu_name", lambda: "another processor")
        interrupted(cfg, tmp_path)
    notes: list[str] = []

    class Notes(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    summary = train_run(cfg, tmp_path, progress=Notes())
    assert summary["all_versions"] == [versions | {"mainrun": "edited"}, versions]
    assert [c["device"] for c in summary["machine_classes"]] == [
        "another processor",
        summary["machine_class"]["device"],
    ]
    assert "same_evaluate" in failed(summary)
    assert any("the machine class has changed" in text for text in notes)
    assert any("the version of mainrun or of a library has changed" in text for text in notes)


def test_a_finished_run_is_valid_only_for_its_titles(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("\n".join(f"title number {i} of the {i * 7 % 50} kind" for i in range(300)))
    cfg = tiny(corpus=f"file:{titles}", num_titles=300, vocab_size=320)
    first = train_run(cfg, tmp_path / "runs")
    assert train_run(cfg, tmp_path / "runs") == first
    titles.write_text(titles.read_text().replace("number 7 ", "numero 7 "))
    with pytest.raises(RunError, match=r"its fingerprints differ from config\.json"):
        train_run(cfg, tmp_path / "runs")


def test_a_name_cannot_lead_out_of_the_folder_of_runs(tmp_path: Path) -> None:
    from mainrun.errors import ConfigError
    from mainrun.plan.recipes import load

    for name in ("a/../../../escaped", "..", ".hidden", "a\\b", "", "a\nb", "-rf", "x" * 200):
        (tmp_path / "p.toml").write_text(f"[[steps]]\nname = {json.dumps(name)}\nbase = 'demo:baseline'\n")
        with pytest.raises(ConfigError, match="has the invalid name"):
            load(str(tmp_path / "p.toml"))
    shutil.copy(tmp_path / "p.toml", tmp_path / ".toml")
    with pytest.raises(ConfigError, match="has the invalid name"):
        load(str(tmp_path / ".toml"))
