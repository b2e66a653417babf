"""Tests that a run always gives the same bits, and that a failed run clearly says why it failed."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from conftest import TINY, slow_unless, tiny_sets

from mainrun import train as trainer
from mainrun.config import TrainConfig, from_dict
from mainrun.core.optimizers import Optimizers
from mainrun.errors import ConfigError, DiskFull, Diverged, Interrupted, RunError
from mainrun.plan.cost import costs, forward_flops
from mainrun.plan.plan import Plan
from mainrun.run import session
from mainrun.run.progress import LineProgress, Progress
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.ui.estimate import estimate
from mainrun.ui.sample import load_model, sample
from mainrun.ui.train_cli import _estimate_rows

SMALL = {"num_titles": 200, "dropout": 0.1, "lr": 0.3}  # a run has about 30 steps and takes a second


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


class Watch(Progress):
    """A progress display that records steps and notes, and calls functions after given steps."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.at = dict(at or {})
        self.steps: list[int] = []
        self.notes: list[str] = []

    def step(self, row: dict[str, Any]) -> None:
        self.steps.append(row["step"])
        self.at.pop(row["step"], lambda: None)()

    def note(self, text: str) -> None:
        self.notes.append(text)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def rows(run: Path, event: str = "") -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without their times."""
    return [
        {k: v for k, v in r.items() if k != "seconds"}
        for r in RunDir(run).metrics()
        if not event or r["event"] == event
    ]


def end(run: Path) -> tuple[list[dict[str, Any]], str, str, dict[str, Any]]:
    """Return the parts of a run that equal runs share: rows, scored weights, last checkpoint and ledger."""
    summary = RunDir(run).summary()
    assert summary is not None and summary["status"] == "done"
    meta = json.loads((checkpoint.paths(run / "checkpoints")[0] / "meta.json").read_text())
    assert meta["step"] == summary["steps"]
    return rows(run), summary["weights"], meta["state_sha256"], summary["presentations"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], Path]:
    """Return a function that trains a config without interruption, once for all tests in this file."""
    out = tmp_path_factory.mktemp("undisturbed")

    def run(cfg: TrainConfig) -> Path:
        if not (out / cfg.run_id / "summary.json").exists():
            train(cfg, out)
        return out / cfg.run_id

    return run


# -- bits


def in_a_fresh_process(out: Path, hash_seed: int, **changes: Any) -> Path:
    """Train from the command line with the given hash seed and an empty cache of compiled code."""
    env = os.environ | {"PYTHONHASHSEED": str(hash_seed), "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}
    command = [
        sys.executable,
        "-m",
        "mainrun",
        "train",
        "--preset",
        "baseline",
        *tiny_sets(**SMALL | changes),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return next(p.parent for p in out.glob("*/summary.json"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_config_gives_the_same_bits(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path], dtype: str
) -> None:
    cfg = config(dtype=dtype)
    one = undisturbed(cfg)
    torch.manual_seed(12345)  # earlier use of the random generator must not affect the result
    torch.randn(1000)
    train(cfg, tmp_path)
    assert end(tmp_path / cfg.run_id) == end(one)
    losses = [r["loss"] for r in rows(one, "step")]
    assert losses[0] - losses[-1] > 0.1, "it learns, else equal bits mean little"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "compiled"), [("float32", "off"), ("bfloat16", "off"), ("float32", "on"), ("bfloat16", "on")]
)
def test_the_same_config_gives_the_same_bits_in_two_processes(
    tmp_path: Path, dtype: str, compiled: str
) -> None:
    """The recipe has R-Drop, attention gates, a title mask and dropout, so it draws many random numbers."""
    if compiled == "on" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    recipe = {
        "rdrop": 0.5,
        "title_mask": True,
        "attn_gate": True,
        "position": "rope",
        "optimizer": "muon",
        "momentum": 0.9,
        "lr": 0.01,
    }
    ends = [
        end(in_a_fresh_process(tmp_path / name, i, dtype=dtype, compile=compiled, n_layer=1, **recipe))
        for i, name in enumerate("ab")
    ]
    assert ends[0] == ends[1]


def test_the_cadence_of_evaluations_rows_and_checkpoints_does_not_touch_the_bits(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path]
) -> None:
    one = undisturbed(config(ema=0.9))
    losses = {r["step"]: r["loss"] for r in rows(one, "step")}
    scores = {r["step"]: r["full"] for r in rows(one, "eval")}
    for changes in (
        {"eval_per_epoch": 0, "log_every": 7, "checkpoint_every": 3},
        {"eval_per_epoch": 1000, "checkpoint_every": 1000},
        {"official_geometry": "2x8", "dev_frac": 0.0, "preset": "other"},
    ):
        cfg = config(ema=0.9, **changes)
        train(cfg, tmp_path)
        other = tmp_path / cfg.run_id
        assert end(other)[1:] == end(one)[1:], changes
        assert all(losses[r["step"]] == r["loss"] for r in rows(other, "step"))
        common = [r for r in rows(other, "eval") if r["step"] in scores]
        assert common and all(scores[r["step"]] == r["full"] for r in common)
    assert len(rows(other, "step")) == len(losses)


def test_rows_are_written_as_often_as_asked(tmp_path: Path) -> None:
    cfg = config(log_every=7, eval_per_epoch=2)
    summary = train(cfg, tmp_path)
    run = tmp_path / cfg.run_id
    plan = Plan(cfg, RunDir(run).plan()["train_tokens"])
    assert summary["steps"] == plan.steps > 21
    assert [r["step"] for r in rows(run, "step")] == sorted({*range(7, plan.steps + 1, 7), plan.steps})
    assert [r["step"] for r in rows(run, "eval")] == sorted(plan.eval_steps)
    assert set(rows(run, "step")[0]) == {"event", "step", "tokens", "loss", "lr", "grad_norm"}
    scores = {"official", "full", "loss", "bits_per_byte", "coverage", "tokens"}
    assert set(rows(run, "eval")[0]) == {"event", "step", "split"} | scores
    for row in rows(run, "step"):
        assert row["tokens"] == row["step"] * cfg.batch_size * cfg.block_size
        assert row["lr"] == plan.at(row["step"] - 1).lr
    for row in RunDir(run).metrics():
        assert list(row)[-1] == "seconds" and row["seconds"] > 0


def test_weights_dropout_and_order_come_from_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test isolates the effect of the seed on the weights, on dropout and on the order of titles."""

    def first_losses(**changes: Any) -> list[float]:
        cfg = config(eval_per_epoch=0, **changes)
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with pytest.raises(Interrupted):
            train(cfg, out, progress=Watch({3: terminate}))
        return [r["loss"] for r in rows(out / cfg.run_id)]

    assert first_losses(seed=1, dropout=0.0) != first_losses(seed=2, dropout=0.0)
    build = trainer.build
    monkeypatch.setattr(
        trainer, "build", lambda cfg, vocab_size: build(from_dict(cfg.model_dump() | {"seed": 1}), vocab_size)
    )
    assert first_losses(seed=1, dropout=0.0) == first_losses(seed=2, dropout=0.0)
    assert first_losses(seed=1) != first_losses(seed=2)
    shuffled = {"dropout": 0.0, "order": "shuffle_titles"}
    assert first_losses(seed=1, **shuffled) != first_losses(seed=2, **shuffled)


def test_dropout_masks_differ_from_step_to_step_and_piece_to_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    original = trainer.compute_loss

    def spy(model: Any, x: Any, y: Any, inputs: Any, pool: Any, *rest: Any) -> Any:
        drawn.append(pool.numpy().tobytes())
        return original(model, x, y, inputs, pool, *rest)

    monkeypatch.setattr(trainer, "compute_loss", spy)
    train(config(grad_accum=2), tmp_path)
    assert len(drawn) == len(set(drawn)) > 40


# -- one step, computed independently


def test_the_first_step_is_the_hand_written_one(tmp_path: Path) -> None:
    """The first step of train() has the loss, clipping, learning rate and update of a plain computation."""
    cfg = config(dropout=0.0, lr=0.3, lr_aux=0.1, warmup_frac=0.2, clip=0.5, checkpoint_every=1)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, progress=Watch({1: terminate}))
    run = RunDir(tmp_path / cfg.run_id)
    found = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert found is not None and found[1]["step"] == 1
    data = trainer.prepare(cfg, trainer.load_corpus(cfg))
    stream = torch.tensor(data.splits["train"][: 8 * 16 + 1].astype("int64"))
    model = trainer.build(cfg, data.tokenizer.vocab_size)
    logits = model(stream[:-1].view(8, 16))
    loss = -logits.log_softmax(-1).gather(-1, stream[1:].view(8, 16, 1)).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    (row,) = rows(run.path, "step")
    warmup = RunDir(run.path).plan()["warmup_steps"]
    assert warmup > 3
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) and row["grad_norm"] == pytest.approx(
        norm, rel=1e-5
    )
    assert row["lr"] == pytest.approx(0.3 / warmup)
    for name, p in model.named_parameters():
        rate = (0.3 if name.startswith("blocks.") and p.ndim == 2 else 0.1) / warmup
        assert p.grad is not None
        expected = p.detach() - rate * p.grad * min(1.0, 0.5 / (norm + 1e-6))
        assert torch.allclose(found[0][f"model/{name}"], expected, atol=1e-7), name


# -- interrupted and resumed


RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd with momentum": {"momentum": 0.9, "lr": 0.01},
    "adamw, ema": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "ema": 0.9,
        "weight_decay": 0.1,
        "wd_schedule": "cosine",
    },
    "muon, swa": {
        "optimizer": "muon",
        "momentum": 0.9,
        "lr": 0.01,
        "lr_aux": 1e-3,
        "swa": 0.7,
        "schedule": "wsd",
        "order": "shuffle_titles",
        "epochs": 2,
        "dev_frac": 0.2,
    },
    "r-drop": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "rdrop": 0.5,
        "label_smoothing": 0.1,
        "grad_accum": 2,
        "warmup_frac": 0.3,
    },
    "members": {"members": 2, "optimizer": "muon", "momentum": 0.9, "lr": 0.01, "rdrop": 0.5, "ema": 0.9},
    "every option": {
        "norm": "rmsnorm",
        "position": "rope",
        "mlp": "swiglu",
        "bias": False,
        "qk_norm": True,
        "attn_gate": True,
        "layer_scale": 0.3,
        "value_residual": True,
        "value_shortcut": True,
        "x0_shortcut": True,
        "unet": True,
        "rope_share": 0.5,
        "key_shift": True,
        "title_mask": True,
        "tie_head": False,
        "softcap": 15.0,
        "n_kv_head": 1,
        "init": "kaiming",
        "dtype": "bfloat16",
        "optimizer": "muon",
        "momentum": 0.9,
        "lr": 0.01,
        "lr_aux": 1e-3,
        "weight_decay": 0.1,
        "weight_decay_aux": 0.2,
        "cautious_decay": True,
        "stochastic_depth": 0.3,
    },
}


@pytest.mark.parametrize("name", slow_unless(["adamw, ema", "members", "every option"], RECIPES))
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path], name: str
) -> None:
    cfg = config(checkpoint_every=10, **RECIPES[name])
    whole = undisturbed(cfg)
    run = RunDir(tmp_path / cfg.run_id)
    # The run is stopped between two checkpoints, at a checkpoint, and long after a checkpoint.
    for start, stop in ((1, 7), (8, 10), (11, 24)):
        watch = Watch({stop: terminate})
        with pytest.raises(Interrupted, match=rf"SIGTERM at step {stop} of \d+.*same command") as e:
            train(cfg, tmp_path, progress=watch)
        assert e.value.exit_code == 75
        assert watch.steps[0] == start and watch.steps[-1] == stop, "nothing is trained twice"
        assert (
            run.status()["state"] == "interrupted" and run.status()["step"] == stop and run.summary() is None
        )
        assert [r["step"] for r in rows(run.path, "step")] == list(range(1, stop + 1))
    assert train(cfg, tmp_path)["resumed"] == 3
    assert end(run.path) == end(whole)
    assert not list(run.path.rglob("*tmp*"))


def test_a_crash_goes_back_to_the_last_checkpoint_and_drops_the_rows_after_it(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path]
) -> None:
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    cfg = config(checkpoint_every=10)
    for stop in (3, 17, 29):
        with pytest.raises(Crash):
            train(cfg, tmp_path, progress=Watch({stop: crash}))
        with (tmp_path / cfg.run_id / "metrics.jsonl").open("a") as f:
            f.write('{"event": "step", "st')  # the crash leaves a partial row
    watch = Watch()
    train(cfg, tmp_path, progress=watch)
    assert watch.steps[0] == 21 and any("resumes after step 20" in n for n in watch.notes)
    assert end(tmp_path / cfg.run_id) == end(undisturbed(cfg))


def test_a_run_stopped_before_its_summary_only_writes_that(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path]
) -> None:
    cfg = config()
    whole = undisturbed(cfg)
    shutil.copytree(whole, tmp_path / cfg.run_id)
    (tmp_path / cfg.run_id / "summary.json").unlink()
    watch = Watch()
    train(cfg, tmp_path, progress=watch)
    assert watch.steps == [] and end(tmp_path / cfg.run_id) == end(whole)


@pytest.mark.parametrize(
    "left", [".lock", "config.json", "config.json tokenizer.json", "config.json metrics.jsonl"]
)
def test_a_run_killed_while_it_opened_starts_over(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path], left: str
) -> None:
    cfg = config()
    whole = undisturbed(cfg)
    (tmp_path / cfg.run_id).mkdir()
    for name in left.split():
        shutil.copy(whole / name, tmp_path / cfg.run_id)
    train(cfg, tmp_path)
    assert end(tmp_path / cfg.run_id) == end(whole)


def test_a_kill_between_any_two_files_of_the_start_leaves_a_run_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a run is killed before any of its first files is written, the next run still accepts the folder."""

    class Killed(BaseException):
        pass

    cfg = config()
    for dies_at in range(1, 5):
        left = dies_at
        replace = Path.replace

        def dying(self: Path, target: Path, replace: Any = replace) -> Path:
            nonlocal left
            if str(tmp_path) in str(target):
                left -= 1
                if not left:
                    raise Killed
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(Killed):
                train(cfg, tmp_path)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, progress=Watch({2: terminate}))


def test_a_signal_while_the_data_is_prepared_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = trainer.prepare

    def slow(*args: Any) -> Any:
        terminate()
        return prepare(*args)

    cfg, watch = config(), Watch()
    monkeypatch.setattr(trainer, "prepare", slow)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM at step 0"):
        train(cfg, tmp_path, progress=watch)
    assert watch.steps == [] and signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert train(cfg, tmp_path)["resumed"] == 0


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    cfg = config()
    watch = Watch({5: twice})
    with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path, progress=watch)
    assert watch.steps[-1] == 5
    with pytest.raises(Interrupted, match="SIGINT at step 2"):
        train(cfg, tmp_path, progress=Watch({2: lambda: os.kill(os.getpid(), signal.SIGINT)}))


# -- scores use the averaged weights


def test_ema_is_scored_and_sampled_but_not_trained_on(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path]
) -> None:
    plain, averaged = undisturbed(config(dropout=0.0)), undisturbed(config(dropout=0.0, swa=0.5))
    assert [r["loss"] for r in rows(plain, "step")] == [r["loss"] for r in rows(averaged, "step")]
    a, b = rows(plain, "eval"), rows(averaged, "eval")
    assert a[0] == b[0], "before the average begins the weights themselves are scored"
    assert a[-1]["full"] != b[-1]["full"]
    model, _ = load_model(RunDir(averaged))
    summary = RunDir(averaged).summary()
    assert summary is not None
    assert checkpoint.sha256_tensors(iter(model.named_parameters())) == summary["weights"]


# -- losses and scores that are not finite


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[TrainConfig], Path]
) -> None:
    cfg = config(checkpoint_every=10)
    run = RunDir(tmp_path / cfg.run_id)
    original = trainer.compute_loss
    calls = 0

    def planted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = original(*args)
        if calls != 15:
            return loss
        return loss._replace(minimized=loss.minimized * math.inf, plain=loss.plain * math.inf)

    monkeypatch.setattr(trainer, "compute_loss", planted)
    with pytest.raises(Diverged) as e:
        train(cfg, tmp_path)
    assert e.value.exit_code == 3
    text = str(e.value)
    lr = rows(undisturbed(cfg), "step")[14]["lr"]
    assert (
        "loss inf" in text
        and "step 15 of" in text
        and f"lr {lr:g}" in text
        and "gradient norm nan" in text
        and "lower lr" in text
    )
    assert run.status()["state"] == "diverged" and run.status()["step"] == 14 and run.status()["why"] == text
    assert run.summary() is None and [r["step"] for r in rows(run.path, "step")] == list(range(1, 15))
    found = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert found is not None and found[1]["step"] == 14
    assert all(t.isfinite().all() for t in found[0].values())
    model, _ = load_model(run)
    assert all(p.isfinite().all() for p in model.parameters())
    monkeypatch.undo()  # remove the planted value, so that the run can continue
    watch = Watch()
    train(cfg, tmp_path, progress=watch)
    assert watch.steps[0] == 15 and end(run.path) == end(undisturbed(cfg))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_only_one_of_loss_and_gradient_need_be_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = trainer.compute_loss

    def planted(*args: Any) -> Any:
        loss = original(*args)
        if where == "loss":
            return loss._replace(plain=loss.plain + math.nan)
        return loss._replace(minimized=loss.minimized * math.nan)

    monkeypatch.setattr(trainer, "compute_loss", planted)
    with pytest.raises(Diverged, match="at step 1 of"):
        train(config(), tmp_path)


def test_a_rate_that_is_far_too_high_diverges_by_itself(tmp_path: Path) -> None:
    cfg = config(optimizer="adamw", lr=1000.0, weight_decay=100.0, schedule="constant")
    run = RunDir(tmp_path / cfg.run_id)
    messages = set()
    for _ in range(2):  # the second attempt fails with the same message
        with pytest.raises(Diverged, match=r"lr 1000") as e:
            train(cfg, tmp_path)
        messages.add(str(e.value))
    assert len(messages) == 1 and run.summary() is None
    assert all(math.isfinite(v) for r in rows(run.path) for v in r.values() if isinstance(v, float)), (
        "no row holds what is not a number"
    )


def test_a_last_update_that_breaks_the_weights_diverges_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss follows the last update, but the last score shows that the weights are broken."""
    cfg = config(checkpoint_every=10)
    original = Optimizers.apply
    done = 0

    def broken(self: Any) -> None:
        nonlocal done
        original(self)
        done += 1
        if done == last:
            with torch.no_grad():
                next(iter(self.names)).fill_(math.nan)

    last = estimate(cfg)["plan"]["steps"]
    monkeypatch.setattr(Optimizers, "apply", broken)
    with pytest.raises(Diverged, match=f"the score at step {last} of {last} is not finite"):
        train(cfg, tmp_path)
    run = RunDir(tmp_path / cfg.run_id)
    assert run.summary() is None and run.status()["state"] == "diverged"
    assert all(math.isfinite(v) for r in rows(run.path) for v in r.values() if isinstance(v, float))
    found = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert (
        found is not None and found[1]["step"] < last and all(t.isfinite().all() for t in found[0].values())
    )


def test_a_crash_is_not_left_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError):
        train(config(), tmp_path)
    assert RunDir(tmp_path / config().run_id).status() == {
        "state": "failed",
        "step": 0,
        "steps": ANY,
        "why": "a bug of ours",
    }


def test_a_ladder_goes_on_behind_a_step_that_diverges(tmp_path: Path) -> None:
    (tmp_path / "ladder.toml").write_text(
        "[[steps]]\nname = 'high'\nlr = 1000.0\nweight_decay = 100.0\n"
        "[[steps]]\nname = 'fine'\nlr = 0.001\nweight_decay = 0.0\n"
    )
    sets = tiny_sets(optimizer="adamw", schedule="constant")
    command = [sys.executable, "-m", "mainrun", "train", "--preset", "ladder.toml", "--out", "runs", *sets]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3 and "diverged: ladder-high-" in done.stderr
    assert "ladder-fine-" in done.stdout and "ladder-high-" not in done.stdout


def test_what_is_said_to_be_on_disk_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's tensors, metadata and log rows are synced before the checkpoint gets its final name."""
    synced: list[str] = []
    renamed: list[tuple[str, set[str]]] = []
    fsync, rename = os.fsync, Path.rename

    def seen(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def moved(self: Path, target: Path) -> Path:
        renamed.append((Path(target).name, set(synced)))
        synced.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "rename", moved)
    train(config(), tmp_path)
    places = [before for name, before in renamed if name.startswith("step-")]
    assert places and all(
        {"state.safetensors", ".meta.json.tmp", "metrics.jsonl"} <= before for before in places
    )


def test_the_operations_that_torch_cannot_repeat_are_refused(tmp_path: Path) -> None:
    train(config(), tmp_path)
    assert torch.are_deterministic_algorithms_enabled()


def test_flops_are_counted_as_the_formula_says() -> None:
    """A matrix weight costs 6 FLOPs per token, and attention has two products over the whole block.

    The backward pass costs twice as much as the forward pass.
    """
    cfg = config(n_layer=2, d_model=32, block_size=16)
    products = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 400 * 32
    attention = 2 * (2 * 16 * 32) * 2 * 3
    assert costs(cfg, 400)["flops_per_token"] == 6 * products + attention


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs; the limits on file size below stand in")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int) -> None:
    disk = os.statvfs(place)
    (place / "ballast").write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - leave))


def no_half_files(run: Path) -> None:
    names = [str(p.relative_to(run)) for p in run.rglob("*")]
    assert not [n for n in names if "tmp" in n], names
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    RunDir(run).metrics()
    notes: list[str] = []
    checkpoint.load_newest(run / "checkpoints", lambda meta: None, notes.append)
    assert notes == []


@pytest.mark.parametrize(
    ("step", "leave", "checkpoint_every", "full"),
    [
        (0, 0, 10, ""),
        pytest.param(0, 8192, 10, "", marks=pytest.mark.slow),
        pytest.param(0, 24_000, 10, "", marks=pytest.mark.slow),
        (0, 60_000, 10, ""),
        (3, 0, 1000, "metrics.jsonl"),
        (9, 100_000, 10, "step-00000010"),
        (19, 100_000, 10, "step-00000020"),
    ],
    ids=[
        "nothing at the start",
        "two blocks at the start",
        "six blocks",
        "a few files fit",
        "metrics",
        "checkpoint",
        "second checkpoint",
    ],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    small_disk: Path,
    undisturbed: Callable[[TrainConfig], Path],
    step: int,
    leave: int,
    checkpoint_every: int,
    full: str,
) -> None:
    cfg = config(checkpoint_every=checkpoint_every, batch_size=4)
    whole, run = undisturbed(cfg), small_disk / cfg.run_id
    if step == 0:
        fill(small_disk, leave)
    with pytest.raises(
        DiskFull, match=r"no space left to write .*free some space and run the same command again"
    ) as e:
        train(cfg, small_disk, progress=Watch({step: lambda: fill(small_disk, leave)}))
    assert e.value.exit_code == 75 and full in str(e.value)
    no_half_files(run)
    (small_disk / "ballast").unlink()
    watch = Watch()
    train(cfg, small_disk, progress=watch)
    assert watch.steps[0] == (11 if step == 19 else 1)
    assert end(run) == end(whole)


@pytest.mark.parametrize(
    ("limit", "checkpoint_every", "full"), [(100_000, 10, "step-00000010"), (2_000, 1000, "metrics.jsonl")]
)
def test_a_limit_on_file_size_is_a_full_disk(
    tmp_path: Path, undisturbed: Callable[[TrainConfig], Path], limit: int, checkpoint_every: int, full: str
) -> None:
    cfg = config(checkpoint_every=checkpoint_every)
    whole = undisturbed(cfg)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(DiskFull, match=full):
            train(
                cfg,
                tmp_path,
                progress=Watch({1: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))}),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    no_half_files(tmp_path / cfg.run_id)
    assert RunDir(tmp_path / cfg.run_id).status()["state"] == "interrupted"
    train(cfg, tmp_path)
    assert end(tmp_path / cfg.run_id) == end(whole)


def test_a_disk_that_is_full_at_the_summary_costs_no_step(
    small_disk: Path, undisturbed: Callable[[TrainConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    whole = undisturbed(cfg)
    summarize = session.summarize

    def then_full(*args: Any) -> Any:
        found = summarize(*args)
        fill(small_disk, 0)
        return found

    monkeypatch.setattr(session, "summarize", then_full)
    with pytest.raises(DiskFull, match=r"status\.json"):
        train(cfg, small_disk)
    monkeypatch.undo()
    no_half_files(small_disk / cfg.run_id)
    (small_disk / "ballast").unlink()
    watch = Watch()
    train(cfg, small_disk, progress=watch)
    assert watch.steps == [] and end(small_disk / cfg.run_id) == end(whole)


# -- around the loop


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "loop", lambda *args: pytest.fail("it trained"))


def test_a_finished_run_gives_its_summary_without_training(
    undisturbed: Callable[[TrainConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    run = undisturbed(cfg)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    forbid_training(monkeypatch)
    assert train(cfg, run.parent) == RunDir(run).summary()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_fresh_trains_again(tmp_path: Path, undisturbed: Callable[[TrainConfig], Path]) -> None:
    cfg = config()
    shutil.copytree(undisturbed(cfg), tmp_path / cfg.run_id)
    watch = Watch()
    train(cfg, tmp_path, fresh=True, progress=watch)
    assert watch.steps[0] == 1 and end(tmp_path / cfg.run_id) == end(undisturbed(cfg))


def test_a_dry_run_trains_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forbid_training(monkeypatch)
    cfg = config(rdrop=0.5)
    found = estimate(cfg)
    assert list(tmp_path.iterdir()) == []
    assert found["run"] == cfg.run_id and found["plan"]["steps"] > 10 and found["plan"]["warmup_steps"] == 0
    model = trainer.build(cfg, 400)
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["memory"] > found["params"] * 8 and 0 < found["eta_seconds"] < 600
    json.dumps(found)
    half = estimate(config())
    assert found["flops"] == 2 * half["flops"] > 0, "R-Drop's second pass is counted"


def test_a_dry_run_shows_the_layers_and_the_forward_flops_of_routed_blocks() -> None:
    cfg = config(block_pattern="DT", capacity=0.25)
    cost = estimate(cfg)["routing"]
    shares = [0.25] * len(cfg.routed_layers)
    assert cost["letters"] == cfg.letters
    exact = cfg.model_copy(update={"vocab_size": 400})
    assert cost["forward_flops"] == forward_flops(exact, shares) < cost["forward_flops_dense"]
    assert cost["forward_flops_training"] == forward_flops(exact) > cost["forward_flops_dense"]
    assert "routing" not in estimate(config())
    rows = dict(_estimate_rows(estimate(cfg)))
    assert rows["layers"] == cfg.letters
    ratio = cost["forward_flops"] / cost["forward_flops_dense"]
    assert f"FLOPs per token, {ratio:.3f} of the dense model; in training" in rows["forward pass"]
    assert "layers" not in dict(_estimate_rows(estimate(config())))


def test_the_summary_says_what_it_must(undisturbed: Callable[[TrainConfig], Path]) -> None:
    cfg = config(dev_frac=0.2, eval_per_epoch=6)
    run = undisturbed(cfg)
    summary = RunDir(run).summary()
    assert summary is not None
    assert set(summary) == {
        "run",
        "preset",
        "status",
        "steps",
        "last",
        "best",
        "scores",
        "params",
        "tokens",
        "presentations",
        "presentations_per_epoch",
        "flops",
        "forward_flops",
        "seconds",
        "tokens_per_s",
        "fingerprints",
        "origin",
        "geometry",
        "tokenizer",
        "guards",
        "machine_class",
        "machine_classes",
        "versions",
        "all_versions",
        "weights",
        "resumed",
        "spent",
        "ledger",
        "peak_memory",
        "start",
    }
    plan = RunDir(run).plan()
    assert (summary["run"], summary["preset"], summary["status"], summary["resumed"]) == (
        cfg.run_id,
        cfg.preset,
        "done",
        0,
    )
    assert summary["steps"] == plan["steps"] and summary["tokens"] == plan["steps"] * 8 * 16
    for split in ("val", "dev"):
        mine = [r for r in rows(run, "eval") if r["split"] == split]
        last, best = mine[-1], min(mine, key=lambda r: r["full"])
        assert summary["scores"][split] == {
            "last": {k: v for k, v in last.items() if k != "event"},
            "best": {k: v for k, v in best.items() if k != "event"},
        }
        assert last["step"] == plan["steps"] and last["full"] < mine[0]["full"] - 0.05
        assert len({r["tokens"] for r in mine}) == 1 and len({r["coverage"] for r in mine}) == 1
    assert (
        summary["last"] == summary["scores"]["val"]["last"]
        and summary["best"] == summary["scores"]["val"]["best"]
    )
    assert summary["presentations"]["presentations_per_token"] == pytest.approx(
        summary["tokens"] / plan["train_tokens"]
    )
    assert summary["presentations"] | {"presentations_per_token": 0} == {
        "train_tokens_per_epoch": plan["train_tokens"],
        "forward_passes": 1,
        "ensemble_members": 1,
        "presentations_per_token": 0,
    }
    assert summary["presentations_per_epoch"] == 1
    assert summary["forward_flops"] == pytest.approx(summary["flops"] / (3 * summary["tokens"]))
    assert set(summary["fingerprints"]) == {"corpus", "train", "dev", "val"}
    assert all(
        len(h) == 64 for h in (*summary["fingerprints"].values(), summary["tokenizer"], summary["weights"])
    )
    assert (
        summary["params"]
        == 400 * 32 + 16 * 32 + 2 * (4 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32 + 4 * 32) + 2 * 32
    )
    assert summary["seconds"] > 0 and summary["tokens_per_s"] == pytest.approx(
        summary["tokens"] / summary["seconds"]
    )
    assert (
        summary["machine_classes"] == [summary["machine_class"]] and summary["machine_class"]["threads"] == 1
    )
    assert {"python", "torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "mainrun"} <= set(
        summary["versions"]
    )
    assert len(summary["guards"]) >= 13
    assert all(
        set(g) == {"name", "status", "detail"} and g["status"] in ("pass", "flag") for g in summary["guards"]
    ), summary["guards"]


def test_the_status_follows_the_run(tmp_path: Path) -> None:
    cfg = config()
    run = RunDir(tmp_path / cfg.run_id)
    seen: list[dict[str, Any]] = []
    train(cfg, tmp_path, progress=Watch({2: lambda: seen.append(run.status())}))
    assert seen == [{"state": "running", "step": 0, "pid": os.getpid(), "resumed": 0}]
    steps = run.plan()["steps"]
    assert run.status() == {"state": "done", "step": steps, "steps": steps}
    files = {
        "config.json",
        "env.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "tokenizer.json",
        "checkpoints",
        ".lock",
    }
    assert {p.name for p in run.path.iterdir()} == files
    env = run.env()
    assert set(env) == {
        "machine_class",
        "machine_classes",
        "versions",
        "all_versions",
        "evaluate_hash",
        "allocator",
        "command",
        "carried",
    }
    assert run.config() == cfg


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_frac": 0.01}, "validation|val has"),
        ({"dev_frac": 0.01}, "dev has|validation has"),
        ({"batch_size": 512, "block_size": 128, "official_geometry": "1x8"}, r"train has .*batch_size"),
        ({"vocab_size": 60_000}, "vocab_size=60,000"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    for attempt in (lambda: train(config(**changes), tmp_path), lambda: estimate(config(**changes))):
        with pytest.raises(ConfigError, match=words):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_samples_begin_with_the_prompt_and_come_from_the_seed(
    undisturbed: Callable[[TrainConfig], Path],
) -> None:
    run = undisturbed(config())
    titles = sample(run, "Show HN: ", n=3, max_tokens=8, seed=1)
    assert len(titles) == 3 == len(set(titles)) and all(t.startswith("Show HN: ") for t in titles)
    assert sample(run, "Show HN: ", n=2, max_tokens=8, seed=1) == titles[:2]
    assert sample(run, "Show HN: ", n=1, max_tokens=8, seed=2) != titles[:1]
    greedy = sample(run, "", n=2, max_tokens=40, temperature=0.0)
    assert greedy[0] == greedy[1], "longer than the block, and without a prompt"


def test_a_corpus_that_changed_under_an_interrupted_run_is_refused(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("\n".join(f"title number {i} of the {i * 7 % 50} kind" for i in range(300)))
    cfg = config(corpus=f"file:{titles}", num_titles=300, vocab_size=320)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "runs", progress=Watch({5: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    before = (tmp_path / "runs" / cfg.run_id / "metrics.jsonl").read_bytes()
    titles.write_text(titles.read_text().replace("number 7 ", "numero 7 "))
    with pytest.raises(RunError, match=r"its fingerprints differ from config\.json"):
        train(cfg, tmp_path / "runs")
    assert (tmp_path / "runs" / cfg.run_id / "metrics.jsonl").read_bytes() == before


def test_the_best_of_earlier_sessions_is_shown(tmp_path: Path) -> None:
    told: list[float | None] = []

    class Told(LineProgress):
        def start(self, *args: Any, **kwargs: Any) -> None:
            super().start(*args, **kwargs)
            told.append(self.best)

    cfg = config(eval_per_epoch=4)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, progress=Watch({12: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    seen = [row["full"] for row in RunDir(tmp_path / cfg.run_id).metrics() if row["event"] == "eval"]
    train(cfg, tmp_path, progress=Told())
    assert told == [min(seen)]


def test_a_sample_of_an_older_checkpoint_says_so(tmp_path: Path) -> None:
    train(config(checkpoint_every=2), tmp_path)
    run = RunDir(tmp_path / config(checkpoint_every=2).run_id)
    newest = max(run.checkpoints.iterdir())
    (newest / "state.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match=f"checkpoint {newest} is skipped"):
        sample(run.path, "Show", n=1, max_tokens=4)


def test_a_sample_of_broken_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(), tmp_path)
    run = tmp_path / config().run_id
    healthy = sample(run, "Show", n=1, max_tokens=4, temperature=0.0)
    assert sample(run, "Show", n=1, max_tokens=4, temperature=1e-39) == healthy
    monkeypatch.setattr(
        trainer.GPT, "forward", lambda self, idx: torch.full((1, idx.shape[1], 400), math.nan)
    )
    with pytest.raises(RunError, match="no valid probabilities"):
        sample(run, "Show", n=1, max_tokens=4)
