"""Runs that start from weights: the scored weights of a run, or a Qwen2 checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ROWS, TRAINED, write_checkpoint
from conftest import TINY, tiny_sets
from safetensors.torch import load_file, save_file
from test_guards_rows import check, evidence
from typer.testing import CliRunner, Result

from mainrun.checks.audit import audit
from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core.parameters import is_base
from mainrun.data.foreign import permutation, special_ids
from mainrun.errors import Interrupted, RunError, UsageError
from mainrun.interop import qwen2
from mainrun.interop.start import start_digest
from mainrun.replay import replay_steps
from mainrun.run import batch
from mainrun.run.session import train
from mainrun.store import checkpoint, lineage
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir
from mainrun.train import build, set_up
from mainrun.ui import compare
from mainrun.ui.sample import load_model

SMALL: dict[str, Any] = TINY | {
    "num_titles": 200, "n_layer": 1, "optimizer": "adamw", "lr": 0.01, "checkpoint_every": 10,
    "eval_per_epoch": 1,
}  # fmt: skip
QWEN2: dict[str, Any] = TRAINED | {
    "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48, "vocab_size": ROWS,
    "norm": "rmsnorm", "position": "rope", "rope_theta": 1e6, "mlp": "swiglu", "bias": False,
    "qkv_bias": True, "optimizer": "adamw", "lr": 1e-3,
}  # fmt: skip


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def from_run(run: Path, **changes: Any) -> TrainConfig:
    return from_dict(SMALL | {"start": f"run:{run}"} | changes)


def from_checkpoint(folder: Path, **changes: Any) -> TrainConfig:
    start = {"start": f"hf:{folder}", "tokenizer": f"hf:{folder}"}
    return from_dict(QWEN2 | start | changes)


def stored(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's newest checkpoint."""
    return load_file(checkpoint.paths(run / "checkpoints")[0] / "state.safetensors")


def trained(cfg: TrainConfig, out: Path, **options: Any) -> Path:
    train(cfg, out, **options)
    return out / cfg.run_id


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights. Tests must not change it."""
    return trained(from_dict(SMALL | {"ema": 0.9}), tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / run.name))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


# -- the weights of a run


def test_a_run_starts_from_the_scored_weights(run: Path) -> None:
    source = stored(run)
    model = build(from_run(run), 400)
    for name, p in model.named_parameters():
        assert torch.equal(p, source[f"average/{name}"]), name
    assert not torch.equal(model.embed.weight, source["model/embed.weight"])


def test_a_run_without_an_average_gives_its_weights(tmp_path: Path) -> None:
    run = trained(from_dict(SMALL), tmp_path)
    source = stored(run)
    for name, p in build(from_run(run), 400).named_parameters():
        assert torch.equal(p, source[f"model/{name}"]), name


def test_the_first_score_is_near_the_last_score_of_the_start(run: Path, tmp_path: Path) -> None:
    started = trained(from_run(run, lr=1e-6), tmp_path)
    last = json.loads((run / "summary.json").read_text())["last"]["full"]
    first = RunDir(started).rows()
    evals = [row["full"] for row in first if row["event"] == "eval"]
    assert evals[0] == pytest.approx(last, rel=1e-3)


def test_a_dense_run_starts_a_routed_run(tmp_path: Path) -> None:
    deep = trained(from_dict(SMALL | {"n_layer": 2}), tmp_path)
    cfg = from_run(deep, n_layer=2, block_pattern="DM")
    source = stored(deep)
    random = dict(build(cfg.model_copy(update={"start": ""}), 400).named_parameters())
    for name, p in build(cfg, 400).named_parameters():
        expected = random[name] if not is_base(name) else source[f"model/{name}"]
        assert torch.equal(p, expected), name
    routed = trained(cfg, tmp_path)
    again = from_run(routed, n_layer=2, block_pattern="DM")
    for name, p in build(again, 400).named_parameters():
        assert torch.equal(p, stored(routed)[f"model/{name}"]), "routers are loaded too"
    with pytest.raises(UsageError, match=r"left over: blocks.1.router.score.weight"):
        build(from_run(routed, n_layer=2), 400)


def test_a_run_with_a_frozen_base_takes_the_rest_from_its_start(run: Path, tmp_path: Path) -> None:
    adapted = trained(from_run(run, attn_lora_rank=2, base_frozen=True), tmp_path)
    adapters = stored(adapted)
    base = stored(run)
    changed = 0
    for name, p in build(from_run(adapted, attn_lora_rank=2), 400).named_parameters():
        expected = adapters.get(f"model/{name}", base.get(f"average/{name}"))
        assert expected is not None and torch.equal(p, expected), name
        changed += not is_base(name)
    assert changed == 8
    with pytest.raises(UsageError, match=r"left over: blocks.0.attn.k.lora_a"):
        build(from_run(adapted), 400)


def test_a_run_does_not_start_from_itself(run: Path, tmp_path: Path) -> None:
    """A frozen run whose start is a link to itself must not be read forever."""
    link = tmp_path / "link"
    adapted = from_run(link, attn_lora_rank=2, base_frozen=True)
    link.symlink_to(run)
    path = trained(adapted, tmp_path)
    link.unlink()
    link.symlink_to(path)
    with pytest.raises(UsageError, match="starts from itself"):
        build(from_run(path, attn_lora_rank=2), 400)


def test_the_tokenizer_must_be_that_of_the_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another tokenizer"):
        train(from_run(run, num_titles=190), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 2}, ["missing: blocks.1.attn.q.weight", "missing: blocks.1.mlp.down.bias"]),
        ({"d_model": 64}, ["norm.weight", "(32,)", "(64,)"]),
        ({"bias": False}, ["left over: blocks.0.attn.q.bias"]),
        ({"n_head": 4}, ["n_head is 2 in the start and 4"]),
        ({"vocab_size": 401}, ["embed.weight", "(400, 32)", "(401, 32)"]),
        ({"unused_ids": 3}, ["embed.weight", "(403, 32)"]),
        ({"tie_head": False}, ["missing: head.weight"]),
        ({"mlp": "relu2"}, ["mlp is gelu in the start and relu2"]),
        ({"block_size": 15}, ["positions.weight"]),
    ],
)
def test_a_run_of_another_model_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    sets = tiny_sets(**{"n_layer": 1, "optimizer": "adamw", "start": f"run:{run}"} | changes)
    result = invoke("train", "--preset", "baseline", *sets, "--out", tmp_path / "out", "--no-store")
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_checkpoint_is_refused(run_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        build(from_run(tmp_path / "nowhere"), 400)
    newest, older = checkpoint.paths(run_copy / "checkpoints")
    state = newest / "state.safetensors"
    os.truncate(state, state.stat().st_size - 1)
    older_weights = load_file(older / "state.safetensors")["average/norm.weight"]
    assert torch.equal(build(from_run(run_copy), 400).norm.weight, older_weights)
    (older / "meta.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no usable checkpoint .*state.safetensors is incomplete"):
        build(from_run(run_copy), 400)


# -- what a start changes, and what it does not


def test_the_digest_counts_names_and_bytes(run: Path, run_copy: Path, plain: Path, tmp_path: Path) -> None:
    digest = start_digest(from_run(run))
    assert start_digest(from_run(run_copy)) == digest, "the path does not count"
    other = write_checkpoint(tmp_path / "other", seed=1)
    digests = {start_digest(from_checkpoint(folder)) for folder in (plain, other)}
    path = other / "model.safetensors"
    loaded = load_file(path)
    norm = loaded["model.norm.weight"].clone()
    norm.view(torch.uint8)[0] ^= 1
    save_file(loaded | {"model.norm.weight": norm}, path)
    digests.add(start_digest(from_checkpoint(other)))
    assert len(digests) == 3


def test_digests_are_cached_by_path_size_and_time(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    hashed: list[Path] = []
    hash_tensors = qwen2._hash_tensors

    def counted(path: Path, names: list[str]) -> dict[str, str]:
        hashed.append(path)
        return hash_tensors(path, names)

    monkeypatch.setattr(qwen2, "_hash_tensors", counted)
    cfg = from_checkpoint(copy)
    digest = start_digest(cfg)
    assert start_digest(cfg) == digest and len(hashed) == 1
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert start_digest(cfg) == digest and len(hashed) == 2
    for note in (Path(os.environ["MAINRUN_CACHE"]) / "digests").iterdir():
        note.write_text("[]")
    assert start_digest(cfg) == digest and len(hashed) == 3, "a damaged note is made again"


def test_the_start_counts_in_the_key_by_its_content(run: Path, run_copy: Path) -> None:
    digests = {"a": "1" * 64, "b": "2" * 64}
    cfg = from_run(run)
    origins = {name: lineage.origin(cfg, {}, "tokens", {}, {}, digest) for name, digest in digests.items()}
    assert origins["a"]["data"] == {"tokens": "tokens", "start": "1" * 64}
    assert "start" not in origins["a"]["fields"]
    assert lineage.root(origins["a"]) != lineage.root(origins["b"])
    moved = lineage.origin(from_run(run_copy), {}, "tokens", {}, {}, digests["a"])
    assert lineage.root(moved) == lineage.root(origins["a"])
    for other, digest in ((from_dict(SMALL), "1" * 64), (cfg, "")):
        with pytest.raises(ValueError, match="digest"):
            lineage.origin(other, {}, "tokens", {}, {}, digest)


def test_a_batch_gives_runs_of_one_start_the_same_keys(run: Path, run_copy: Path) -> None:
    configs = [from_run(run), from_run(run_copy, eval_per_epoch=1), from_dict(SMALL)]
    keys = list(batch.resolve(configs)[1].values())
    assert keys[0] == keys[1]
    assert keys[0][0] != keys[2][0]


def test_the_source_hash_covers_the_names(tmp_path: Path) -> None:
    from mainrun.core.machine_class import HASHED, source_hash

    root = tmp_path / "interop"
    root.mkdir()
    seen = set()
    for name in ("names.py", "qwen2.py", "start.py"):
        assert f"interop/{name}" in HASHED
        (root / name).write_text("x = 1\n")
        seen.add(source_hash(tmp_path))
    assert len(seen) == 3


def test_the_same_seed_without_a_start_has_the_same_weights(run: Path) -> None:
    before = build(from_dict(SMALL), 400)
    build(from_run(run), 400)
    after = build(from_dict(SMALL), 400)
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert set_up(from_dict(SMALL)).start_digest == ""


# -- the life of a run with a start


@pytest.fixture(scope="module", params=["run", "hf"])
def started(
    request: pytest.FixtureRequest, run: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    """A finished run that starts from weights, with its store. Tests must not change it."""
    out = tmp_path_factory.mktemp("started")
    cfg = from_run(run) if request.param == "run" else from_checkpoint(plain)
    train(cfg, out, store=Store(out / "store"))
    return cfg, out


def test_the_summary_states_the_start(started: tuple[TrainConfig, Path]) -> None:
    cfg, out = started
    summary = RunDir(out / cfg.run_id).summary()
    assert summary is not None
    assert summary["start"] == {"source": cfg.start, "digest": start_digest(cfg)}
    flagged = [guard for guard in summary["guards"] if guard["status"] == "flag"]
    assert "random_start" in [guard["name"] for guard in flagged]
    assert [guard["name"] for guard in summary["guards"] if guard["status"] == "fail"] == []
    random = train(from_dict(SMALL), out / "random")
    assert random["start"] is None


def test_a_resumed_run_has_the_same_bits(started: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    cfg, out = started
    expected = RunDir(out / cfg.run_id).summary()
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, until=12)
    summary = train(cfg, tmp_path)
    assert expected is not None
    assert summary["weights"] == expected["weights"] and summary["resumed"] == 1


def test_a_store_is_shared_and_audited(started: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    cfg, out = started
    store = Store(out / "store")
    expected = RunDir(out / cfg.run_id).summary()
    summary = train(cfg, tmp_path, store=store)
    assert expected is not None
    assert summary["weights"] == expected["weights"]
    assert summary["ledger"]["reused"] == summary["steps"]
    results = list(audit(store, segments=2, seed=0))
    assert {result.status for result in results} == {"same"}, results


def test_training_again_gives_the_same_rows_and_weights(started: tuple[TrainConfig, Path]) -> None:
    cfg, out = started
    run = RunDir(out / cfg.run_id)
    summary = run.summary()
    assert summary is not None
    result = replay_steps(run, summary["steps"])
    assert result["trained_weights"] == result["weights"] == summary["weights"]


def test_titles_are_sampled(started: tuple[TrainConfig, Path]) -> None:
    cfg, out = started
    model, _ = load_model(RunDir(out / cfg.run_id))
    assert torch.equal(model.norm.weight, stored(out / cfg.run_id)["model/norm.weight"])
    result = invoke("sample", cfg.run_id, "--prompt", "The", "--out", out)
    assert result.exit_code == 0 and result.output.startswith("The")


def test_a_run_that_starts_grows(started: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    cfg, _ = started
    op = {"name": "stack_layers", "value": [0, 0], "init": "identity", "trigger": {"step": 5}}
    if cfg.n_layer == 2:
        op["value"] = [0, 1, 1]
    summary = train(
        cfg.model_copy(update={"growth": {}}).changed(growth={"version": 2, "ops": [op]}), tmp_path
    )
    assert summary["status"] == "done" and summary["start"]["source"] == cfg.start


def test_a_dry_run_and_a_run_name_the_start(run: Path, tmp_path: Path) -> None:
    sets = tiny_sets(num_titles=200, n_layer=1, start=f"run:{run}", max_steps=2, tokenizer_fit="train")
    options = ["--preset", "baseline", *sets, "--out", tmp_path / "out"]
    shown = invoke("train", *options, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert f"run:{run}" in shown.output.replace("\n", "")
    table = json.loads(invoke("train", *options, "--dry-run", "--json").stdout)
    assert table["start"] == {"source": f"run:{run}", "digest": start_digest(from_run(run))}
    assert not (tmp_path / "out").exists()
    result = invoke("train", *options)
    assert result.exit_code == 0, result.output
    assert f"the run starts from the weights of run:{run}" in result.output


def change(folder: Path) -> None:
    """Change the lowest bit of a weight of a checkpoint."""
    path = folder / "model.safetensors"
    loaded = load_file(path)
    norm = loaded["model.norm.weight"].clone()
    norm.view(torch.uint8)[0] ^= 1
    save_file(loaded | {"model.norm.weight": norm}, path, {"format": "pt"})


def test_a_start_that_changed_refuses_resume(plain: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    cfg = from_checkpoint(copy)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path, until=6)
    before = (tmp_path / cfg.run_id / "metrics.jsonl").read_bytes()
    change(copy)
    with pytest.raises(RunError, match=r"starts from have changed since the run began; restore them"):
        train(cfg, tmp_path)
    assert (tmp_path / cfg.run_id / "metrics.jsonl").read_bytes() == before
    change(copy)
    assert train(cfg, tmp_path)["resumed"] == 1
    change(copy)
    result = invoke("train", "--preset", preset_of(cfg, tmp_path), "--out", tmp_path)
    assert result.exit_code == 2 and "have changed since the run began" in result.output, result.output
    shutil.rmtree(copy)
    assert invoke("train", "--preset", preset_of(cfg, tmp_path), "--out", tmp_path).exit_code == 0


def preset_of(cfg: TrainConfig, folder: Path) -> Path:
    """Write a preset whose run is that of a config."""
    path = folder / "custom.toml"
    defaults = TrainConfig()
    lines = []
    for name, value in cfg.model_dump().items():
        if name != "preset" and value != getattr(defaults, name) and name != "growth":
            lines.append(f"{name} = {json.dumps(value)}\n")
    path.write_text("".join(lines))
    return path


def test_the_rows_of_a_foreign_vocabulary_are_permuted(plain: Path) -> None:
    source = load_file(plain / "model.safetensors")
    model = build(from_checkpoint(plain), ROWS)
    to_file, to_ours = permutation(special_ids(plain), ROWS)
    embedding = source["model.embed_tokens.weight"]
    for ours, theirs in enumerate(to_file):
        assert torch.equal(model.embed.weight[ours], embedding[theirs])
    assert torch.equal(model.embed.weight[to_ours], embedding)


def test_a_run_starts_from_a_run_that_started_from_a_checkpoint(
    started: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    cfg, out = started
    again = cfg.model_copy(update={"start": f"run:{out / cfg.run_id}"})
    source = stored(out / cfg.run_id)
    model = build(again, cfg.vocab_size)
    for name, p in model.named_parameters():
        assert torch.equal(p, source[f"model/{name}"]), name
    assert train(again, tmp_path)["status"] == "done"


# -- guards and comparisons


def test_a_declared_start_is_flagged_and_fails_where_the_task_is_claimed() -> None:
    e = evidence()
    declared = e.cfg.model_copy(update={"start": "run:somewhere"})
    honest = replace(e, cfg=declared, initial_weights="run:somewhere")
    status, detail = check(honest, "random_start")
    assert status == "flag" and "run:somewhere" in detail
    status, detail = check(honest, "random_start", all=True)
    assert status == "fail" and "requires random weights" in detail
    for cfg, weights in ((e.cfg, "run:somewhere"), (declared, "run:elsewhere")):
        assert check(replace(e, cfg=cfg, initial_weights=weights), "random_start")[0] == "fail"


def test_runs_from_weights_are_not_compared_with_runs_from_random_weights(run: Path, tmp_path: Path) -> None:
    started = from_run(run)
    train(started, tmp_path)
    other = from_run(run, lr=0.02)
    train(other, tmp_path)
    random = from_dict(SMALL)
    train(random, tmp_path)
    result = invoke("compare", started.run_id, random.run_id, "--out", tmp_path)
    assert result.exit_code == 2
    assert "from random weights" in result.output and f"run:{run}" in result.output
    assert invoke("compare", started.run_id, other.run_id, "--out", tmp_path).exit_code == 0
    summaries = [compare.load_summary(RunDir(tmp_path / cfg.run_id)) for cfg in (random, started)]
    with pytest.raises(RunError, match="started from"):
        compare.rows(summaries)


def test_runs_from_different_weights_are_compared_with_a_note(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "sources" / run.name))
    other = trained(from_dict(SMALL | {"lr": 0.02}), tmp_path / "sources")
    configs = [from_run(run), from_run(run, lr=0.02), from_run(copy), from_run(other)]
    for cfg in configs:
        train(cfg, tmp_path)
    same, same_lr, same_copy, different = [cfg.run_id for cfg in configs]
    note = "The runs start from different weights, so their difference is not only due to training."
    assert note not in invoke("compare", same, same_lr, same_copy, "--out", tmp_path).stdout
    assert invoke("compare", same, different, same_lr, "--out", tmp_path).stdout.count(note) == 1
    rows = json.loads(invoke("compare", same, different, "--out", tmp_path, "--json").stdout)
    assert [row["start_digest"] for row in rows] == [start_digest(configs[0]), start_digest(configs[3])]
    summary = compare.load_summary(RunDir(run))
    assert compare.rows([summary])[0]["start_digest"] is None


def test_a_report_does_not_mix_them() -> None:
    from reports.evidence.load import _kind_of_start, _unequal

    tables: list[tuple[str, Any]] = [
        ("one", {"start": None}),
        ("two", {"start": {"source": "run:x", "digest": "1"}}),
        ("old", {}),
    ]
    (fault,) = _unequal("kind of start", tables, _kind_of_start, "report them alone")
    assert fault == (
        "the inputs differ in their kind of start: random weights: one; weights: two; report them alone"
    )
    assert _unequal("kind of start", [tables[0], tables[2]], _kind_of_start, "") == []
