"""How a run begins again after a stop and what its summary says, decision by decision; one tiny run is trained for all."""

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
from torch import nn

from mainrun.config import TrainConfig, from_dict
from mainrun.data import scoring
from mainrun.data.sources import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.errors import ConfigError, DiskFull, Diverged, Interrupted, RunError
from mainrun.plan.plan import Plan
from mainrun.run import session as sitting
from mainrun.run.progress import Progress
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import build

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


# -- which steps a run has trained


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        pytest.param([], [], id="none"),
        pytest.param([step_row(1), step_row(2)], [1, 2], id="each"),
        pytest.param([step_row(5)], [1, 2, 3, 4, 5], id="one row stands for those before it"),
        pytest.param([step_row(5, reused=True), step_row(7)], [6, 7], id="after steps from the store"),
        pytest.param([step_row(2), step_row(5, reused=True)], [1, 2], id="before steps from the store"),
        pytest.param(
            [step_row(2), {"event": "eval", "step": 4}, step_row(5)], [1, 2, 3, 4, 5], id="a score is no step"
        ),
        pytest.param(
            [{"event": "eval", "step": 4, "reused": True}, step_row(6)], [5, 6], id="a score from the store"
        ),
        pytest.param([step_row(9)], [1, 2, 3, 4, 5, 6, 7, 8], id="not beyond the end"),
    ],
)
def test_steps_behind_the_rows_were_trained_unless_they_are_marked(
    rows: list[dict[str, Any]], steps: list[int]
) -> None:
    assert sorted(sitting._trained(rows, 8)) == steps


# -- before the first step


@pytest.mark.parametrize(
    ("split", "sizes"), [("val", {"val": 3, "dev": 400}), ("dev", {"val": 400, "dev": 3})]
)
def test_a_split_that_is_too_short_is_named_before_training(split: str, sizes: dict[str, int]) -> None:
    data = SimpleNamespace(splits={name: [0] * size for name, size in sizes.items()})
    with pytest.raises(ConfigError, match=f"the {split} split is too short: "):
        sitting.check_spans(config(), data)
    sitting.check_spans(config(), SimpleNamespace(splits={"val": [0] * 400, "train": [0]}))


def test_the_environment_says_what_the_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitting.sys, "argv", ["mainrun", "train"])
    env = sitting.environment(SimpleNamespace(facts={"cpu": "x"}, allocator="tuned"))
    assert (
        env["machine_class"] == {"cpu": "x"}
        and env["allocator"] == "tuned"
        and env["command"] == ["mainrun", "train"]
    )
    assert env["evaluate_hash"] == scoring.evaluate_source_hash() and "torch" in env["versions"]


# -- what a run costs


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        # weights that multiply: q, k, v, o 4 * 32 * 32; up and down 2 * 32 * 128; the head 400 * 32. Attention: 12 * 2 * 16 * 16
        ({}, 6 * (4 * 1024 + 8192 + 12_800) + 12 * 2 * 16 * 16),
        ({"tie_head": False}, 6 * (4 * 1024 + 8192 + 12_800) + 12 * 2 * 16 * 16),
        ({"n_layer": 2}, 6 * (2 * (4 * 1024 + 8192) + 12_800) + 2 * 12 * 2 * 16 * 16),
        ({"experts": 4, "top_k": 1}, 6 * (4 * 1024 + 8192 + 4 * 32 + 12_800) + 12 * 2 * 16 * 16),
        ({"experts": 4, "top_k": 2}, 6 * (4 * 1024 + 2 * 8192 + 4 * 32 + 12_800) + 12 * 2 * 16 * 16),
    ],
    ids=["tied", "apart", "two layers", "one expert of four", "two of four"],
)
def test_flops_a_token_are_six_a_weight_and_the_products_of_attention(
    changes: dict[str, Any], flops: int
) -> None:
    cfg = config(**{"position": "learned", "tie_head": True, "d_ff": 128} | changes)
    assert sitting.flops_per_token(cfg, build(cfg, 400)) == flops


def test_peak_is_the_memory_of_this_process() -> None:
    assert 50e6 < sitting.peak() < 1e12


# -- the end of a session


def finished_part() -> SimpleNamespace:
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
def test_whatever_ends_a_session_is_in_its_status(
    tmp_path: Path, error: BaseException, state: str, why: str
) -> None:
    run, part = RunDir(tmp_path), finished_part()
    growth = SimpleNamespace(state=SimpleNamespace(step=7), plan=SimpleNamespace(steps=20))
    with pytest.raises(type(error)), sitting.ending(SimpleNamespace(leads=True), run, growth, [part, None]):
        raise error
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": state,
        "step": 7,
        "steps": 20,
        "why": why,
    }
    assert part.closed == 1


def test_only_the_leader_writes_the_status_and_a_good_end_writes_none(tmp_path: Path) -> None:
    run, part = RunDir(tmp_path), finished_part()
    growth = SimpleNamespace(state=SimpleNamespace(step=7), plan=SimpleNamespace(steps=20))
    with pytest.raises(Diverged), sitting.ending(SimpleNamespace(leads=False), run, growth, [part]):
        raise Diverged("x")
    with sitting.ending(SimpleNamespace(leads=True), run, growth, [part]):
        pass
    assert part.closed == 2 and not (tmp_path / "status.json").exists()


def test_a_full_disk_does_not_hide_what_ended_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)

    def full(name: str, data: Any) -> None:
        raise DiskFull("no space")

    monkeypatch.setattr(run, "write", full)
    growth = SimpleNamespace(state=SimpleNamespace(step=7), plan=SimpleNamespace(steps=20))
    with (
        pytest.raises(Diverged, match="not a number"),
        sitting.ending(SimpleNamespace(leads=True), run, growth, []),
    ):
        raise Diverged("not a number")


def test_the_speed_counts_the_tokens_that_were_trained(tmp_path: Path) -> None:
    cfg = config()
    plan = Plan(cfg, 20 * 128)
    state = SimpleNamespace(step=20, spent={"steps": 3.0, "scores": 1.0}, ledger={"reused_tokens": 4 * 128})
    summary = sitting.finish(RunDir(tmp_path), state, plan, {"run": "x"})
    assert summary == {"run": "x", "seconds": 4.0, "tokens_per_s": 16 * 128 / 4, "spent": state.spent}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "done", "step": 20, "steps": 20}


# -- one run, its summary, and what comes back of it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, RunDir, dict[str, Any]]:
    out, cfg = tmp_path_factory.mktemp("trained"), config()
    summary = train(cfg, out)
    return cfg, RunDir(out / cfg.run_id), summary


def test_the_summary_says_what_the_rows_say(trained: tuple[TrainConfig, RunDir, dict[str, Any]]) -> None:
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
    assert summary["flops"] == plan.steps * 128 * sitting.flops_per_token(cfg, model)
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


def test_scores_cover_val_and_dev_and_name_their_step(
    trained: tuple[TrainConfig, RunDir, dict[str, Any]],
) -> None:
    cfg, _, _ = trained
    data = prepare(cfg, load_corpus(cfg))
    model = build(cfg, data.tokenizer.vocab_size)
    applied: list[int] = []

    class Applied:
        def __enter__(self) -> None:
            applied.append(1)

        def __exit__(self, *_: object) -> None:
            applied.append(-1)

    state = SimpleNamespace(model=model, step=7, average=SimpleNamespace(applied=Applied))
    rows = list(sitting.score(cfg, data, state))
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


class Session:
    """A run directory that is resumed by hand."""

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
        ledger = {"reused": 0, "reused_tokens": 0, "wasted": 0}
        self.state = SimpleNamespace(
            step=0, saved=0, presented=0, resumed=0, ledger=ledger, spent={"steps": 1.0}, load=self.load
        )
        self.growth = SimpleNamespace(
            journal=None, plan=SimpleNamespace(steps=self.last), restored=lambda: None
        )

    @property
    def last(self) -> int:
        return max(row["step"] for row in self.run.metrics())

    def load(self, tensors: Any, step: int, presented: int, grown: Any = None) -> None:
        self.state.step, self.state.presented = step, presented
        self.loaded.append((step, presented))

    def resume(self, reuse: Any = None) -> Any:
        return sitting.resume(self.cfg, self.run, self.state, self.env, self.notes, reuse, self.growth)

    def lose(self, count: int) -> None:
        for place in checkpoint.steps(self.run.checkpoints)[:count]:
            shutil.rmtree(place)


@pytest.fixture
def session(trained: tuple[TrainConfig, RunDir, dict[str, Any]], tmp_path: Path) -> Session:
    return Session(trained, tmp_path)


def test_a_run_resumes_at_its_newest_checkpoint(session: Session) -> None:
    end = session.last
    session.resume()
    assert session.loaded == [(end, end * 128)] and session.state.saved == end and session.state.resumed == 1
    assert (
        session.state.ledger["wasted"] == 0
        and session.state.spent["steps"] > 1.0
        and "evaluation" in session.state.spent
    )
    assert session.env["evaluate_hash"] == scoring.evaluate_source_hash(), (
        "an edit between two sessions must show"
    )
    assert session.run.status() == {
        "state": "running",
        "step": end,
        "pid": session.run.status()["pid"],
        "resumed": 1,
    }
    assert session.notes.texts == [f"{session.run.path} goes on after step {end}"]
    assert session.run.env()["carried"] == {"checkpoint": end, "wasted": 0, "resumed": 1}


@pytest.mark.parametrize("row", ["[1]", '{"event": "step", "step": "x"}'])
def test_a_damaged_row_that_its_checkpoint_vouches_for_is_refused(session: Session, row: str) -> None:
    """The checksum only says that the log is the one that was saved."""
    log = session.run.path / "metrics.jsonl"
    log.write_text(log.read_text() + row + "\n")
    mark = {"bytes": log.stat().st_size, "sha256": hashlib.sha256(log.read_bytes()).hexdigest()}
    place = checkpoint.steps(session.run.checkpoints)[0]
    meta = json.loads((place / "meta.json").read_text()) | {"metrics": mark}
    del meta["meta_sha256"]
    checkpoint.write_json(place / "meta.json", meta | {"meta_sha256": checkpoint._meta_sha256(meta)})
    with pytest.raises(RunError, match=r"metrics\.jsonl.* line \d+"):
        session.resume()
    assert session.loaded == []


def test_steps_behind_the_checkpoint_are_cut_off_and_wasted(session: Session) -> None:
    end = session.last
    session.lose(1)
    kept = checkpoint.steps(session.run.checkpoints)[0]
    step = json.loads((kept / "meta.json").read_text())["step"]
    session.resume()
    assert session.state.step == step < end and session.state.ledger["wasted"] == end - step
    assert session.last == step
    assert session.run.env()["carried"] == {"checkpoint": step, "wasted": end - step, "resumed": 1}


def test_a_session_that_saved_nothing_is_not_forgotten(session: Session) -> None:
    """The next one starts at the same checkpoint: what the first had lost still counts."""
    session.lose(1)
    session.resume()
    wasted = session.state.ledger["wasted"]
    session.state.ledger["wasted"] = 0
    session.resume()
    assert session.state.ledger["wasted"] == wasted > 0 and session.state.resumed == 1
    (session.run.path / "metrics.jsonl").write_text(
        (session.run.path / "metrics.jsonl").read_text()
        + json.dumps(step_row(session.last + 1, loss=1.0, tokens=1, lr=1.0, grad_norm=1.0))
        + "\n"
    )
    session.growth.plan.steps = session.last
    session.state.ledger["wasted"] = 0
    session.resume()
    assert session.state.ledger["wasted"] == wasted + 1 and session.state.resumed == 2


def test_without_a_checkpoint_a_run_starts_over(session: Session) -> None:
    end = session.last
    session.lose(2)
    (session.run.checkpoints / "step-00000001").mkdir()
    session.resume()
    assert session.loaded == [] and session.state.step == 0 and session.state.ledger["wasted"] == end
    assert session.run.metrics() == [] and session.env["evaluate_hash"] == "now"
    assert session.notes.texts[-1] == f"{session.run.path} has no usable checkpoint: it starts over at step 0"


def test_a_checkpoint_of_another_config_is_passed_over(session: Session) -> None:
    session.cfg = config(lr=0.02)
    session.resume()
    assert (
        session.state.step == 0
        and sum("it belongs to another config" in text for text in session.notes.texts) == 2
    )


def test_a_log_that_was_changed_stops_the_run(session: Session) -> None:
    place = session.run.path / "metrics.jsonl"
    place.write_text(place.read_text().replace('"step": 1,', '"step": 2,', 1))
    with pytest.raises(RunError, match=r"metrics\.jsonl is not the one its checkpoints were saved with"):
        session.resume()


def test_a_lost_environment_stops_the_run(session: Session) -> None:
    (session.run.path / "env.json").write_text("{}")
    with pytest.raises(RunError, match="how the run began"):
        session.resume()


@pytest.mark.parametrize(
    ("key", "history", "words"),
    [
        ("machine_class", "machine_classes", "another machine class"),
        ("versions", "all_versions", "another mainrun or of a library"),
    ],
)
def test_another_machine_or_version_is_said_and_remembered(
    session: Session, key: str, history: str, words: str
) -> None:
    before = session.env[key]
    session.env[key] = {"other": "x"}
    session.resume()
    assert (
        sum(words in text and "not those of an undisturbed run" in text for text in session.notes.texts) == 1
    )
    assert session.env[history] == [before, {"other": "x"}] == session.run.env()[history]
    session.env[key] = before
    session.resume()
    assert session.env[history] == [{"other": "x"}, before], "the present one is the last"
    session.notes.texts.clear()
    session.resume()
    assert not any(words in text for text in session.notes.texts), "it is the one of the session before"


class FakeReuse:
    own: set[int] = set()  # noqa: RUF012
    found_again: Callable[[], None]

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def follow(self, plan: Any) -> None:
        self.calls.append("follow")

    def restore(self, meta: Any, step: int) -> None:
        self.calls.append(("restore", step))

    def strangers(self) -> None:
        self.calls.append("strangers")


def test_the_store_hears_where_a_run_resumes_and_what_it_lost(session: Session) -> None:
    end, reuse = session.last, FakeReuse()
    session.lose(1)
    session.resume(reuse)
    assert reuse.calls == ["follow", ("restore", session.state.step)]
    assert reuse.own == set(range(session.state.step + 1, end + 1))
    session.state.ledger["wasted"] = 1
    reuse.found_again()
    assert session.run.env()["carried"]["wasted"] == 1
    session.lose(2)
    fresh = FakeReuse()
    session.resume(fresh)
    assert fresh.calls == ["follow", "strangers"]


def test_the_journal_of_growth_is_cut_at_the_checkpoint_too(session: Session) -> None:
    marks: list[Any] = []

    def rewind(mark: Any) -> bool:
        marks.append(mark)
        return True

    session.growth.journal = SimpleNamespace(rewind=rewind, path=Path("growth.jsonl"))
    session.resume()
    assert marks == [sitting.NOTHING], "a checkpoint without a mark stands at an empty journal"
    session.lose(2)
    session.resume()
    assert marks == [sitting.NOTHING, sitting.NOTHING]


def test_other_processes_read_the_checkpoint_that_the_leader_chose(session: Session) -> None:
    older = checkpoint.steps(session.run.checkpoints)[1]
    step = json.loads((older / "meta.json").read_text())["step"]

    def machine(leads: bool, chosen: int) -> SimpleNamespace:
        return SimpleNamespace(leads=leads, rank=1, share=lambda _step, _: (chosen, 0))

    sitting.follow(session.cfg, session.run, session.state, machine(leads=True, chosen=step), session.growth)
    sitting.follow(session.cfg, session.run, session.state, machine(leads=False, chosen=0), session.growth)
    assert session.loaded == []
    sitting.follow(session.cfg, session.run, session.state, machine(leads=False, chosen=step), session.growth)
    assert session.loaded == [(step, step * 128)]
    with pytest.raises(
        RunError,
        match=f"process 1 cannot read the checkpoint of step {step + 1} in .*; --out must be a folder",
    ):
        sitting.follow(
            session.cfg, session.run, session.state, machine(leads=False, chosen=step + 1), session.growth
        )


def test_what_earlier_sessions_cost_is_added_up(session: Session) -> None:
    newest = checkpoint.load_newest(session.run.checkpoints, lambda meta: None, lambda text: None)
    assert newest is not None
    tensors, meta = newest
    meta |= {"resumed": 4, "ledger": {"wasted": 6, "reused": 2}, "spent": {"steps": 2.0, "store": 1.0}}
    session.state.spent = {"steps": 3.0, "data": 0.5}
    sitting._load(session.run, session.state, tensors, meta, session.growth)
    assert session.state.resumed == 5 and session.state.ledger == {
        "wasted": 6,
        "reused": 2,
        "reused_tokens": 0,
    }
    assert session.state.spent == {"steps": 5.0, "store": 1.0, "data": 0.5}


def test_a_module_s_flops_ignore_what_is_looked_up() -> None:
    """Positions are never multiplied; an untied embedding neither."""
    model = nn.Module()
    model.positions, model.embed, model.head = (
        nn.Embedding(4, 8),
        nn.Embedding(5, 8),
        nn.Linear(8, 5, bias=False),
    )
    apart, tied = config(tie_head=False), config(tie_head=True)
    attention = 12 * 1 * 2 * 16 * 16
    assert sitting.flops_per_token(apart, model) == 6 * 40 + attention
    assert sitting.flops_per_token(tied, model) == 6 * 80 + attention
