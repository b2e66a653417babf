"""Tests how a run resumes, how a session ends, and what its summary contains.

All tests share one tiny run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY

from mainrun.config import TrainConfig, from_dict
from mainrun.data import scoring
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.errors import DiskFull, Diverged, Interrupted, RunError
from mainrun.files.hashing import sha256_json
from mainrun.plan.cost import costs
from mainrun.plan.plan import Plan
from mainrun.run import resume, session, summary
from mainrun.run.accounts import Accounts
from mainrun.run.log import RunLog
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.run.sharing import NoSharing
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import build, score, set_up

SMALL: dict[str, Any] = {
    "num_titles": 200,
    "n_layer": 1,
    "optimizer": "adamw",
    "lr": 0.01,
    "checkpoint_every": 10,
    "dev_frac": 0.1,
}


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


class Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": step} | more


# -- trained steps


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        pytest.param([], [], id="none"),
        pytest.param([step_row(1), step_row(2)], [1, 2], id="each"),
        pytest.param([step_row(5)], [1, 2, 3, 4, 5], id="a row also counts the steps before it"),
        pytest.param([step_row(5, reused=True), step_row(7)], [6, 7], id="after steps from the store"),
        pytest.param([step_row(2), step_row(5, reused=True)], [1, 2], id="before steps from the store"),
        pytest.param(
            [step_row(2), {"event": "eval", "step": 4}, step_row(5)],
            [1, 2, 3, 4, 5],
            id="a score is not a step",
        ),
        pytest.param(
            [{"event": "eval", "step": 4, "reused": True}, step_row(6)], [5, 6], id="a score from the store"
        ),
        pytest.param([step_row(9)], [1, 2, 3, 4, 5, 6, 7, 8], id="not beyond the end"),
    ],
)
def test_logged_steps_were_trained_unless_marked_as_reused(
    rows: list[dict[str, Any]], steps: list[int]
) -> None:
    assert sorted(resume.steps_trained(rows, 8)) == steps


# -- before training


def test_the_environment_records_what_the_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume.sys, "argv", ["mainrun", "train"])
    env = resume.environment(SimpleNamespace(machine_class={"cpu": "x"}, allocator="tuned"))
    assert (
        env["machine_class"] == {"cpu": "x"}
        and env["allocator"] == "tuned"
        and env["command"] == ["mainrun", "train"]
    )
    assert env["evaluate_hash"] == scoring.evaluate_source_hash() and "torch" in env["versions"]


# -- costs


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        # The matrices q, k, v and o have 4 * 32 * 32 weights, up and down have 2 * 32 * 128, and the head has
        # 400 * 32. Attention adds 12 * 2 * 16 * 16 FLOPs per token.
        ({}, 6 * (4 * 1024 + 8192 + 12_800) + 12 * 2 * 16 * 16),
        ({"tie_head": False}, 6 * (4 * 1024 + 8192 + 12_800) + 12 * 2 * 16 * 16),
        ({"n_layer": 2}, 6 * (2 * (4 * 1024 + 8192) + 12_800) + 2 * 12 * 2 * 16 * 16),
        ({"experts": 4, "top_k": 1}, 6 * (4 * 1024 + 8192 + 4 * 32 + 12_800) + 12 * 2 * 16 * 16),
        ({"experts": 4, "top_k": 2}, 6 * (4 * 1024 + 2 * 8192 + 4 * 32 + 12_800) + 12 * 2 * 16 * 16),
    ],
    ids=["tied", "untied", "two layers", "one expert of four", "two of four"],
)
def test_flops_per_token_are_six_per_weight_plus_attention(changes: dict[str, Any], flops: int) -> None:
    cfg = config(**{"position": "learned", "tie_head": True, "d_ff": 128} | changes)
    assert costs(cfg, 400)["flops_per_token"] == flops


def test_peak_memory_is_that_of_this_process() -> None:
    assert 50e6 < summary.peak() < 1e12


# -- the end of a session


def closing_counter() -> SimpleNamespace:
    part = SimpleNamespace(closed=0)

    def close() -> None:
        part.closed += 1

    part.close = close
    return part


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (Interrupted("stopped at step 7"), "interrupted", "stopped at step 7"),
        (DiskFull("no space"), "interrupted", "no space"),
        (Diverged("not a number"), "diverged", "not a number"),
        (RuntimeError("odd"), "failed", "odd"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_the_status_records_why_a_session_ended(
    tmp_path: Path, error: BaseException, state: str, why: str
) -> None:
    run, part = RunDir(tmp_path), closing_counter()
    ended = SimpleNamespace(
        state=SimpleNamespace(step=7),
        plan=SimpleNamespace(steps=20),
        device=SimpleNamespace(leads=True),
        close=part.close,
    )
    with pytest.raises(type(error)), session.ending(run, ended):
        raise error
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": state,
        "step": 7,
        "steps": 20,
        "why": why,
    }
    assert part.closed == 1


def test_only_the_leader_writes_a_status_and_only_after_an_error(tmp_path: Path) -> None:
    run, part = RunDir(tmp_path), closing_counter()
    ended = SimpleNamespace(
        state=SimpleNamespace(step=7),
        plan=SimpleNamespace(steps=20),
        device=SimpleNamespace(leads=True),
        close=part.close,
    )
    ended.device.leads = False
    with pytest.raises(Diverged), session.ending(run, ended):
        raise Diverged("x")
    ended.device.leads = True
    with session.ending(run, ended):
        pass
    assert part.closed == 2 and not (tmp_path / "status.json").exists()


def test_a_full_disk_does_not_hide_the_error_that_ended_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)

    def full(name: str, data: Any) -> None:
        raise DiskFull("no space")

    monkeypatch.setattr(run, "write", full)
    ended = SimpleNamespace(
        state=SimpleNamespace(step=7),
        plan=SimpleNamespace(steps=20),
        device=SimpleNamespace(leads=True),
        close=lambda: None,
    )
    with (
        pytest.raises(Diverged, match="not a number"),
        session.ending(run, ended),
    ):
        raise Diverged("not a number")


def test_speed_counts_trained_tokens(tmp_path: Path) -> None:
    cfg = config()
    plan = Plan(cfg, 20 * 128)
    accounts = Accounts()
    accounts.spent |= {"steps": 3.0, "scores": 1.0}
    accounts.ledger["reused_tokens"] = 4 * 128
    written = summary.finish(RunDir(tmp_path), SimpleNamespace(step=20), plan, accounts, {"run": "x"})
    assert written == {"run": "x", "seconds": 4.0, "tokens_per_s": 16 * 128 / 4, "spent": accounts.spent}
    assert json.loads((tmp_path / "summary.json").read_text()) == written
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "done", "step": 20, "steps": 20}


# -- summaries and resumed runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, RunDir, dict[str, Any]]:
    out, cfg = tmp_path_factory.mktemp("trained"), config()
    summary = train(cfg, out)
    return cfg, RunDir(out / cfg.run_id), summary


def test_the_scores_of_the_summary_are_those_of_the_log(
    trained: tuple[TrainConfig, RunDir, dict[str, Any]],
) -> None:
    _, run, summary = trained
    assert run.summary() == summary
    evals = [row for row in run.metrics() if row["event"] == "eval"]
    names = ("step", "split", "official", "full", "loss", "bits_per_byte", "coverage", "tokens")
    for split in ("val", "dev"):
        rows = [{name: row[name] for name in names} for row in evals if row["split"] == split]
        assert len(rows) > 2
        assert summary["scores"][split] == {"last": rows[-1], "best": min(rows, key=lambda row: row["full"])}
    assert (summary["last"], summary["best"]) == (
        summary["scores"]["val"]["last"],
        summary["scores"]["val"]["best"],
    )


def test_the_summary_counts_steps_tokens_and_flops(
    trained: tuple[TrainConfig, RunDir, dict[str, Any]],
) -> None:
    cfg, _, summary = trained
    data = prepare(cfg, load_corpus(cfg))
    plan = Plan(cfg, len(data.splits["train"]))
    model = build(cfg, data.tokenizer.vocab_size)
    assert (summary["run"], summary["preset"], summary["status"], summary["steps"]) == (
        cfg.run_id,
        cfg.preset,
        "done",
        plan.steps,
    )
    assert summary["tokens"] == plan.steps * 128 and summary["resumed"] == 0
    assert summary["ledger"] == {"asked": plan.steps, "trained": plan.steps, "reused": 0, "wasted": 0}
    presentations = plan.steps * 128 / plan.train_tokens
    expected = {
        "train_tokens_per_epoch": plan.train_tokens,
        "presentations_per_token": presentations,
        "forward_passes": 1,
        "ensemble_members": 1,
    }
    assert summary["presentations"] == expected
    assert summary["flops"] == plan.steps * 128 * costs(cfg, data.tokenizer.vocab_size)["flops_per_token"]
    assert summary["params"] == sum(p.numel() for p in model.parameters())
    assert summary["geometry"] == list(cfg.geometry) and summary["tokenizer"] == data.tokenizer.digest
    assert summary["seconds"] == pytest.approx(sum(summary["spent"].values()))
    assert summary["machine_classes"] == [summary["machine_class"]] and summary["all_versions"] == [
        summary["versions"]
    ]
    assert (
        summary["fingerprints"] == load_corpus(cfg).fingerprints
        and summary["origin"] == load_corpus(cfg).origin
    )
    assert (
        summary["peak_memory"] > 50e6
        and len(summary["guards"]) == 14
        and "segments" not in summary
        and "active" not in summary
    )


def test_the_summary_of_a_grown_run_has_its_segments(tmp_path: Path) -> None:
    wider = {"name": "widen_mlp", "value": 160, "trigger": {"step": 2}}
    summary = train(config(growth={"version": 2, "ops": [wider]}), tmp_path)
    first, last = summary["segments"]
    assert first["params"] < last["params"] == summary["params"] and summary["active"] == last["active"]
    assert summary["flops"] == first["flops"] + last["flops"]


def test_the_weights_hash_is_that_of_the_last_checkpoint(
    trained: tuple[TrainConfig, RunDir, dict[str, Any]],
) -> None:
    _, run, summary = trained
    loaded = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert loaded is not None
    weights = {name.removeprefix("model/"): t for name, t in loaded[0].items() if name.startswith("model/")}
    assert summary["weights"] == checkpoint.sha256_tensors(iter(weights.items()))


def test_scores_cover_val_and_dev(
    trained: tuple[TrainConfig, RunDir, dict[str, Any]],
) -> None:
    cfg, _, _ = trained
    setup = set_up(cfg)
    data = setup.data
    model = build(cfg, data.tokenizer.vocab_size)
    applied: list[int] = []

    class Applied:
        def __enter__(self) -> None:
            applied.append(1)

        def __exit__(self, *_: object) -> None:
            applied.append(-1)

    state = SimpleNamespace(cfg=cfg, model=model, step=7, average=SimpleNamespace(applied=Applied))
    rows = list(score(setup, setup.plan, state))
    assert [(row["event"], row["step"], row["split"]) for row in rows] == [
        ("eval", 7, "val"),
        ("eval", 7, "dev"),
    ]
    assert applied == [1, -1, 1, -1] and all(row["seconds"] > 0 for row in rows)
    for row in rows:
        split = row["split"]
        exact = scoring.evaluate(
            model,
            data.splits[split],
            chars=data.chars[split],
            nbytes=data.bytes[split],
            block_size=16,
            geometry=cfg.geometry,
        )
        assert row["full"] == exact.full and row["official"] == exact.official


class ResumableRun:
    """A copy of a finished run directory, which tests can damage and resume."""

    def __init__(self, trained: tuple[TrainConfig, RunDir, dict[str, Any]], place: Path) -> None:
        self.cfg, source, _ = trained
        shutil.copytree(source.path, place / source.path.name)
        self.run = RunDir(place / source.path.name)
        self.notes = Notes()
        self.env = {
            "machine_class": source.env()["machine_class"],
            "versions": source.env()["versions"],
            "evaluate_hash": "now",
        }
        self.loaded: list[tuple[int, int]] = []
        self.accounts = Accounts()
        self.accounts.spent["steps"] = 1.0
        self.state = SimpleNamespace(step=0, tokens=0, load=self.load)
        plan = SimpleNamespace(steps=self.last)
        self.growth = SimpleNamespace(journal=None, plan=plan, restore=lambda: None)

    @property
    def last(self) -> int:
        return max(row["step"] for row in self.run.metrics())

    def load(self, tensors: Any, step: int, tokens: int) -> None:
        self.state.step, self.state.tokens = step, tokens
        self.loaded.append((step, tokens))

    def resume(self, sharing: Any = None) -> None:
        log = RunLog(self.run, self.notes)
        sharing = sharing or NoSharing()
        resume.resume(self.cfg, self.run, self.state, self.accounts, self.env, log, sharing, self.growth)

    def lose(self, count: int) -> None:
        for place in checkpoint.paths(self.run.checkpoints)[:count]:
            shutil.rmtree(place)


@pytest.fixture
def resumed(trained: tuple[TrainConfig, RunDir, dict[str, Any]], tmp_path: Path) -> ResumableRun:
    return ResumableRun(trained, tmp_path)


def test_a_run_resumes_at_its_newest_checkpoint(resumed: ResumableRun) -> None:
    end = resumed.last
    resumed.resume()
    assert (
        resumed.loaded == [(end, end * 128)]
        and resumed.accounts.saved == end
        and resumed.accounts.resumed == 1
    )
    assert (
        resumed.accounts.ledger["wasted"] == 0
        and resumed.accounts.spent["steps"] > 1.0
        and "evaluation" in resumed.accounts.spent
    )
    assert resumed.env["evaluate_hash"] == scoring.evaluate_source_hash(), "the hash is that of this session"
    assert resumed.run.status() == {
        "state": "running",
        "step": end,
        "pid": resumed.run.status()["pid"],
        "resumed": 1,
    }
    assert resumed.notes.texts == [f"{resumed.run.path} resumes after step {end}"]
    assert resumed.run.env()["carried"] == {"checkpoint": end, "wasted": 0, "resumed": 1}


@pytest.mark.parametrize("row", ["[1]", '{"event": "step", "step": "x"}'])
def test_a_damaged_row_with_a_valid_checksum_is_refused(resumed: ResumableRun, row: str) -> None:
    """A log with a valid checksum can still contain invalid rows."""
    log = resumed.run.path / "metrics.jsonl"
    log.write_text(log.read_text() + row + "\n")
    mark = {"bytes": log.stat().st_size, "sha256": hashlib.sha256(log.read_bytes()).hexdigest()}
    place = checkpoint.paths(resumed.run.checkpoints)[0]
    meta = json.loads((place / "meta.json").read_text()) | {"metrics": mark}
    del meta["meta_sha256"]
    checkpoint.write_json(place / "meta.json", meta | {"meta_sha256": sha256_json(meta)})
    with pytest.raises(RunError, match=r"metrics\.jsonl.* line \d+"):
        resumed.resume()
    assert resumed.loaded == []


def test_steps_after_the_checkpoint_are_cut_off_and_wasted(resumed: ResumableRun) -> None:
    end = resumed.last
    resumed.lose(1)
    kept = checkpoint.paths(resumed.run.checkpoints)[0]
    step = json.loads((kept / "meta.json").read_text())["step"]
    resumed.resume()
    assert resumed.state.step == step < end and resumed.accounts.ledger["wasted"] == end - step
    assert resumed.last == step
    assert resumed.run.env()["carried"] == {"checkpoint": step, "wasted": end - step, "resumed": 1}


def test_a_session_without_a_checkpoint_still_counts(resumed: ResumableRun) -> None:
    """Lost steps still count as wasted if the session after the loss saves no checkpoint."""
    resumed.lose(1)
    resumed.resume()
    wasted = resumed.accounts.ledger["wasted"]
    resumed.accounts.ledger["wasted"] = 0
    resumed.resume()
    assert resumed.accounts.ledger["wasted"] == wasted > 0 and resumed.accounts.resumed == 1
    (resumed.run.path / "metrics.jsonl").write_text(
        (resumed.run.path / "metrics.jsonl").read_text()
        + json.dumps(step_row(resumed.last + 1, loss=1.0, tokens=1, lr=1.0, grad_norm=1.0))
        + "\n"
    )
    resumed.growth.plan.steps = resumed.last
    resumed.accounts.ledger["wasted"] = 0
    resumed.resume()
    assert resumed.accounts.ledger["wasted"] == wasted + 1 and resumed.accounts.resumed == 2


def test_without_a_checkpoint_a_run_starts_over(resumed: ResumableRun) -> None:
    end = resumed.last
    resumed.lose(2)
    (resumed.run.checkpoints / "step-00000001").mkdir()
    resumed.resume()
    assert resumed.loaded == [] and resumed.state.step == 0 and resumed.accounts.ledger["wasted"] == end
    assert resumed.run.metrics() == [] and resumed.env["evaluate_hash"] == "now"
    assert (
        resumed.notes.texts[-1]
        == f"{resumed.run.path} has no usable checkpoint, so the run starts over at step 0"
    )


def test_a_checkpoint_of_another_config_is_skipped(resumed: ResumableRun) -> None:
    resumed.cfg = config(lr=0.02)
    resumed.resume()
    assert (
        resumed.state.step == 0
        and sum("it belongs to another config" in text for text in resumed.notes.texts) == 2
    )


def test_a_changed_log_stops_the_run(resumed: ResumableRun) -> None:
    place = resumed.run.path / "metrics.jsonl"
    place.write_text(place.read_text().replace('"step": 1,', '"step": 2,', 1))
    with pytest.raises(RunError, match=r"metrics\.jsonl does not match the checkpoints of the run"):
        resumed.resume()


def test_a_missing_environment_stops_the_run(resumed: ResumableRun) -> None:
    (resumed.run.path / "env.json").write_text("{}")
    with pytest.raises(RunError, match="how the run began"):
        resumed.resume()


@pytest.mark.parametrize(
    ("key", "history", "words"),
    [
        ("machine_class", "machine_classes", "the machine class has changed"),
        ("versions", "all_versions", "the version of mainrun or of a library has changed"),
    ],
)
def test_another_machine_or_version_is_reported_and_recorded(
    resumed: ResumableRun, key: str, history: str, words: str
) -> None:
    before = resumed.env[key]
    resumed.env[key] = {"other": "x"}
    resumed.resume()
    assert (
        sum(
            words in text and "results may differ from an uninterrupted run" in text
            for text in resumed.notes.texts
        )
        == 1
    )
    assert resumed.env[history] == [before, {"other": "x"}] == resumed.run.env()[history]
    resumed.env[key] = before
    resumed.resume()
    assert resumed.env[history] == [{"other": "x"}, before], "the current one comes last"
    resumed.notes.texts.clear()
    resumed.resume()
    assert not any(words in text for text in resumed.notes.texts), "nothing changed since the last session"


class FakeSharing:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.lost_steps: set[int] = set()
        self.recovered: Callable[[], None] = lambda: None

    def begin(self, lost_steps: set[int], recovered: Callable[[], None]) -> None:
        self.lost_steps = lost_steps
        self.recovered = recovered

    def follow(self, plan: Any) -> None:
        self.calls.append("follow")

    def restore(self, meta: Any, step: int) -> None:
        self.calls.append(("restore", step))

    def report_other_versions(self) -> None:
        self.calls.append("report")


def test_sharing_gets_the_checkpoint_and_the_lost_steps(resumed: ResumableRun) -> None:
    end, sharing = resumed.last, FakeSharing()
    resumed.lose(1)
    resumed.resume(sharing)
    assert sharing.calls == ["follow", ("restore", resumed.state.step)]
    assert sharing.lost_steps == set(range(resumed.state.step + 1, end + 1))
    resumed.accounts.ledger["wasted"] = 1
    sharing.recovered()
    assert resumed.run.env()["carried"]["wasted"] == 1
    resumed.lose(2)
    fresh = FakeSharing()
    resumed.resume(fresh)
    assert fresh.calls == ["follow", "report"]


def test_the_growth_journal_is_cut_at_the_checkpoint(resumed: ResumableRun) -> None:
    marks: list[Any] = []

    def rewind(mark: Any) -> bool:
        marks.append(mark)
        return True

    resumed.growth.journal = SimpleNamespace(rewind=rewind, path=Path("growth.jsonl"))
    resumed.resume()
    assert marks == [resume.EMPTY_LOG], "a checkpoint without a mark belongs to an empty journal"
    resumed.lose(2)
    resumed.resume()
    assert marks == [resume.EMPTY_LOG, resume.EMPTY_LOG]


def test_other_processes_load_the_checkpoint_of_the_leader(resumed: ResumableRun) -> None:
    older = checkpoint.paths(resumed.run.checkpoints)[1]
    step = json.loads((older / "meta.json").read_text())["step"]

    def process(leads: bool, chosen: int) -> SimpleNamespace:
        return SimpleNamespace(leads=leads, rank=1, broadcast=lambda _step: (chosen,))

    resume.follow_leader(
        resumed.run, resumed.state, resumed.accounts, process(leads=True, chosen=step), resumed.growth
    )
    resume.follow_leader(
        resumed.run, resumed.state, resumed.accounts, process(leads=False, chosen=0), resumed.growth
    )
    assert resumed.loaded == []
    resume.follow_leader(
        resumed.run, resumed.state, resumed.accounts, process(leads=False, chosen=step), resumed.growth
    )
    assert resumed.loaded == [(step, step * 128)]
    with pytest.raises(
        RunError,
        match=f"process 1 cannot read the checkpoint of step {step + 1} in .*; --out must be a folder",
    ):
        resume.follow_leader(
            resumed.run,
            resumed.state,
            resumed.accounts,
            process(leads=False, chosen=step + 1),
            resumed.growth,
        )


def test_the_costs_of_all_sessions_are_added(resumed: ResumableRun) -> None:
    newest = checkpoint.load_newest(resumed.run.checkpoints, lambda meta: None, lambda text: None)
    assert newest is not None
    tensors, meta = newest
    meta |= {"resumed": 4, "ledger": {"wasted": 6, "reused": 2}, "spent": {"steps": 2.0, "store": 1.0}}
    resumed.accounts.spent = {"steps": 3.0, "data": 0.5}
    resume.load_checkpoint(resumed.run, resumed.state, resumed.accounts, tensors, meta, resumed.growth)
    assert resumed.accounts.resumed == 5 and resumed.accounts.ledger == {
        "wasted": 6,
        "reused": 2,
        "reused_tokens": 0,
    }
    assert resumed.accounts.spent == {"steps": 5.0, "store": 1.0, "data": 0.5}
