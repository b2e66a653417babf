"""Test the log-probabilities that runs leave in their folders, and the scores of ensembles of runs."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.data import scoring
from mainrun.data.corpus import load_corpus
from mainrun.data.token_cache import prepare
from mainrun.data.tokenizer import EOS
from mainrun.errors import RunError
from mainrun.run.session import train
from mainrun.store import costs as costs_of
from mainrun.store import token_scores
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir, open_run, write_json
from mainrun.store.token_scores import FILE, hash_tokens
from mainrun.ui.ensemble import mean_log_probs, score_of, scores_of_means
from mainrun.ui.sample import load_model

SMALL = TINY | {
    "num_titles": 200, "vocab_size": 300, "n_layer": 1, "d_model": 16, "max_steps": 12, "eval_per_epoch": 0,
    "dev_frac": 0.2, "optimizer": "adamw", "lr": 0.02, "official_geometry": "2x16",
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(SMALL | {"token_scores": True} | changes)


class Made(NamedTuple):
    """Finished runs, and the configs of the runs in the order of `ids`."""

    out: Path
    configs: dict[str, TrainConfig]
    summaries: dict[str, dict[str, Any]]

    def run(self, name: str) -> RunDir:
        return RunDir(self.out / self.configs[name].run_id)

    def id(self, name: str) -> str:
        return self.configs[name].run_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("ensemble")
    store = Store(str(out / ".store"))
    configs = {
        "without": config(token_scores=False),
        "one": config(),
        "averaged": config(seed=2, ema=0.9),
        "other shape": config(
            seed=3, n_layer=2, block_size=8, official_geometry="3x8", dropout=0.1, rdrop=0.5
        ),
    }
    summaries = {}
    for name, cfg in configs.items():
        summaries[name] = train(cfg, out, store=store)
    return Made(out, configs, summaries)


THREE = ("one", "averaged", "other shape")


def invoke(made: Made, *args: object) -> Result:
    words = [str(arg) for arg in args]
    return CliRunner().invoke(app, ["ensemble", *words, "--out", str(made.out)], catch_exceptions=False)


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("error: ") == 1
    return result.stderr.strip()


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Callable[[str], RunDir]:
    """Return a function that copies a run to a folder of the test."""

    def copy(name: str) -> RunDir:
        return RunDir(shutil.copytree(made.run(name).path, tmp_path / made.id(name)))

    return copy


# -- the formula


def test_probabilities_are_averaged_and_not_their_logs() -> None:
    probabilities = np.array([[0.5, 0.01, 1.0], [0.25, 0.03, 0.5], [0.75, 0.2, 0.3]])
    means = list(mean_log_probs(np.log(probabilities).astype(np.float32)))
    assert len(means) == 3
    for count, mean in enumerate(means, 1):
        assert np.allclose(mean, np.log(probabilities[:count].mean(axis=0)), rtol=1e-6)
        assert mean.dtype == np.float64
    by_hand = [-math.log(0.5 * 0.01), -math.log(0.375 * 0.02 * 0.75), -math.log(0.5 * 0.08 * 0.6)]
    scores = scores_of_means(np.log(probabilities), chars=4)
    assert scores == pytest.approx([value / 4 for value in by_hand], rel=1e-12)
    assert score_of(np.log(probabilities[1]), chars=2) == pytest.approx(-math.log(0.25 * 0.03 * 0.5) / 2)


def test_tiny_probabilities_do_not_underflow() -> None:
    both = [np.array([-2000.0, -1.0]), np.array([-2001.0, -3000.0])]
    expected = [-2000 + math.log((1 + math.exp(-1)) / 2), -1 - math.log(2)]
    assert list(mean_log_probs(both))[-1] == pytest.approx(expected, rel=1e-12)


def test_the_sum_is_float64() -> None:
    array = np.full(3_000_000, -0.1, dtype=np.float32)
    assert score_of(array, len(array)) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


# -- the file


@pytest.mark.parametrize("split", ["val", "dev"])
@pytest.mark.parametrize("name", THREE)
def test_the_file_gives_the_scores_of_the_run(made: Made, name: str, split: str) -> None:
    cfg = made.configs[name]
    scores = token_scores.read(made.run(name))[split]
    last = made.summaries[name]["scores"][split]["last"]
    data = prepare(cfg, load_corpus(cfg))
    assert score_of(scores.full, scores.chars) == pytest.approx(last["full"], rel=1e-9)
    assert score_of(scores.official, scores.chars) == pytest.approx(last["official"], rel=1e-9)
    assert len(scores.official) / len(scores.full) == last["coverage"]
    assert scores.chars == data.chars[split] and scores.tokens == hash_tokens(data.splits[split])
    assert scores.full.dtype == np.float32 and len(scores.full) == len(data.splits[split])


def test_the_log_probabilities_are_in_the_order_of_the_tokens(made: Made) -> None:
    """The full score has the logits of its first block. The first token has only <eos> before it."""
    cfg = made.configs["other shape"]
    tokens = torch.from_numpy(prepare(cfg, load_corpus(cfg)).splits["val"].astype(np.int64))
    model, _ = load_model(made.run("other shape"))
    inputs = torch.cat([torch.tensor([EOS]), tokens])
    with torch.no_grad():
        blocks = model(inputs[: 3 * cfg.block_size].view(3, -1)).log_softmax(-1).flatten(0, 1)
        rows = model(tokens[: 3 * cfg.block_size].view(3, -1)).log_softmax(-1).flatten(0, 1)
    scores = token_scores.read(made.run("other shape"))["val"]
    full = blocks.gather(1, tokens[: len(blocks), None])[:, 0]
    official = rows.gather(1, tokens[1 : len(rows) + 1, None])[:, 0]
    assert np.allclose(scores.full[: len(full)], full.numpy(), atol=1e-5)
    assert np.allclose(scores.official[: len(official)], official.numpy(), atol=1e-5)


def test_without_the_field_there_is_no_file_and_the_run_has_the_same_bits(made: Made) -> None:
    assert not (made.run("without").path / FILE).exists()
    assert made.summaries["without"]["weights"] == made.summaries["one"]["weights"]
    assert made.summaries["without"]["scores"] == made.summaries["one"]["scores"]


def test_a_repeated_run_takes_its_steps_from_the_store_and_only_scores(made: Made) -> None:
    assert made.summaries["one"]["ledger"]["reused"] == made.summaries["one"]["steps"] == 12
    assert made.summaries["one"]["ledger"]["trained"] == 0


def test_a_run_that_was_killed_before_its_end_writes_the_same_file(
    made: Made, copied: Callable[[str], RunDir]
) -> None:
    run = copied("averaged")
    (run.path / FILE).unlink()
    (run.path / "summary.json").unlink()  # what a user is told to delete to get the file again
    (run.path / f".{FILE}.tmp").write_bytes(b"half of it")
    train(made.configs["averaged"], run.path.parent)
    assert (run.path / FILE).read_bytes() == (made.run("averaged").path / FILE).read_bytes()
    assert not (run.path / f".{FILE}.tmp").exists()


def test_a_run_that_lost_its_lock_writes_no_file(tmp_path: Path) -> None:
    run = open_run(tmp_path, config())
    (run.path / ".lock").write_text("another process\n")
    with pytest.raises(RunError, match="was taken over"):
        token_scores.write(run, "", {})
    assert not (run.path / FILE).exists()
    run.release()


def test_the_hash_of_tokens_does_not_depend_on_their_type() -> None:
    ids = [5, 300, 65_535]
    hashes = {hash_tokens(np.array(ids, dtype=dtype)) for dtype in (np.uint16, np.uint32, np.int64)}
    assert len(hashes) == 1 and hash_tokens(np.array([5, 300, 65_534])) not in hashes


# -- damaged files


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any]) -> None:
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["mainrun"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    change(arrays, about)
    save_file(arrays, path, {"mainrun": json.dumps(about)})


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as safetensors"),
    "no safetensors": (lambda path: path.write_bytes(b"x" * 500), "cannot be read as safetensors"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "cannot be read as safetensors"),
    "a folder": (replace_by_folder, "is damaged: it is a folder;"),
    "no metadata": (lambda path: save_file({"val/full": np.zeros(3)}, path), "is not JSON"),
    "an edited number": (
        lambda path: rewrite(path, lambda arrays, about: arrays["val/full"].put(5, -0.1)),
        "was changed after it was written",
    ),
    "other characters": (
        lambda path: rewrite(path, lambda arrays, about: about["splits"]["val"].update(chars=9)),
        "was changed after it was written",
    ),
    "a later format": (
        lambda path: rewrite(path, lambda arrays, about: about.update(format=2)),
        "has format 2, but this version reads format 1",
    ),
    "no checksum": (lambda path: rewrite(path, lambda arrays, about: about.pop("sha256")), "lacks 'sha256'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(made: Made, copied: Callable[[str], RunDir], name: str) -> None:
    damage, words = DAMAGE[name]
    run = copied("averaged")
    damage(run.path / FILE)
    text = refusal(invoke(made, made.id("one"), run.path))
    assert f"{run.path / FILE} is damaged: it " in text and words in text
    assert text.endswith("restore it, or train the run again with --fresh")


def test_a_changed_bit_is_refused_or_changes_nothing(made: Made, copied: Callable[[str], RunDir]) -> None:
    run = copied("one")
    path = run.path / FILE
    good = path.read_bytes()
    expected = token_scores.read(run)
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        data[rng.choice((rng.randrange(600), rng.randrange(len(good))))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            found = token_scores.read(run)
        except RunError:
            refused += 1
            continue
        for split, scores in expected.items():
            assert np.array_equal(found[split].full, scores.full)
            assert (found[split].tokens, found[split].chars) == (scores.tokens, scores.chars)
    assert refused > 40


def test_the_file_of_another_run_is_refused(made: Made, copied: Callable[[str], RunDir]) -> None:
    run = copied("averaged")
    shutil.copy(made.run("one").path / FILE, run.path / FILE)
    assert "belongs to a run with another config" in refusal(invoke(made, made.id("one"), run.path))


def test_a_file_that_contradicts_the_summary_is_refused(made: Made, copied: Callable[[str], RunDir]) -> None:
    run = copied("averaged")
    splits = token_scores.read(run)
    token_scores.write(open_run(run.path.parent, made.configs["averaged"]), made.configs["averaged"].digest, {
        "val": token_scores.TokenScores(splits["val"].tokens, splits["val"].chars, splits["dev"].full,
                                        splits["dev"].official),
    })  # fmt: skip
    text = refusal(invoke(made, made.id("one"), run.path))
    assert "gives the full score" in text and "but summary.json says" in text
    assert f"run {run.path.name} has no dev titles" in refusal(
        invoke(made, made.id("one"), run.path, "--split", "dev")
    )


# -- the command


class Mixture(nn.Module):
    """A model whose probabilities are the means of the probabilities of several models."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, idx: Tensor) -> Tensor:
        probabilities = [model(idx).double().softmax(-1) for model in self.models]
        return torch.stack(probabilities).mean(0).log()


def test_the_score_is_that_of_a_model_with_the_mean_of_the_probabilities(made: Made) -> None:
    cfg = made.configs["one"]
    data = prepare(cfg, load_corpus(cfg))
    models: list[nn.Module] = [load_model(made.run(name))[0] for name in ("one", "averaged")]
    size = {"chars": data.chars["dev"], "nbytes": data.bytes["dev"], "block_size": cfg.block_size}
    mixture = scoring.evaluate(Mixture(models), data.splits["dev"], **size, geometry=cfg.geometry)
    result = invoke(made, made.id("one"), made.id("averaged"), "--split", "dev", "--json")
    together = json.loads(result.stdout)["ensemble"]
    assert together["full"] == pytest.approx(mixture.full, rel=1e-6)
    assert together["official"] == pytest.approx(mixture.official, rel=1e-6)
    assert together["coverage"] == mixture.coverage


def test_the_result_as_json(made: Made) -> None:
    result = json.loads(invoke(made, *map(made.id, THREE), "--json").stdout)
    assert result["split"] == "val"
    assert [row["run"] for row in result["runs"]] == [made.id(name) for name in THREE]
    assert [row["seed"] for row in result["runs"]] == [TrainConfig().seed, 2, 3]
    singles = [made.summaries[name]["scores"]["val"]["last"]["full"] for name in THREE]
    assert [row["full"] for row in result["runs"]] == pytest.approx(singles, rel=1e-9)
    assert result["curve"][0] == pytest.approx(singles[0], rel=1e-9)
    assert result["curve"][2] == result["ensemble"]["full"] != result["curve"][1]
    assert result["mean_full"] == pytest.approx(sum(singles) / 3, rel=1e-9)
    assert (
        result["gain"] == pytest.approx(result["mean_full"] - result["ensemble"]["full"])
        and result["gain"] > 0
    )
    for name in ("params", "flops", "seconds"):
        costs = [made.summaries[run][name] for run in THREE]
        assert result["ensemble"][name] == pytest.approx(sum(costs)), name
    assert [row["presentations_per_epoch"] for row in result["runs"]] == [1, 1, 2], "R-Drop has two passes"
    assert result["ensemble"]["presentations_per_epoch"] == 4
    assert [row["members"] for row in result["runs"]] == [1, 1, 1] and result["ensemble"]["members"] == 3
    assert {row["machine"] for row in result["runs"]} == {costs_of.machine(made.summaries["one"])}
    assert result["ensemble"]["forward_flops"] == sum(row["forward_flops"] for row in result["runs"])
    assert result["ensemble"]["official"] is None, "the runs have different geometries"


def test_the_result_as_a_table(made: Made) -> None:
    text = invoke(made, *map(made.id, THREE)).stdout
    result = json.loads(invoke(made, *map(made.id, THREE), "--json").stdout)
    for row in result["runs"]:
        (line,) = (line for line in text.splitlines() if line.startswith(f" {row['run']} "))
        assert f"{row['full']:.4f}" in line and f"{row['official']:.4f} (" in line
    (line,) = (line for line in text.splitlines() if line.startswith(" all 3 runs "))
    assert f"{result['ensemble']['full']:.4f}" in line and "%" not in line
    assert line.split()[-1] == "A" and f"machine A: {result['runs'][0]['machine']}" in text
    assert "members" in text.partition(result["runs"][0]["run"])[0]
    curve = ", ".join(f"{count}: {value:.4f}" for count, value in enumerate(result["curve"], 1))
    assert f"full of the first runs: {curve}" in text
    assert f"the gain is {result['gain']:.4f}" in text
    assert "different official geometries" in text and "so it is not comparable" in text
    assert f"(*) {made.id('one')}: 12 of 12 steps were copied from the store" in text
    two = invoke(made, made.id("one"), made.id("averaged")).stdout
    assert "full of the first runs" not in two and "different official geometries" not in two


def test_members_and_machines_are_counted(made: Made, copied: Callable[[str], RunDir]) -> None:
    run = copied("averaged")
    summary = run.summary() or {}
    summary["presentations"]["ensemble_members"] = 4
    summary["machine_classes"] = [{"device": "another"}]
    write_json(run.path / "summary.json", summary)
    result = json.loads(invoke(made, made.id("one"), run.path, "--json").stdout)
    assert [row["members"] for row in result["runs"]] == [1, 4] and result["ensemble"]["members"] == 5
    text = invoke(made, made.id("one"), run.path).stdout
    (line,) = (line for line in text.splitlines() if line.startswith(" all 2 runs "))
    assert line.rstrip().endswith("A, B") and "machine B: another" in text


def test_a_failed_guard_is_shown(made: Made, copied: Callable[[str], RunDir]) -> None:
    run = copied("averaged")
    summary = run.summary() or {}
    summary["guards"][0]["status"] = "fail"
    write_json(run.path / "summary.json", summary)
    text = invoke(made, made.id("one"), run.path).stdout
    assert f"{run.path.name}: failed guards: {summary['guards'][0]['name']}" in text


def test_runs_that_cannot_be_combined_are_refused(made: Made, copied: Callable[[str], RunDir]) -> None:
    one = made.id("one")
    averaged = made.id("averaged")
    assert "got 1 run, but an ensemble has at least two" in refusal(invoke(made, one))
    assert "Missing argument 'RUN...'" in refusal(invoke(made))
    assert f"run {one} is given more than once" in refusal(invoke(made, one, averaged, made.out / one))
    assert "got --split 'train'; use val or dev" in refusal(invoke(made, one, averaged, "--split", "train"))
    assert "no run 'nothing'" in refusal(invoke(made, one, "nothing"))
    assert "have the same weights; give only one of them" in refusal(invoke(made, one, copied("one").path))
    text = refusal(invoke(made, one, made.id("without")))
    assert f"run {made.id('without')} has no {FILE}" in text and "--set token_scores=true" in text
    gone = copied("averaged")
    (gone.path / FILE).unlink()
    assert f"{gone.path / FILE} was deleted after the run" in refusal(invoke(made, one, gone.path))
    (gone.path / "summary.json").unlink()
    assert "is not finished (done)" in refusal(invoke(made, one, gone.path))


def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda summary: summary.update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            change(fingerprints={"corpus": "c" * 64, "val": "v" * 64}),
            ["corpus fingerprint ", "val fingerprint "],
        ),
        (change(tokenizer="t" * 64), ["tokenizer ", "against tttttttttttt"]),
        (change(start={"source": "hf:x", "digest": "d"}), ["started from random weights, but ", "from hf:x"]),
    ],
)
def test_runs_on_different_data_are_refused(
    made: Made, copied: Callable[[str], RunDir], change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    run = copied("averaged")
    summary = run.summary() or {}
    change(summary)
    write_json(run.path / "summary.json", summary)
    text = refusal(invoke(made, made.id("one"), run.path))
    assert all(word in text for word in words), text


def test_runs_on_different_tokens_are_refused(made: Made, copied: Callable[[str], RunDir]) -> None:
    """Runs of the same data and tokenizer have the same tokens, unless a version encodes them differently."""
    run = copied("averaged")
    cfg = made.configs["averaged"]
    splits = token_scores.read(run)
    other = {}
    for split, scores in splits.items():
        other[split] = token_scores.TokenScores("e" * 64, scores.chars, scores.full, scores.official)
    token_scores.write(open_run(run.path.parent, cfg), cfg.digest, other)
    text = refusal(invoke(made, made.id("one"), run.path))
    assert "against eeeeeeeeeeee; combine runs of the same corpus" in text
    assert "fingerprint" not in text
