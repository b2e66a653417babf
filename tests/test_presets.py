"""Tests that all built-in presets load, and that the ablation leads from `baseline` to `optimized`."""

from itertools import pairwise
from pathlib import Path

import pytest

from mainrun.plan.recipes import load, preset_names
from mainrun.run.session import train

# With these settings, each step of the ablation trains within seconds.
DEMO = [
    "num_titles=1500",
    "vocab_size=600",
    "epochs=2",
    "n_layer=2",
    "n_head=2",
    "d_model=64",
    "threads=1",
    "eval_per_epoch=0",
]
DEMO += ["official_geometry=1x64"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_its_run_ids_are_unique(name: str) -> None:
    ids = [cfg.run_id for cfg in load(name)]
    assert len(set(ids)) == len(ids)


def test_every_step_of_the_ladder_changes_something_between_baseline_and_optimized() -> None:
    ladder = [cfg.model_dump(exclude={"preset"}) for cfg in load("ablation")]
    assert ladder[0] == load("baseline")[0].model_dump(exclude={"preset"})
    assert ladder[-1] == load("optimized")[0].model_dump(exclude={"preset"})
    assert all(before != after for before, after in pairwise(ladder))


@pytest.mark.slow
def test_the_ladder_improves_the_loss_at_demo_scale(tmp_path: Path) -> None:
    summaries = [train(cfg, tmp_path) for cfg in load("ablation", DEMO)]
    assert [g for s in summaries for g in s["guards"] if g["status"] == "fail"] == []
    assert len({s["fingerprints"]["val"] for s in summaries}) == 1
    # On this small data set, the loss of the optimized recipe is only a few tenths of a nat lower.
    assert summaries[-1]["last"]["full"] < summaries[0]["last"]["full"] - 0.2
