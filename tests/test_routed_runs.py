"""Runs with routed blocks: rows, equal bits after interruptions and reuse, and scores without look-ahead."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_sets
from submitting import make_report, read_summary, repository
from test_audit import rewrite
from test_ddp import compare
from test_sharing import Killed, Watch, kill, ledger, outcome, rows
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from mainrun import train as trainer
from mainrun.checks import guards
from mainrun.checks.audit import audit
from mainrun.checks.guards import Evidence, Verdict
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core import routing
from mainrun.core.kernels import cross_entropy
from mainrun.core.pending_losses import NotFinite, PendingLosses, step_row
from mainrun.core.routing import selected_shares
from mainrun.data import scoring
from mainrun.errors import RunError
from mainrun.files.hashing import sha256_json
from mainrun.plan.cost import forward_flops
from mainrun.plan.plan import Plan
from mainrun.plan.routing import INPUTS, LOSSES, STATS, selected_tokens
from mainrun.replay import replay_steps, run_guards
from mainrun.run import batch
from mainrun.run.session import train
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, Setup, State, TrainStep, build, score, set_up
from mainrun.ui.sample import load_model
from reports.submission import verification

ROOT = Path(__file__).parents[1]
# The run trains 20 steps. It saves nodes at steps 10 (a score), 14 (the start of the decay) and 20 (the end).
SMALL: dict[str, Any] = {
    "num_titles": 120, "n_layer": 4, "block_pattern": "DSMT", "optimizer": "adamw", "lr": 0.01,
    "dropout": 0.1, "schedule": "wsd", "decay_frac": 0.3, "checkpoint_every": 1000, "compile": "off",
}  # fmt: skip
STEPS = 20
ROUTED = (1, 2, 3)


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | SMALL | changes)


def late(name: str, value: float, step: int = 12) -> dict[str, Any]:
    return {"growth": {"ops": [{"name": name, "value": value, "trigger": {"step": step}}]}}


def routed_outcome(run: Path) -> dict[str, Any]:
    """Return the outcome of a run, together with the results of its routers."""
    summary = RunDir(run).summary()
    assert summary is not None
    return outcome(run) | {"routing": summary["routing"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run of `config()` and the store that the run filled."""
    out = tmp_path_factory.mktemp("made")
    train(config(), out, store=Store(out / "store"))
    return out


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made / "store", tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def setup() -> Setup:
    """Return the setup of a run without dropout."""
    return set_up(config(dropout=0.0))


def run_of(out: Path, cfg: TrainConfig | None = None) -> RunDir:
    return RunDir(out / (cfg or config()).run_id)


# -- rows


def test_rows_contain_the_losses_and_the_statistics_of_the_routers(made: Path) -> None:
    share = selected_tokens(0.5, 16) / 16
    for row in run_of(made).metrics():
        if row["event"] == "eval":
            assert [list(router) for router in row["routers"]] == [["layer", "selected"]] * 3
            assert [router["layer"] for router in row["routers"]] == [*ROUTED] and "aux" not in row
            continue
        assert list(row["aux"]) == [*LOSSES] == ["prior", "student", "router", "z"]
        assert [list(router) for router in row["routers"]] == [["layer", *STATS]] * 3
        assert [router["layer"] for router in row["routers"]] == [*ROUTED]
        assert all(value > 0 for value in row["aux"].values()), "the losses are not weighted"
        assert [router["selected"] for router in row["routers"]] == [share] * 3
        m = row["routers"][1]
        assert [name for name in STATS if m[name] == 0] == ["S_CE", "S_CU", "D_st", "D_ch"], (
            "M has no surprise"
        )


def test_the_row_of_a_dense_step_is_unchanged() -> None:
    row = step_row(3, 0.1, [2.0, 1.5], ())
    assert row.fields() == {"step": 3, "lr": 0.1, "loss": 2.0, "grad_norm": 1.5}


def numbers_of_step(setup: Setup, **changes: Any) -> tuple[State, Tensor, Tensor, Tensor]:
    """Return a new state, the first batch, and the numbers of a step on this batch."""
    state = shaken_state(setup)
    state.cfg = setup.cfg.changed(**changes)
    x, y = (torch.from_numpy(part) for part in batch_of(setup))
    inputs = Plan(state.cfg, setup.plan.train_tokens).at(0)
    numbers = TrainStep(state, setup.device).gradients(x, y, inputs)
    return state, x, y, numbers


def batch_of(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    tokens = setup.data.splits["train"]
    spans = tokens[: 8 * 17].astype(np.int64).reshape(8, 17)
    return spans[:, :-1].copy(), spans[:, 1:].copy()


def shaken_state(setup: Setup) -> State:
    """Return a state with noise in all weights, so that no student is zero."""
    state = setup.start()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return state


def test_the_loss_of_a_row_is_the_cross_entropy_alone(setup: Setup) -> None:
    state, x, y, numbers = numbers_of_step(setup, prior_loss=100.0, student_loss=100.0, router_loss=100.0)
    with torch.no_grad():
        logits, info = state.model.train()(x, routing_info=True)
    row = step_row(1, 0.01, numbers.tolist(), ROUTED).fields()
    expected = cross_entropy(logits.flatten(0, 1), y.flatten(), 0.0, False)[1]
    assert row["loss"] == pytest.approx(float(expected), rel=1e-6) and row["loss"] < 10
    assert list(row["aux"].values()) == pytest.approx(info.losses.tolist(), rel=1e-6)
    for router, stats in zip(row["routers"], info.stats.tolist(), strict=True):
        assert [router[name] for name in STATS] == pytest.approx(stats, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 4}])
def test_all_numbers_are_averaged_over_micro_batches(setup: Setup, changes: dict[str, Any]) -> None:
    state, x, y, numbers = numbers_of_step(setup, **changes)
    pieces = []
    with torch.no_grad():
        for rows_x, rows_y in zip(x.chunk(4), y.chunk(4), strict=True):
            logits, info = state.model.train()(rows_x, routing_info=True)
            loss = cross_entropy(logits.flatten(0, 1), rows_y.flatten(), 0.0, False)[1]
            pieces.append(torch.cat((loss.view(1), info.losses, info.stats.flatten())))
    mean = torch.stack(pieces).mean(0)
    assert float((pieces[0] - mean).abs().max()) > 0.01, "the pieces differ"
    without_norm = torch.cat((numbers[:1], numbers[2:]))
    torch.testing.assert_close(without_norm, mean, rtol=1e-5, atol=1e-6)


def test_pending_losses_keep_the_order_and_the_layers_of_the_steps() -> None:
    """Growth changes the number of routed layers while losses are pending."""
    losses = PendingLosses(limit=4)
    per_layer = len(STATS)

    def numbers(layers: int, start: float) -> Tensor:
        return torch.arange(2 + bool(layers) * 4 + layers * per_layer, dtype=torch.float64) + start

    losses.push(1, 0.1, numbers(1, 100), (1,))
    losses.push(2, 0.2, numbers(0, 200), ())
    losses.push(3, 0.3, numbers(2, 300), (1, 3))
    full = [losses.full]
    losses.push(4, 0.4, numbers(1, 400), (2,))
    assert [*full, losses.full] == [False, True]
    first, second, third, fourth = losses.drain()
    assert [(row.step, row.lr, row.loss, row.grad_norm) for row in (first, second, third, fourth)] == [
        (1, 0.1, 100, 101), (2, 0.2, 200, 201), (3, 0.3, 300, 301), (4, 0.4, 400, 401),
    ]  # fmt: skip
    assert second.routing is None
    assert third.routing is not None and fourth.routing is not None
    assert list(third.routing["aux"].values()) == [302, 303, 304, 305]
    assert [[*router.values()] for router in third.routing["routers"]] == [
        [1, *range(306, 314)], [3, *range(314, 322)],
    ]  # fmt: skip
    assert [*fourth.routing["routers"][0].values()] == [2, *range(406, 414)]
    assert losses.drain() == []

    losses.push(5, 0.1, numbers(1, 0), (1,))
    losses.push(6, 0.1, numbers(1, math.nan), (1,))
    with pytest.raises(NotFinite) as caught:
        losses.drain()
    assert [row.step for row in caught.value.rows] == [5] and caught.value.row.step == 6
    assert losses.drain() == []


# -- the summary


def test_the_summary_contains_the_results_of_the_routers(made: Path) -> None:
    run = run_of(made)
    routers = (run.summary() or {})["routing"]
    assert list(routers) == [
        "letters", "capacity", "selected", "student_accuracy", "topk_loss", "forward_flops",
        "forward_flops_dense",
    ]  # fmt: skip
    assert (routers["letters"], routers["capacity"]) == ("DSMT", 0.5)
    last = [row for row in run.metrics() if row["event"] == "eval"][-1]
    assert routers["selected"] == [router["selected"] for router in last["routers"]]
    model, tokenizer = load_model(run)
    loss, accuracy = look_ahead(model, setup_of(run))
    assert routers["topk_loss"] == pytest.approx(loss, abs=1e-5) and abs(loss - last["loss"]) > 1e-5
    assert routers["student_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    exact = config().model_copy(update={"vocab_size": tokenizer.vocab_size})
    dense = exact.model_copy(update={"block_pattern": "D"})
    assert routers["forward_flops"] == forward_flops(exact, routers["selected"]) < forward_flops(dense)
    assert routers["forward_flops_dense"] == forward_flops(dense)


def setup_of(run: RunDir) -> Setup:
    return set_up(run.config())


@torch.no_grad()
def look_ahead(model: GPT, setup: Setup) -> tuple[float, list[float]]:
    """Return the loss of the training route in nats per token of val, and the accuracy of the students."""
    tokens = setup.data.splits["val"].astype(np.int64)
    inputs = np.concatenate([[1], tokens[:-1]])  # <eos> is token 1
    total = 0.0
    for start in range(0, len(tokens), 16):
        x = torch.from_numpy(inputs[start : start + 16])
        y = torch.from_numpy(tokens[start : start + 16])
        logits = model(x[None], topk=True)[0].double()
        total -= float(logits.log_softmax(-1).gather(1, y[:, None]).sum())
    # The official score passes the first spans through the model too.
    official = torch.from_numpy(tokens[: len(tokens) // 129 * 129].reshape(-1, 129)[:, :-1].reshape(-1, 16))
    rest = torch.from_numpy(inputs)
    passes = [official, rest[: len(rest) // 16 * 16].view(-1, 16), rest[len(rest) // 16 * 16 :][None]]
    agreements = torch.zeros(3, dtype=torch.float64)
    for x in passes:
        if x.numel():
            info = model(x, routing_info=True, topk=True)[1]
            agreements += x.numel() * info.stats[:, STATS.index("student_accuracy")].double()
    return total / len(tokens), (agreements / sum(x.numel() for x in passes)).tolist()


def test_the_loss_that_sees_the_future_is_never_compared(made: Path, tmp_path: Path) -> None:
    run = run_of(made)
    assert all("topk_loss" not in row for row in run.metrics())
    assert '"topk_loss"' not in (run.path / "metrics.jsonl").read_text()
    other = RunDir(shutil.copytree(run.path, tmp_path / run.path.name))
    compared = []
    for loss in (1e-6, 99.0):
        summary = other.summary() or {}
        summary["routing"]["topk_loss"] = loss
        (other.path / "summary.json").write_text(json.dumps(summary))
        done = CliRunner().invoke(app, ["compare", str(run.path), str(other.path), "--json"])
        assert done.exit_code == 0, done.output
        compared.append(done.stdout)
    assert compared[0] == compared[1]
    sources = [*(ROOT / "sweeps").rglob("*.py"), *(ROOT / "mainrun" / "growth").rglob("*.py")]
    sources += [ROOT / "mainrun/plan/triggers.py", ROOT / "mainrun/run/sharing.py"]
    assert [path for path in sources if "topk" in path.read_text()] == []


def test_the_selected_shares_are_those_of_the_first_64_rows(setup: Setup) -> None:
    model = shaken_state(setup).model
    tokens = np.random.default_rng(0).integers(3, 200, 100 * 16 + 7).astype(np.uint16)
    with torch.no_grad():
        info = model.eval()(
            torch.from_numpy(tokens[: 64 * 16].astype(np.int64)).view(64, 16), routing_info=True
        )
    expected = info[1].stats[:, STATS.index("selected")].tolist()
    model.train()
    # the rows in a forward pass: 1, 48 and 64
    for logits in (1, 48 * 16 * model.embed.num_embeddings, 10**9):
        shares = selected_shares(model, tokens, setup.cfg, logits)
        assert [share["layer"] for share in shares] == [*ROUTED]
        assert [share["selected"] for share in shares] == pytest.approx(expected, abs=1e-6)
        assert model.training
    changed = tokens.copy()
    changed[64 * 16 :] = 5
    assert selected_shares(model, changed, setup.cfg, 10**9) == shares, "later rows do not count"
    (one, *_) = selected_shares(model, tokens[:9], setup.cfg, 10**9)
    assert 0 < one["selected"] <= 1, "a split can be shorter than a block"


# -- interruptions


@pytest.mark.parametrize("at", [3, 13])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, made: Path, at: int) -> None:
    cfg = config(checkpoint_every=6)
    with pytest.raises(Killed):
        train(cfg, tmp_path, progress=Watch({at: kill}))
    summary = train(cfg, tmp_path)
    assert summary["resumed"] == 1
    assert routed_outcome(tmp_path / cfg.run_id) == routed_outcome(run_of(made).path)


def test_a_run_that_is_killed_after_its_last_step_has_the_same_summary(tmp_path: Path, made: Path) -> None:
    """The summary scores the loaded weights, which needs the sharpness of the last step."""
    path = shutil.copytree(run_of(made).path, tmp_path / run_of(made).path.name)
    (path / "summary.json").unlink()
    train(config(), tmp_path)
    assert routed_outcome(path) == routed_outcome(run_of(made).path)


RECIPES: dict[str, dict[str, Any]] = {
    "bfloat16, ema, dev": {"dtype": "bfloat16", "ema": 0.9, "dev_frac": 0.1},
    "muon, titles in a new order, R-Drop": {
        "optimizer": "muon", "momentum": 0.9, "lr_aux": 1e-3, "order": "shuffle_titles", "rdrop": 0.5,
    },
    "own route, straight gate, micro-batches": {"route": "own", "gate": "straight", "grad_accum": 2},
    "a capacity that changes": late("set_capacity", 0.25),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_resumes_is_audited_and_is_replayed(tmp_path: Path, recipe: dict[str, Any]) -> None:
    cfg = config(checkpoint_every=5, **recipe)
    filled = Store(tmp_path / "store")
    train(cfg, tmp_path / "whole", store=filled)
    with pytest.raises(Killed):
        train(cfg, tmp_path / "parts", progress=Watch({14: kill}))
    train(cfg, tmp_path / "parts")
    whole = run_of(tmp_path / "whole", cfg)
    assert routed_outcome(tmp_path / "parts" / cfg.run_id) == routed_outcome(whole.path)
    results = list(audit(filled, 100))
    assert len(results) >= 3 and {result.status for result in results} == {"same"}, results
    check_replay(whole)
    last = [row for row in whole.metrics() if row["event"] == "eval" and row["split"] == "val"][-1]
    selected = (whole.summary() or {})["routing"]["selected"]
    assert selected == [router["selected"] for router in last["routers"]]


@pytest.mark.slow
def test_sigkill_and_sigterm_change_nothing(tmp_path: Path, made: Path) -> None:
    arguments = [*tiny_sets(**SMALL | {"checkpoint_every": 2}), "--out", str(tmp_path), "--no-store"]
    command = [sys.executable, "-m", "mainrun", "train", "--preset", "baseline", *arguments]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 300
            before = written_rows(tmp_path)
            while written_rows(tmp_path) < before + 3:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(number)
            process.wait(timeout=300)
        finally:
            process.kill()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    run = RunDir(path)
    assert (run.summary() or {})["resumed"] >= 1
    train(run.config(), tmp_path / "whole")
    assert routed_outcome(path) == routed_outcome(tmp_path / "whole" / path.name)


def written_rows(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl"))


def test_train_py_alone_gives_the_bits_of_the_full_harness(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = set_up(config())
    state = setup.start()
    trainer.loop(trainer.PlainRun(setup, state), state, setup.device)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in printed]
    harness = []
    for row in rows(run_of(made).path):
        if row["event"] == "step":
            del row["tokens"]
        harness.append(row)
    assert len(plain) > STEPS and plain == harness


# -- the store


def test_all_steps_are_reused(tmp_path: Path, made: Path, store: Store) -> None:
    cfg = config(preset="again")
    summary = train(cfg, tmp_path, store=store)
    assert summary["ledger"] == ledger(STEPS, STEPS)
    assert routed_outcome(tmp_path / cfg.run_id) == routed_outcome(run_of(made).path)


def test_a_prefix_is_reused_and_the_next_step_has_the_new_capacity(
    tmp_path: Path, made: Path, store: Store
) -> None:
    """The runs part after step 10, where the store has a state."""
    cfg = config(**late("set_capacity", 0.25, 10))
    summary = train(cfg, tmp_path / "shared", store=store)
    assert summary["ledger"] == ledger(STEPS, 10)
    train(cfg, tmp_path / "alone")
    shared = tmp_path / "shared" / cfg.run_id
    assert routed_outcome(shared) == routed_outcome(tmp_path / "alone" / cfg.run_id)
    steps = [row for row in rows(shared) if row["event"] == "step"]
    assert [row["routers"][0]["selected"] for row in steps] == [0.5] * 10 + [0.25] * 10
    earlier = [row for row in rows(run_of(made).path) if row["event"] == "step"]
    assert steps[:10] == earlier[:10]


def keys(cfg: TrainConfig) -> list[str]:
    return batch.share_steps([cfg], None).chains[cfg.run_id]


# A field, another value, and the letters of the blocks that use the field.
FIELDS: dict[str, tuple[float, str]] = {
    "capacity": (0.25, "MST"), "sharpness": (0.4, "ST"), "sharpness_end": (7.0, "ST"),
    "prior_loss": (0.06, "ST"), "student_loss": (0.02, "MST"), "router_loss": (0.02, "M"),
    "router_z_loss": (0.001, "M"), "lr_router": (0.02, "MST"), "lr_prior": (0.02, "ST"),
    "lr_student": (0.02, "MST"),
}  # fmt: skip


def test_keys_depend_on_the_fields_that_a_block_uses() -> None:
    assert {*FIELDS} == {*INPUTS, "sharpness_end"}
    for pattern in ("D", "DM", "DS", "DT"):
        base = keys(config(block_pattern=pattern))
        for name, (value, letters) in FIELDS.items():
            changed = keys(config(block_pattern=pattern, **{name: value}))
            assert (changed[-1] != base[-1]) == (pattern[-1] in letters), (pattern, name)
            # All runs begin with the same sharpness, and the rates and weights differ from the first step on.
            shares = name == "sharpness_end" or pattern[-1] not in letters
            assert (changed[1] == base[1]) == shares, (pattern, name)


def test_a_pattern_counts_with_one_letter_per_layer() -> None:
    assert keys(config(block_pattern="DM")) == keys(config(block_pattern="DMDM"))
    assert keys(config(block_pattern="D")) == keys(config(block_pattern="DD"))
    assert keys(config(block_pattern="DM"))[0] != keys(config(block_pattern="DMD"))[0]


# -- audit, replay and bundles


def test_every_segment_is_trained_again_to_the_same_bits(store: Store) -> None:
    results = list(audit(store, 100))
    assert len(results) >= 3 and {result.status for result in results} == {"same"}, results


@pytest.mark.parametrize(("event", "field"), [("step", "aux"), ("step", "routers"), ("eval", "routers")])
def test_the_audit_compares_the_numbers_of_the_routers(store: Store, event: str, field: str) -> None:
    node = store.node(next(node.key for node in store.summary()[0] if node.step == STEPS))
    changed = json.loads(json.dumps(node.rows))
    row = next(row for row in reversed(changed) if row["event"] == event)
    part = row[field] if field == "aux" else row[field][-1]
    part[[*part][-1]] *= 0.999
    rewrite(store, node, rows=changed)
    (result,) = [result for result in audit(store, 100) if result.status != "same"]
    assert result.node.step == STEPS and result.why.startswith(f"{field} at step")


def check_replay(run: RunDir) -> None:
    """Check that a replay gives the rows, the scores and the weights of a run, and that its guards pass."""
    result = replay_steps(run, 10_000)
    summary = run.summary() or {}
    assert result["weights"] == result["trained_weights"] == summary["weights"]
    replayed = {key_of(row): row for row in [*result["rows"], *result["last"]]}
    for row in run.metrics():
        assert replayed[key_of(row)] | {"seconds": 0} == row | {"seconds": 0}
    verdicts = run_guards(run)["guards"]
    assert [verdict for verdict in verdicts if verdict["status"] == "fail"] == []


def key_of(row: dict[str, Any]) -> tuple[str, int, str | None]:
    return row["event"], row["step"], row.get("split")


def test_a_replay_repeats_the_run_and_its_guards_pass(made: Path) -> None:
    """The guard `same_evaluate` scores the loaded weights, which needs the sharpness of the last step."""
    check_replay(run_of(made))


@pytest.mark.slow
def test_a_bundle_of_a_routed_run_is_verified(tmp_path: Path) -> None:
    root = repository(tmp_path / "mainrun")
    summary = train(config(), root / "runs")
    path = root / "runs" / summary["run"]
    (root / "report.pdf").write_bytes(make_report(read_summary(path)))
    bundle = tmp_path / "submission.zip"
    command = [sys.executable, "-m", "mainrun", "submit", "--out", str(bundle)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    verdict = verification.verify(bundle, 5, lambda note: None)
    assert verdict.verified and verdict.differences == [] and verdict.tolerance == 0


# -- scores use the values of the last step


def test_a_loaded_state_is_scored_with_the_sharpness_of_the_last_step(made: Path) -> None:
    run = run_of(made)
    model, _ = load_model(run)
    assert float(model.sharpness) == config().sharpness_end == 6.0
    setup = setup_of(run)
    state = State(setup.cfg, model)
    state.step = STEPS
    model.sharpness.fill_(0.3)  # loading a state does not set the sharpness
    (val,) = score(setup, setup.plan, state)
    (expected,) = [row for row in run.metrics() if row["event"] == "eval" and row["step"] == STEPS]
    assert val | {"seconds": 0} == expected | {"seconds": 0}
    state.step = 10
    assert next(score(setup, setup.plan, state))["loss"] != expected["loss"], "the sharpness matters"
    assert float(model.sharpness) == pytest.approx(setup.plan.at(9).sharpness)


def test_a_sample_without_the_number_of_tokens_is_refused(made: Path, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(run_of(made).path, tmp_path / run_of(made).path.name))
    document = json.loads((run.path / "config.json").read_text())
    del document["plan"]["train_tokens"]
    (run.path / "config.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="lacks the number of training tokens"):
        load_model(run)


# -- nothing that is scored looks ahead


class LooksAhead(GPT):
    """A model that is scored by the selection of training, which sees the future."""

    def forward(self, idx: Tensor, pool: Tensor | None = None, *args: Any, **more: Any) -> Any:
        return super().forward(idx, pool, topk=True)


def evidence(**changes: Any) -> Evidence:
    """Return the evidence of a run with a model whose routers have random weights."""
    cfg = config(block_size=32, batch_size=4, **changes)
    setup = material(sha256_json({"seed": cfg.seed}))
    model = build(cfg, setup.data.tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    plan = Plan(cfg, len(setup.data.splits["train"]))
    model.set_inputs(plan.at(plan.steps - 1), "plain")
    return Evidence(cfg, setup.corpus, setup.data, model, [], {}, {}, "random", "")


MATERIAL: dict[str, Setup] = {}


def material(key: str) -> Setup:
    if key not in MATERIAL:
        MATERIAL[key] = set_up(config(block_size=32, batch_size=4, dropout=0.0))
    return MATERIAL[key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["DM", "DS", "DT", "DSMT"])
def test_only_a_model_that_looks_ahead_fails_the_guard(pattern: str, dtype: str) -> None:
    for route in ("own", "student"):
        e = evidence(block_pattern=pattern, dtype=dtype, route=route)
        verdict = guards.causality(e, True)
        assert verdict.status == "pass", verdict.detail
        e.model.__class__ = LooksAhead
        verdict = guards.causality(e, True)
        assert verdict.status == "fail" and "checked in float64" in verdict.detail


def noisy_selection(score: Tensor, capacity: float) -> Tensor:
    """Select like `select_causally`, but break ties by the whole row, as rounding might."""
    if score.dtype != torch.float64:
        noise = torch.sin(1e7 * score.sum(1, keepdim=True) * (1 + torch.arange(score.size(1))))
        score = (2 * score).round() + 1e-3 * noise
    return select_causally(score, capacity)


select_causally = routing.select_causally


def test_a_gap_caused_by_rounding_is_checked_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "select_causally", noisy_selection)
    e = evidence()
    e.model.train()
    calls: list[bool] = []
    # `count_tokens` also counts in a hook. A copy has the hooks of the original model.
    model = e.model
    e.model.register_forward_pre_hook(lambda module, args: calls.append(model.training))
    verdict = guards.causality(e, True)
    assert verdict.status == "pass" and verdict.detail.endswith("because routers amplify rounding")
    assert calls and not any(calls), "no pass counts as training"
    assert e.model.training and dtype_of(e) == "torch.float32"
    monkeypatch.setattr(guards, "_causality", lambda e, all: Verdict("fail", dtype_of(e)))
    assert guards.causality(e, True).detail.startswith("torch.float64")
    dense = evidence(block_pattern="D")
    assert guards.causality(dense, True).detail == "torch.float32", "a dense model is checked once"


def dtype_of(e: Evidence) -> str:
    return str(next(e.model.parameters()).dtype)


def test_scoring_and_sampling_never_look_ahead(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`top_k` then only computes targets, which are no part of the logits."""
    model, _ = load_model(run_of(made))
    tokens = np.random.default_rng(0).integers(3, 200, 200).astype(np.uint16)
    size = {"chars": 1, "nbytes": 1, "block_size": 16, "geometry": (1, 16)}
    expected = scoring.evaluate(model, tokens, **size)  # type: ignore[arg-type]
    monkeypatch.setattr(routing, "top_k", lambda score, k: torch.arange(k).expand(len(score), k))
    assert scoring.evaluate(model.train(), tokens, **size) == expected  # type: ignore[arg-type]
    idx = torch.from_numpy(tokens[:16].astype(np.int64))[None]
    with torch.no_grad():
        assert not torch.equal(model.train()(idx), model.eval()(idx)), "training uses top_k"


# -- the estimate


@pytest.mark.parametrize("probe", [[], pytest.param(["--probe"], marks=pytest.mark.slow)])
def test_a_dry_run_estimates_a_routed_run(tmp_path: Path, probe: list[str]) -> None:
    """With --probe, a dry run measures a few steps and a part of an evaluation."""
    arguments = ["train", "--preset", "baseline", *tiny_sets(**SMALL), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--dry-run", "--json", *probe])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    plan = shown["plan"]
    assert (plan["first_step"]["sharpness"], plan["last_step"]["sharpness"]) == (0.3, 6.0)
    assert plan["first_step"]["capacity"] == 0.5 and shown["memory"] > 1e8 and shown["eta_seconds"] > 0
    tokens = plan["steps"] * plan["tokens_per_step"]
    assert shown["flops"] == pytest.approx(tokens * 3 * forward_flops(config()), rel=0.01)
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_assumes_the_number_of_tokens_of_training() -> None:
    """A fake tensor has no values, so the number of selected tokens is unknown."""
    with FakeTensorMode():
        mask = torch.ones(3, 16, dtype=torch.bool)
        assert routing.packed(mask, 0.25).shape == (3, 4)


# -- two processes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"grad_accum": 2, "ema": 0.9, "route": "own"}], ids=["sgd", "pieces"])
def test_two_processes_train_the_same_run_as_one(tmp_path: Path, recipe: dict[str, Any]) -> None:
    changes = SMALL | {"dropout": 0.0, "optimizer": "sgd", "lr": 0.3} | recipe
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "mainrun", "train", "--preset", "baseline"]
    command += [*tiny_sets(**changes), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = (p for p in (tmp_path / "two").iterdir() if p.name != ".store")
    two = RunDir(path)
    train(two.config(), tmp_path / "one")
    one = RunDir(tmp_path / "one" / path.name)
    compare(one, two)
    for row_a, row_b in zip(one.metrics(), two.metrics(), strict=True):
        for a, b in zip(row_a["routers"], row_b["routers"], strict=True):
            assert a == pytest.approx(b, abs=1e-3, rel=1e-3)
        if row_a["event"] == "step":
            assert row_a["aux"] == pytest.approx(row_b["aux"], abs=1e-4)
    summary = two.summary() or {}
    assert [guard for guard in summary["guards"] if guard["status"] == "fail"] == []
