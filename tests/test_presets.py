"""Tests that all built-in presets load, and that the ablation leads from `baseline` to `optimized`."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from mainrun.plan.cost import forward_cost, forward_flops, layer_flops, size
from mainrun.plan.recipes import load, parse_set, preset_names
from mainrun.plan.routing import INPUTS, LOSSES, STATS
from mainrun.run.session import train
from sweeps.study import read_study

DOCS = Path(__file__).parents[1] / "docs"

# With these settings, each step of the ablation trains within seconds.
DEMO = [
    "num_titles=1500",
    "vocab_size=600",
    "epochs=3",
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


def test_one_step_of_the_ladder_is_not_kept() -> None:
    ladder = {cfg.preset.partition(":")[2]: cfg for cfg in load("ablation")}
    assert list(ladder)[:3] == ["baseline", "kaiming", "size"]
    baseline = ladder["baseline"].model_dump(exclude={"preset"})
    assert ladder["kaiming"].model_dump(exclude={"preset"}) == baseline | {"init": "kaiming"}
    assert {cfg.init for name, cfg in ladder.items() if name != "kaiming"} == {"normal"}
    size = baseline | {"n_layer": 4, "n_head": 4, "d_model": 256}
    assert ladder["size"].model_dump(exclude={"preset"}) == size


@pytest.mark.parametrize(
    ("name", "letters", "scored", "training"),
    [("mod", "DMDM", 0.584, 0.584), ("sdt", "DSDS", 0.756, 0.756), ("stt", "DTDT", 0.750, 1.224)],
)
def test_the_forward_flops_of_the_routed_presets(
    name: str, letters: str, scored: float, training: float
) -> None:
    cost = forward_cost(load(name)[0])
    assert cost.letters == letters
    assert cost.scored / cost.dense == pytest.approx(scored, abs=0.0005)
    assert cost.training / cost.dense == pytest.approx(training, abs=0.0005)
    assert cost.dense == forward_cost(load("ablation:vocabulary")[0]).scored
    few = forward_cost(load(name)[0], ids=900)
    assert cost.dense - few.dense == cost.scored - few.scored == 2 * 100 * 256, "the head has fewer rows"


def test_the_forward_flops_are_the_sum_over_the_layers_and_the_head() -> None:
    for name, shares in (("mod", [0.1, 0.2]), ("sdt", [0.4, 0.6]), ("stt", [0.5, 0.1])):
        cfg = load(name)[0]
        layers = layer_flops(cfg, shares)
        assert len(layers) == 4 and layers[0] == layers[2] != layers[1] != layers[3]
        assert sum(layers) + 2 * 1000 * 256 == pytest.approx(forward_flops(cfg, shares), rel=1e-12)


def test_the_record_recipe_has_the_size_and_the_two_weight_decays_of_the_original() -> None:
    (cfg,) = load("record")
    assert size(cfg).params == pytest.approx(46e6, rel=0.01)
    assert (cfg.weight_decay, cfg.weight_decay_aux) == (0.4545, 0.01)


def test_the_ensemble_of_strong_has_the_models_of_the_single_run() -> None:
    single, ensemble, large, large_ensemble = load("strong")
    assert [cfg.members for cfg in load("strong")] == [1, 3, 1, 4]
    assert all(cfg.ngram == 7 for cfg in load("strong"))
    assert single.changed(preset="optimized", ngram=0) == load("optimized")[0]
    assert ensemble.changed(preset=single.preset, members=1) == single
    assert large_ensemble.changed(preset=large.preset, members=1) == large


def commands_of(page: str) -> list[list[str]]:
    """Return the commands in the shell blocks of a page, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def dynamic_depth() -> str:
    """Return the text of the two pages about dynamic depth."""
    return "".join((DOCS / name).read_text(encoding="utf-8") for name in ("dynamic.md", "dynamic-use.md"))


def test_the_page_about_dynamic_depth_fits_the_code() -> None:
    page = dynamic_depth()
    for name in ("mod", "sdt", "stt"):
        cost = forward_cost(load(name)[0])
        scored = f"{cost.scored / 1e6:.2f}M ({cost.scored / cost.dense:.3f})"
        training = f"{cost.training / 1e6:.2f}M ({cost.training / cost.dense:.3f})"
        capacity = f"{load(name)[0].capacity:g}"
        assert f"| `{name}` | {cost.letters} | {capacity} | {scored} | {training} |" in page
    fields = page[page.index("## Config fields") : page.index("## What to try")]
    for field in (*INPUTS, "block_pattern", "gate", "route", "prior_factor", "sharpness_end"):
        assert f"`{field}`" in fields, field
    statistics = page[page.index("| statistic |") :]
    assert all(f"`{name}`" in statistics for name in (*STATS, *LOSSES))


def test_the_commands_of_the_page_about_dynamic_depth_are_accepted() -> None:
    configs = []
    for command in commands_of(dynamic_depth()):
        sets = [value for option, value in pairwise(command) if option == "--set"]
        if command[:2] == ["mainrun", "train"]:
            preset = command[command.index("--preset") + 1].replace("$preset", "stt")
            configs += load(preset, sets)
        elif command[:2] == ["mainrun", "sweep"] and command[2] == "routing":
            configs.append(read_study("routing", dict(parse_set(text) for text in sets)).base())
    assert len(configs) == 6
    assert {cfg.letters for cfg in configs} == {"DMDM", "DTDT", "DD"}
    assert any(cfg.growth.ops for cfg in configs)


@pytest.mark.slow
def test_the_ladder_improves_the_loss_at_demo_scale(tmp_path: Path) -> None:
    summaries = [train(cfg, tmp_path) for cfg in load("ablation", DEMO)]
    assert [g for s in summaries for g in s["guards"] if g["status"] == "fail"] == []
    assert len({s["fingerprints"]["val"] for s in summaries}) == 1
    # On this small data set, the loss of the optimized recipe is only a few tenths of a nat lower.
    assert summaries[-1]["last"]["full"] < summaries[0]["last"]["full"] - 0.2
