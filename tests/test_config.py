"""Test the round trips, refusals and presets of configs, and the plan that follows from a config."""

import contextlib
import itertools
import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan import recipes
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.recipes import load, parse_set, preset_names

SCHEMA = TrainConfig.model_json_schema()["properties"]
FIELDS = [f for f in TrainConfig.model_fields if f != "preset"]

# For each field, this table has a value that differs from the default and needs no change of other fields.
OTHER: dict[str, Any] = {
    "seed": 7, "device": "cpu", "dtype": "bfloat16", "threads": 2, "compile": "on", "attention": "sdpa",
    "corpus": "hn", "num_titles": 5000, "shuffle": False,
    "val_frac": 0.2, "dev_frac": 0.05, "tokenizer": "unigram", "tokenizer_fit": "train+val",
    "case": "marked", "vocab_size": 8000, "block_size": 64, "members": 2,
    "batch_size": 32, "grad_accum": 2, "epochs": 3, "order": "shuffle_titles", "n_layer": 4, "n_head": 4,
    "n_kv_head": 2, "d_model": 256,
    "d_ff": 1024, "norm": "rmsnorm", "position": "rope", "rope_theta": 500.0, "mlp": "swiglu", "bias": False,
    "qkv_bias": True,
    "qk_norm": True, "attn_gate": True, "layer_scale": 0.1, "value_residual": True, "title_mask": True,
    "value_shortcut": True, "x0_shortcut": True, "unet": True,
    "tie_head": False,
    "softcap": 15.0, "init": "kaiming", "init_std": 0.01, "init_depth_scaled": True,
    "max_steps": 40,
    "head_dim": 32, "experts": 8, "top_k": 3, "router_weights": "softmax", "attn_lora_rank": 8,
    "embed_lora_rank": 8, "lora_alpha": 8.0,
    "frozen": [0], "unused_ids": 10, "optimizer": "muon", "lr": 0.01, "lr_aux": 0.001, "momentum": 0.9,
    "beta1": 0.8, "beta2": 0.95, "eps": 1e-9, "weight_decay": 0.1, "weight_decay_aux": 0.05,
    "wd_schedule": "linear", "clip": 0.5,
    "schedule": "wsd",
    "warmup_frac": 0.1, "warmup_iters": 7,
    "decay_frac": 0.5, "decay_shape": "sqrt", "min_lr_frac": 0.1, "dropout": 0.1, "attn_dropout": 0.2,
    "resid_dropout": 0.2, "stochastic_depth": 0.2, "label_smoothing": 0.1, "ema": 0.99, "swa": 0.3,
    "ngram": 5, "ngram_weight": 0.2,
    "eval_per_epoch": 5,
    "eval_interval": 20,
    "official_geometry": "8x64",
    "log_every": 10, "grad_norm_steps": 3, "checkpoint_every": 50, "token_scores": True,
    "growth": {"ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]},
    "block_pattern": "DSM", "capacity": 0.25, "gate": "straight", "route": "student", "prior_factor": 0.125,
    "sharpness": 0.5, "sharpness_end": 3.0, "prior_loss": 0.1, "student_loss": 0.02, "router_loss": 0.02,
    "router_z_loss": 0.001, "lr_router": 0.01, "lr_prior": 0.02, "lr_student": 0.03,
    "mlp_lora_rank": 8, "documents": True, "shard": True, "start": "run:runs/base",
}  # fmt: skip
NEEDS = {  # fields that need another field
    "rdrop": {"rdrop": 0.5, "dropout": 0.1},
    "rope_share": {"rope_share": 0.5, "position": "rope"},
    "key_shift": {"key_shift": True, "rope_share": 0.5, "position": "rope"},
    "cautious_decay": {"cautious_decay": True, "optimizer": "adamw"},
    "documents": {"documents": True, "corpus": "file:texts.jsonl"},
    "lr_lora": {"lr_lora": 0.04, "mlp_lora_rank": 8},
    "base_frozen": {"base_frozen": True, "attn_lora_rank": 8},
}


def default(**changes: Any) -> TrainConfig:
    return from_dict(changes)


def values(field: str) -> st.SearchStrategy[Any]:
    """Generate values within the bounds of a field."""
    if field == "block_pattern":
        return st.sampled_from(["D", "DM", "DS", "DT", "DSTM"])
    if field == "start":
        return st.sampled_from(["", "run:runs/base"])
    if field == "tokenizer":
        return st.sampled_from(["bpe", "unigram"])
    kinds = SCHEMA[field].get("anyOf", [SCHEMA[field]])
    return st.one_of([_values(kind) for kind in kinds])


def ops() -> st.SearchStrategy[dict[str, Any]]:
    fracs = st.floats(0, 1, exclude_min=True, exclude_max=True).map(lambda f: {"budget_frac": f})
    trigger = st.one_of(fracs, st.integers(1, 10**6).map(lambda s: {"step": s}))
    kinds = [
        ("set_lr", st.floats(1e-6, 1)),
        ("set_dropout", st.floats(0, 0.9)),
        ("set_weight_decay", st.floats(0, 10)),
    ]
    return st.one_of(
        [
            st.fixed_dictionaries({"name": st.just(name), "value": value, "trigger": trigger})
            for name, value in kinds
        ]
    )


def _values(kind: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind.get("type") == "array":
        return st.lists(st.integers(0, 5), max_size=3, unique=True).map(sorted)
    if kind.get("type") == "object":
        return st.lists(ops(), max_size=3).map(lambda entries: {"ops": entries})
    if "enum" in kind:
        return st.sampled_from(kind["enum"])
    if kind["type"] == "null":
        return st.none()
    if kind["type"] == "boolean":
        return st.booleans()
    if kind["type"] == "integer":
        low, high = kind["minimum"], kind.get("maximum", kind.get("exclusiveMaximum", 1) - 1)
        return st.integers(low, high)
    assert kind["type"] == "number", kind
    return st.floats(
        kind.get("minimum", kind.get("exclusiveMinimum")),
        kind.get("maximum", kind.get("exclusiveMaximum")),
        exclude_min="exclusiveMinimum" in kind,
        exclude_max="exclusiveMaximum" in kind,
    )


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """Generate allowed configs.

    Only a few fields differ from their defaults, because otherwise the sizes would rarely fit together.
    """
    names = draw(
        st.lists(
            st.sampled_from([f for f in FIELDS if f not in ("corpus", "official_geometry")]),
            unique=True,
            max_size=8,
        )
    )
    try:
        return from_dict({name: draw(values(name)) for name in names})
    except ConfigError:
        assume(False)
        raise


# -- the fields


def test_every_field_has_a_class_a_description_and_bounds() -> None:
    for name in TrainConfig.model_fields:
        assert TrainConfig.class_of(name) in ("static", "scheduled", "inert"), name
        assert len(TrainConfig.model_fields[name].description or "") > 3, name
        for kind in SCHEMA[name].get("anyOf", [SCHEMA[name]]):
            if kind.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & kind.keys(), name
                assert {"maximum", "exclusiveMaximum"} & kind.keys(), name


def test_exactly_the_inputs_of_a_step_are_scheduled() -> None:
    """Lineage keys contain the inputs of each step, so every scheduled field must affect these inputs."""
    inputs = set(StepInputs._fields) - {"average"}
    assert {f for f in inputs if TrainConfig.class_of(f) != "scheduled"} == set()
    shapes = {
        "epochs",
        "max_steps",
        "wd_schedule",
        "schedule",
        "warmup_frac",
        "decay_frac",
        "decay_shape",
        "min_lr_frac",
        "sharpness_end",
        "ema",
        "swa",
        "growth",
        "warmup_iters",
    }
    scores = {"ngram", "ngram_weight"}  # change no step, but the scores that searches compare
    assert {f for f in FIELDS if TrainConfig.class_of(f) == "scheduled"} == inputs | shapes | scores


@pytest.mark.parametrize(
    "field",
    sorted(
        name
        for name in FIELDS
        if TrainConfig.class_of(name) == "scheduled" and not name.startswith("ngram")  # changes only scores
    ),
)
def test_a_scheduled_field_changes_a_resolved_step(field: str) -> None:
    base: dict[str, Any] = {"weight_decay": 0.1, "dropout": 0.1, "schedule": "wsd", "block_pattern": "DSM"}
    if field == "schedule":
        changed = base | {"schedule": "cosine"}
    elif field in base:
        changed = base | {field: 0.2}
    else:
        changed = base | NEEDS.get(field, {field: OTHER.get(field)})
    before, after = (Plan(default(**c), 200_000) for c in (base, changed))
    assert [before.at(s) for s in range(before.steps)] != [after.at(s) for s in range(after.steps)]


def test_other_values_exist_for_every_field() -> None:
    assert set(OTHER) | set(NEEDS) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_the_digest_changes_with_every_field(field: str) -> None:
    changes = NEEDS.get(field, {field: OTHER.get(field)})
    without = {k: v for k, v in changes.items() if k != field}
    assert default(**changes).digest != default(**without).digest


def test_the_digest_ignores_the_preset_name_but_the_run_id_contains_it() -> None:
    one, two = default(preset="one"), default(preset="ladder:step")
    assert one.digest == two.digest
    assert one.run_id == f"one-{one.digest[:8]}"
    assert two.run_id == f"ladder-step-{one.digest[:8]}"


@given(configs())
def test_a_config_survives_a_round_trip_through_its_dict(cfg: TrainConfig) -> None:
    back = from_dict(json.loads(json.dumps(cfg.model_dump())))
    assert back == cfg
    assert back.digest == cfg.digest


@given(configs(), st.sampled_from(FIELDS))
def test_the_value_of_any_field_can_be_passed_to_set(cfg: TrainConfig, field: str) -> None:
    """Writing the value of a field as TOML and reading it with --set gives the same value."""
    value = getattr(cfg, field)
    if isinstance(value, tuple):
        value = list(value)
    text = "none" if value is None else str(value)
    if isinstance(value, bool):
        text = text.lower()
    key, back = parse_set(f"{field}={text}")
    assert key == field
    if field == "growth":
        back = from_dict({"growth": back}).growth
    assert back == value if value != "" else back == ""


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        default().lr = 1.0  # type: ignore[misc]


# -- refusals


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_outside_the_bounds_is_refused_by_name(field: str) -> None:
    for kind in SCHEMA[field].get("anyOf", [SCHEMA[field]]):
        bad: list[Any] = [["a list"]]
        if "enum" in kind:
            bad.append("nonsense")
        if kind.get("type") in ("integer", "number"):
            step = 1 if kind["type"] == "integer" else 1e-6
            bad += [kind["minimum"] - step] if "minimum" in kind else []
            bad += [kind["exclusiveMinimum"]] if "exclusiveMinimum" in kind else []
            bad += [kind["maximum"] + 1] if "maximum" in kind else []
            bad += [kind["exclusiveMaximum"]] if "exclusiveMaximum" in kind else []
            bad += [math.nan, math.inf, "three", True]
        if kind.get("type") == "boolean":
            bad += [1, "yes"]
        for value in bad:
            with pytest.raises(ConfigError) as e:
                default(**{field: value})
            assert field in str(e.value)
            assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_head": 7}, ["n_head=7", "d_model=512", "set n_head to one of [2, 4, 8]"]),
        ({"n_kv_head": 3}, ["n_kv_head=3", "n_head=8", "divisor"]),
        ({"position": "rope", "d_model": 24, "n_head": 8}, ["rope", "even", "3"]),
        ({"position": "rope", "head_dim": 33}, ["rope", "even", "head_dim = 33"]),
        ({"experts": 4, "top_k": 5}, ["top_k=5", "experts=4", "lower top_k"]),
        ({"frozen": [6]}, ["frozen=[6]", "n_layer=6", "0..5"]),
        ({"frozen": [1, 0]}, ["frozen=[1, 0]", "in ascending order"]),
        ({"grad_accum": 3}, ["grad_accum=3", "batch_size=64", "divisor"]),
        ({"ema": 0.9, "swa": 0.5}, ["ema=0.9", "swa=0.5", "0"]),
        ({"rdrop": 1.0}, ["rdrop=1.0", "dropout > 0"]),
        (
            {"schedule": "wsd", "warmup_frac": 0.6, "decay_frac": 0.5},
            ["warmup_frac=0.6", "decay_frac=0.5", "at most 1"],
        ),
        ({"official_geometry": "64"}, ["official_geometry='64'", "ROWSxTOKENS"]),
        ({"official_geometry": "0x128"}, ["official_geometry"]),
        ({"official_geometry": "8x129"}, ["official_geometry", "block_size=128"]),
        ({"official_geometry": "-1x8"}, ["official_geometry"]),
        ({"capacity": 0}, ["capacity=0", "greater than 0"]),
        ({"capacity": 1.01}, ["capacity=1.01", "less than or equal to 1"]),
        ({"student_loss": -0.5}, ["student_loss=-0.5", "greater than or equal to 0"]),
        ({"router_z_loss": -1}, ["router_z_loss=-1", "greater than or equal to 0"]),
        ({"sharpness": 0}, ["sharpness=0", "greater than 0"]),
        ({"gate": "hard"}, ["gate='hard'", "'soft'", "'straight'"]),
        ({"route": "topk"}, ["route='topk'", "'auto'", "'own'", "'student'"]),
        ({"corpus": "wiki"}, ["corpus='wiki'", "synthetic"]),
        ({"corpus": "file:"}, ["corpus='file:'", "file:PATH"]),
        ({"corpus": "mix"}, ["corpus='mix'", "mix:PATH.toml"]),
    ],
)
def test_conflicting_fields_are_refused_with_a_fix(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        default(**changes)
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("field", FIELDS)
def test_a_misspelt_field_is_refused_with_a_suggestion(field: str) -> None:
    wrong = field + "q"
    with pytest.raises(ConfigError) as e:
        default(**{wrong: 1})
    assert repr(wrong) in str(e.value)
    assert "did you mean" in str(e.value)


def test_all_wrong_fields_are_reported_together() -> None:
    with pytest.raises(ConfigError) as e:
        default(lr=-1.0, n_layer=0, nonsense=3)
    assert all(word in str(e.value) for word in ("lr=-1.0", "n_layer=0", "'nonsense'"))


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        st.one_of(st.integers(), st.floats(), st.text("abx01.-", max_size=5), st.none(), st.booleans()),
        max_size=3,
    )
)
@example({"batch_size": 0})
def test_bad_fields_raise_only_config_errors(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        default(**fields)


# -- --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=0.01", ("lr", 0.01)),
        ("lr=1e-3", ("lr", 1e-3)),
        (" batch_size = 8 ", ("batch_size", 8)),
        ("vocab_size=16_000", ("vocab_size", 16_000)),
        ("bias=false", ("bias", False)),
        ("qkv_bias=none", ("qkv_bias", None)),
        ("mlp=swiglu", ("mlp", "swiglu")),
        ('mlp="swiglu"', ("mlp", "swiglu")),
        ("corpus=file:a=b.txt#title", ("corpus", "file:a=b.txt#title")),
        ("corpus=hn-2025", ("corpus", "hn-2025")),
        ("official_geometry=", ("official_geometry", "")),
        ("official_geometry=8x64", ("official_geometry", "8x64")),
    ],
)
def test_set_reads_a_value_as_toml_or_else_as_text(text: str, value: tuple[str, Any]) -> None:
    assert parse_set(text) == value


@pytest.mark.parametrize("text", ["lr", "=3", "", "  ", "lr 0.1"])
def test_set_without_a_key_or_a_value_shows_the_correct_form(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_set(text)


@given(st.text(alphabet=string.printable, max_size=20))
def test_set_never_raises_another_error(text: str) -> None:
    try:
        key, _ = parse_set(text)
        assert key
    except ConfigError:
        pass


def test_an_integer_is_allowed_for_a_float_field() -> None:
    assert load("baseline", ["clip=1", "dropout=0"])[0].clip == 1.0


def test_the_last_set_wins_and_overrides_the_preset() -> None:
    (cfg,) = load("baseline", ["lr=1.0", "n_layer=2", "lr=0.5"])
    assert (cfg.lr, cfg.n_layer, cfg.preset) == (0.5, 2, "baseline")


# -- presets and ladders


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_preset_loads_and_has_a_description() -> None:
    import tomllib

    assert "baseline" in preset_names()
    for name in preset_names():
        assert (
            len(tomllib.loads((recipes.PRESETS / f"{name}.toml").read_text(encoding="utf-8"))["about"]) > 10
        )
        configs = load(name)
        assert len({c.run_id for c in configs}) == len(configs)
        assert all(c.preset.partition(":")[0] == name for c in configs)


def test_the_baseline_has_the_public_values() -> None:
    (cfg,) = load("baseline")
    facts = {
        "seed": 1337, "epochs": 7, "val_frac": 0.1, "num_titles": 100_000, "vocab_size": 16_000,
        "tokenizer": "bpe", "block_size": 128,
        "batch_size": 64, "n_layer": 6, "n_head": 8, "d_model": 512, "dropout": 0.1, "norm": "layernorm",
        "mlp": "gelu", "bias": True,
        "position": "learned", "tie_head": True, "optimizer": "sgd", "lr": 6e-3, "weight_decay": 0.0,
        "schedule": "cosine", "clip": 1.0,
        "tokenizer_fit": "train+val", "order": "sequential", "eval_per_epoch": 3, "warmup_frac": 0.0,
        "min_lr_frac": 0.0, "dev_frac": 0.0,
    }  # fmt: skip
    assert {k: getattr(cfg, k) for k in facts} == facts
    for train_tokens, per_epoch, steps in (
        (1_102_455, 134, 938),
        (228_354, 27, 189),
    ):  # the two reference runs of the specification
        plan = Plan(cfg, train_tokens)
        assert (plan.steps_per_epoch, plan.steps) == (per_epoch, steps)
    assert sorted(Plan(cfg, 228_354).eval_steps)[:4] == [1, 9, 18, 27]
    assert 189 in Plan(cfg, 228_354).eval_steps


LADDER = """
about = "three steps"
lr = 0.5
[scale]
n_layer = 1
[[steps]]
name = "a"
about = "the first"
[[steps]]
name = "b"
lr = 0.25
n_layer = 9
[[steps]]
name = "c"
dropout = 0.5
"""


def test_each_step_of_a_ladder_builds_on_the_step_before_it(tmp_path: Path) -> None:
    path = write(tmp_path, "ladder", LADDER)
    ladder = load(path, ["d_model=64"])
    assert [c.preset for c in ladder] == ["ladder:a", "ladder:b", "ladder:c"]
    assert [(c.lr, c.dropout) for c in ladder] == [(0.5, 0.0), (0.25, 0.0), (0.25, 0.5)]
    assert {c.n_layer for c in ladder} == {1}  # scale overrides every step
    assert {c.d_model for c in ladder} == {64}  # and --set overrides even `scale`
    assert load(f"{path}:b")[0] == load(path)[1]


def test_a_preset_overrides_the_fields_of_its_base(tmp_path: Path) -> None:
    write_to = write(tmp_path, "child", 'base = "baseline"\nlr = 0.5\n')
    (child,), (base,) = load(write_to), load("baseline")
    assert child.model_dump(exclude={"lr", "preset"}) == base.model_dump(exclude={"lr", "preset"})
    assert child.lr == 0.5
    ladder = write(tmp_path, "ladder", LADDER)
    (step,) = load(write(tmp_path, "onestep", f'base = "{ladder}:b"\nseed = 1\n'))
    assert (step.preset, step.lr, step.seed) == ("onestep", 0.25, 1)
    (first, second) = load(
        write(
            tmp_path,
            "pair",
            f'[[steps]]\nname = "x"\nbase = "baseline"\n[[steps]]\nname = "y"\nbase = "{ladder}:c"\n',
        )
    )
    # A ladder step that names a base starts from this base instead of the previous step.
    assert (first.lr, second.lr) == (6e-3, 0.25)


@pytest.mark.parametrize(
    ("text", "preset", "words"),
    [
        ("lr = ", "{}", ["not valid TOML"]),
        ("lr = 0.1", "{}:step", ["has no steps"]),
        (LADDER, "{}:d", ["no step 'd'", "a, b, c"]),
        ('base = "baselin"', "{}", ["unknown preset 'baselin'", "did you mean 'baseline'?"]),
        ('base = "{self}"', "{}", ["its own base", "remove"]),
        ('base = "nowhere.toml"', "{}", ["nowhere.toml", "does not exist"]),
        ("nonsense = 1", "{}", ["unknown field 'nonsense'"]),
        ("n_head = 7", "{}", ["n_head=7"]),
    ],
)
def test_an_unusable_preset_file_is_refused_with_the_reason(
    tmp_path: Path, text: str, preset: str, words: list[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("{self}", str(path)), encoding="utf-8")
    with pytest.raises(ConfigError) as e:
        load(preset.format(path))
    assert all(word in str(e.value) for word in words), str(e.value)


def test_presets_that_are_bases_of_each_other_are_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'base = "{b}"')
    b.write_text(f'base = "{a}"')
    with pytest.raises(ConfigError, match="own base"):
        load(str(a))


def test_a_base_must_name_one_step_of_a_ladder(tmp_path: Path) -> None:
    ladder = write(tmp_path, "ladder", LADDER)
    with pytest.raises(ConfigError, match="is a ladder; name one of its steps"):
        load(write(tmp_path, "child", f'base = "{ladder}"'))


@pytest.mark.parametrize("got", ["basline", "Baseline", "baseline2"])
def test_an_unknown_preset_is_refused_with_a_suggestion(got: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'baseline'"):
        load(got)


@pytest.mark.parametrize("got", ["", "../presets/baseline", "/", "no/such.toml", ":", "baseline:x"])
def test_a_path_is_not_a_preset_name(got: str) -> None:
    with pytest.raises(ConfigError):
        load(got)


# -- derived values


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 2048),
        ({"mlp": "relu2"}, 2048),
        ({"mlp": "swiglu"}, 1408),
        ({"mlp": "swiglu", "d_model": 384}, 1024),
        ({"d_ff": 100, "mlp": "swiglu"}, 100),
    ],
)
def test_the_width_of_the_mlp(changes: dict[str, Any], width: int) -> None:
    assert default(**changes).ff_width == width


def test_unset_fields_take_their_value_from_other_fields() -> None:
    cfg = default(dropout=0.3, resid_dropout=0.1)
    assert cfg.dropouts == (0.3, 0.3, 0.1)
    assert (cfg.kv_heads, default(n_kv_head=2).kv_heads, cfg.head_width, default(head_dim=32).head_width) == (
        8,
        2,
        64,
        32,
    )
    assert cfg.geometry == (64, 128)
    assert default(official_geometry="8x64").geometry == (8, 64)


# -- the plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Generate plans of short runs with all kinds of schedules."""
    fields = {
        name: draw(values(name))
        for name in ("schedule", "decay_shape", "warmup_frac", "decay_frac", "min_lr_frac", "wd_schedule")
    }
    fields |= {"epochs": draw(st.integers(1, 7)), "weight_decay": 0.1, "batch_size": 2, "block_size": 4}
    fields |= draw(st.sampled_from([{}, {"ema": 0.9}, {"swa": 0.4}]))
    fields |= {"eval_per_epoch": draw(st.integers(0, 50))}
    try:
        return Plan(from_dict(fields), draw(st.integers(9, 150)))
    except ConfigError:
        assume(False)
        raise


@given(plans())
def test_the_learning_rate_stays_between_zero_and_its_peak(plan: Plan) -> None:
    factors = [plan.lr_factor(s) for s in range(plan.steps)]
    assert all(0 <= f <= 1 for f in factors)
    warm, flat = factors[: plan.warmup_steps], factors[plan.warmup_steps : plan.decay_start]
    assert all(a < b for a, b in itertools.pairwise(warm))
    assert not warm or (warm[0] > 0 and warm[-1] == 1)
    assert all(f == 1 for f in flat)
    after = factors[plan.warmup_steps :]
    assert all(a >= b for a, b in itertools.pairwise(after))
    low = plan.cfg.min_lr_frac
    assert all(f >= low - 1e-12 for f in after)
    # The learning rate would reach its final value exactly one step after the end of the run.
    if plan.cfg.schedule != "constant" and plan.decay_start < plan.steps:
        assert factors[plan.decay_start] == 1
        assert math.isclose(plan.lr_factor(plan.steps), low, abs_tol=1e-12)


@given(plans())
def test_every_resolved_step_is_within_its_bounds(plan: Plan) -> None:
    decays = []
    for s in range(plan.steps):
        inputs = plan.at(s)
        assert inputs.lr == plan.cfg.lr * plan.lr_factor(s)
        assert inputs.lr_aux == inputs.lr
        assert 0 <= inputs.weight_decay <= plan.cfg.weight_decay
        assert 0 < inputs.average <= 1
        decays.append(inputs.weight_decay)
    assert all(a >= b for a, b in itertools.pairwise(decays))


@given(plans())
def test_evaluations_are_at_both_ends_and_as_frequent_as_configured(plan: Plan) -> None:
    steps = sorted(plan.eval_steps)
    assert steps[0] == 1
    assert steps[-1] == plan.steps
    assert all(1 <= s <= plan.steps for s in steps)
    per_epoch, length = plan.cfg.eval_per_epoch, plan.steps_per_epoch
    if not per_epoch:
        assert set(steps) == {1, plan.steps}
    elif length % per_epoch == 0:
        assert len(set(steps) - {1}) >= plan.cfg.epochs * per_epoch - 1
    assert plan.table()["evaluations"] == len(steps)


@pytest.mark.parametrize(
    ("shape", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("quarter", 0.0)]
)
def test_the_shapes_of_the_weight_decay(shape: str, half: float) -> None:
    fields = {"weight_decay": 0.1, "batch_size": 2, "block_size": 4, "epochs": 1}
    if shape == "quarter":  # linear and cosine differ after a quarter of the run
        linear, cosine = (
            Plan(default(wd_schedule=s, **fields), 8 * 40).at(10).weight_decay for s in ("linear", "cosine")
        )
        assert linear == pytest.approx(0.075) and cosine == pytest.approx(
            0.1 * (1 + math.cos(math.pi / 4)) / 2
        )
    else:
        plan = Plan(default(wd_schedule=shape, **fields), 8 * 40)
        assert plan.at(20).weight_decay == pytest.approx(0.1 * half)


def test_the_decay_does_not_begin_before_the_warm_up_ends() -> None:
    """If rounding makes the warm-up and the decay overlap, the decay becomes shorter."""
    plan = Plan(
        default(schedule="wsd", warmup_frac=0.3, decay_frac=0.7, batch_size=2, block_size=4, epochs=1), 8 * 5
    )
    assert (plan.steps, plan.warmup_steps, plan.decay_start) == (5, 2, 2)
    assert [plan.lr_factor(s) for s in range(5)] == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("where", ["set", "file", "step", "scale"])
def test_the_field_preset_cannot_be_set(tmp_path: Path, where: str) -> None:
    text = {
        "file": "preset = 'x'",
        "step": "[[steps]]\npreset = 'x'",
        "scale": "[scale]\npreset = 'x'",
        "set": "",
    }[where]
    (tmp_path / "mine.toml").write_text(text + "\n")
    with pytest.raises(ConfigError, match="preset"):
        load(str(tmp_path / "mine.toml"), ["preset=x"] if where == "set" else [])


@pytest.mark.parametrize(
    ("field", "suggestion"),
    [
        ("LR", "'lr'"),
        ("learning_rate", "'lr'"),
        ("vocabsize", "'vocab_size'"),
        ("n_heads", "'n_head'"),
        ("growth", None),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(field: str, suggestion: str | None) -> None:
    with pytest.raises(ConfigError) as e:
        load("baseline", [f"{field}=1"])
    assert ("did you mean" in str(e.value)) == bool(suggestion) and (suggestion or "") in str(e.value)


def test_a_width_without_a_fitting_number_of_heads_is_refused_with_another_width() -> None:
    with pytest.raises(ConfigError, match="set d_model=64"):
        load("baseline", ["d_model=63", "n_head=2"])


def test_swa_averages_the_last_steps_evenly() -> None:
    plan = Plan(default(swa=0.5, batch_size=2, block_size=4, epochs=1), 81)
    assert (plan.steps, plan.swa_start) == (10, 5)
    assert [plan.average(s) for s in range(10)] == [1, 1, 1, 1, 1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    mean = 0.0
    for s in range(10):  # a running mean of the step numbers 5..9
        mean += (s - mean) * plan.average(s)
    assert math.isclose(mean, 7)


def test_ema_follows_closely_at_first_and_later_with_its_decay() -> None:
    plan = Plan(default(ema=0.9, batch_size=2, block_size=4, epochs=7), 8 * 200 + 1)
    shares = [plan.average(s) for s in range(plan.steps)]
    assert shares[0] == 0.9
    assert shares[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(shares))


def test_lr_aux_follows_the_same_schedule_as_lr() -> None:
    plan = Plan(default(lr=1.0, lr_aux=0.5, warmup_frac=0.2), 200_000)
    for s in range(0, plan.steps, 7):
        inputs = plan.at(s)
        assert inputs.lr_aux == pytest.approx(0.5 * inputs.lr)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_the_shapes_of_the_decay(shape: str, half: float) -> None:
    plan = Plan(
        default(schedule="wsd", decay_frac=0.5, decay_shape=shape, batch_size=2, block_size=4, epochs=1),
        8 * 40,
    )
    assert (plan.steps, plan.decay_start) == (40, 20)
    assert plan.lr_factor(30) == pytest.approx(half)


def test_too_few_tokens_for_one_step_are_refused_before_step_0() -> None:
    cfg = default()
    with pytest.raises(ConfigError, match=r"8,192 tokens.*8,193"):
        Plan(cfg, 8192)
    assert Plan(cfg, 8193).steps_per_epoch == 1


def test_the_resolved_table_is_json_and_holds_integers_for_fractions() -> None:
    plan = Plan(default(warmup_frac=0.1, schedule="wsd", swa=0.2), 228_354)
    table = json.loads(json.dumps(plan.table()))
    assert table["steps"] == 189
    assert table["warmup_steps"] == 19
    assert table["decay_start"] == 151
    assert table["swa_start"] == 151
    assert table["d_ff"] == 2048
    assert table["n_kv_head"] == 8
    assert table["first_step"]["lr"] == pytest.approx(6e-3 / 19)


def test_the_tiny_config_of_the_suite_is_allowed(tiny: Any) -> None:
    assert tiny().model_dump() | TINY == tiny().model_dump()


# -- growth


def op(name: str, value: Any, **trigger: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": trigger}


def fires() -> st.SearchStrategy[dict[str, Any]]:
    """Generate triggers that usually fire within a short run."""
    fracs = st.floats(0, 1, exclude_min=True, exclude_max=True)
    return st.one_of(st.integers(1, 60).map(lambda s: {"step": s}), fracs.map(lambda f: {"budget_frac": f}))


def changes(*names: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Generate lists of ops that have the given names."""
    kinds = {
        "set_lr": st.floats(1e-6, 1),
        "set_weight_decay": st.floats(0, 10),
        "set_dropout": st.floats(0, 0.9),
        "set_batch_size": st.integers(1, 8),
        "set_grad_accum": st.integers(1, 4),
    }
    one = st.one_of(
        [
            st.fixed_dictionaries({"name": st.just(n), "value": kinds[n], "trigger": fires()})
            for n in names or kinds
        ]
    )
    return st.lists(one, min_size=1, max_size=4)


SHORT: dict[str, Any] = {
    "block_size": 4,
    "batch_size": 2,
    "epochs": 2,
    "schedule": "wsd",
    "lr": 0.5,
    "weight_decay": 0.1,
    "dropout": 0.1,
}


def planned(train_tokens: int, entries: list[dict[str, Any]], **fields: Any) -> Plan:
    """Return a short plan with these ops, or reject the example if the ops are invalid."""
    try:
        return Plan(default(**SHORT | fields, growth={"ops": entries}), train_tokens)
    except ConfigError:
        assume(False)
        raise


@given(st.integers(40, 250), changes(), st.sampled_from([0, 1, 3, 50]))
def test_a_run_with_ops_trains_exactly_its_budget(
    train_tokens: int, entries: list[dict[str, Any]], evals: int
) -> None:
    plan = planned(train_tokens, entries, eval_per_epoch=evals)
    trained = list(itertools.accumulate((plan.at(s).batch_size * 4 for s in range(plan.steps)), initial=0))
    assert [plan.tokens(done) for done in range(plan.steps + 1)] == trained
    assert plan.budget == 2 * (train_tokens // 8) * 8
    assert 0 <= plan.budget - trained[-1] < plan.segments[-1].span
    assert plan.eval_steps <= set(range(1, plan.steps + 1)) and {1, plan.steps} <= plan.eval_steps
    assert plan.breaks == sorted({*plan.breaks} & {*range(1, plan.steps)})
    assert plan.table()["steps"] == plan.steps


@given(st.integers(40, 250), changes())
def test_an_op_fires_at_its_trigger_or_with_the_op_before_it(
    train_tokens: int, entries: list[dict[str, Any]]
) -> None:
    plan = planned(train_tokens, entries)
    assert plan.segments[0][1:] == (0, 0, 0, 0, 0, None)
    for wanted, before, after in zip(entries, plan.segments, plan.segments[1:], strict=False):
        assert before.first <= after.first < plan.steps
        assert (
            after.tokens
            == before.tokens + (after.first - before.first) * before.span
            == plan.tokens(after.first)
        )
        assert getattr(after.cfg, wanted["name"].removeprefix("set_")) == wanted["value"]
        assert after.first in (0, *plan.breaks)
        if step := wanted["trigger"].get("step"):
            assert after.first == max(step, before.first)
        else:
            share = wanted["trigger"]["budget_frac"] * plan.budget
            near = abs(after.tokens - share) <= before.span / 2 + 1e-6
            assert near or (after.first == before.first and share < before.tokens)
    for step in range(plan.steps):
        cfg = plan.segment_at(step).cfg
        assert plan.at(step).lr == cfg.lr * plan.lr_factor(step)
        assert (plan.at(step).batch_size, plan.at(step).grad_accum) == (cfg.batch_size, cfg.grad_accum)


@given(
    st.integers(40, 250),
    changes("set_lr", "set_weight_decay", "set_dropout"),
    st.sampled_from(["sequential", "shuffle_titles"]),
)
def test_ops_that_keep_the_batch_size_change_no_step_positions(
    train_tokens: int, entries: list[dict[str, Any]], order: str
) -> None:
    plan, plain = (
        planned(train_tokens, entries, order=order),
        Plan(default(**SHORT | {"order": order}), train_tokens),
    )
    assert (plan.steps, plan.budget, plan.eval_steps) == (plain.steps, plain.budget, plain.eval_steps)
    assert (plan.warmup_steps, plan.decay_start, plan.checkpoint_every) == (
        plain.warmup_steps,
        plain.decay_start,
        plain.checkpoint_every,
    )
    for step in range(plan.steps):
        assert plan.tokens(step) == plain.tokens(step)
        assert plan.lr_factor(step) == plain.lr_factor(step)
        assert plan.segment_at(step).place(step, train_tokens) == plain.segment_at(step).place(
            step, train_tokens
        )


def test_ops_that_set_the_current_values_change_nothing() -> None:
    names = ("lr", "weight_decay", "dropout", "batch_size")
    same = [op(f"set_{name}", SHORT[name], step=step) for step, name in enumerate(names, start=2)]
    plan, plain = planned(200, same), planned(200, [])
    assert [plan.at(s) for s in range(plan.steps)] == [plain.at(s) for s in range(plain.steps)]


def test_a_schedule_computed_by_hand() -> None:
    """Without ops, two epochs of 400 tokens would take 100 steps of 8 tokens."""
    entries = [
        op("set_batch_size", 4, budget_frac=0.5),
        op("set_lr", 0.25, budget_frac=0.75),
        op("set_dropout", 0.0, step=3),  # this op waits for the ops before it
    ]
    plan = Plan(
        default(**SHORT | {"growth": {"ops": entries}, "schedule": "constant", "eval_per_epoch": 1}), 400
    )
    assert [(s.first, s.tokens) for s in plan.segments] == [(0, 0), (50, 400), (62, 592), (62, 592)]
    assert plan.steps == 75 and plan.tokens(75) == 800
    assert [(plan.at(s).batch_size, plan.at(s).lr, plan.at(s).dropout) for s in (49, 50, 61, 62)] == [
        (2, 0.5, 26 / 256), (4, 0.5, 26 / 256), (4, 0.5, 26 / 256), (4, 0.25, 0.0),
    ]  # fmt: skip
    assert plan.eval_steps == {1, 50, 75}  # an epoch has 50 steps at first, and 25 after the first op
    assert {50, 62} <= set(plan.breaks)
    assert (
        plan.table()["growth"]
        == "set_batch_size 4 after step 50, set_lr 0.25 after step 62, set_dropout 0 after step 62"
    )
    assert planned(400, []).table()["growth"] is None


def test_an_op_fires_within_the_budget_or_is_refused() -> None:
    for late in (
        op("set_lr", 0.1, step=100),
        op("set_lr", 0.1, step=10**9),
        op("set_batch_size", 1, step=10**6),
    ):
        with pytest.raises(ConfigError) as e:
            Plan(default(**SHORT | {"growth": {"ops": [op("set_lr", 0.2, step=5), late]}}), 400)
        words = [
            f"growth: ops[1] {late['name']!r}",
            f"after step {late['trigger']['step']}",
            "has 100 steps",
            "earlier trigger",
        ]
        assert all(word in str(e.value) for word in words), str(e.value)
    with pytest.raises(
        ConfigError, match=r"growth: ops\[0\] 'set_batch_size' .*after step 99.*has 100 steps"
    ):  # too few tokens are left for a step with the larger batch
        Plan(default(**SHORT | {"growth": {"ops": [op("set_batch_size", 4, step=99)]}}), 400)
    assert Plan(default(**SHORT | {"growth": {"ops": [op("set_batch_size", 1, step=99)]}}), 400).steps == 101


ONE = op("set_lr", 0.25, budget_frac=0.5)
TOML = '[[ops]]\nname = "set_lr"\nvalue = 0.25\ntrigger = { budget_frac = 0.5 }\n'


@pytest.mark.parametrize(
    "how", ["inline", "json text", "yaml text", "toml file", "json file", "yaml file", "yml file", "preset"]
)
def test_all_ways_to_pass_a_schedule_give_the_same_config(how: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    (tmp_path / "mine.json").write_text(json.dumps({"ops": [ONE]}))
    yaml = "ops:\n- name: set_lr\n  value: 25e-2\n  trigger: {budget_frac: 0.5}\n"
    (tmp_path / "mine.yaml").write_text(yaml)
    (tmp_path / "mine.yml").write_text(f"growth: {json.dumps({'ops': [ONE]})}")
    (tmp_path / "preset.toml").write_text(TOML.replace("[[ops]]", "[[growth.ops]]"))
    inline = '{ ops = [{ name = "set_lr", value = 0.25, trigger = { budget_frac = 0.5 } }] }'
    given_as = {"inline": inline, "json text": json.dumps({"version": 2, "ops": [ONE]})}
    given_as |= {
        "toml file": str(tmp_path / "mine.toml"),
        "json file": str(tmp_path / "mine.json"),
        "yaml text": yaml,
    }
    given_as |= {f"{kind} file": str(tmp_path / f"mine.{kind}") for kind in ("yaml", "yml")}
    (cfg,) = (
        load(str(tmp_path / "preset.toml"))
        if how == "preset"
        else load("baseline", [f"growth={given_as[how]}"])
    )
    assert cfg.growth == default(growth={"ops": [ONE]}).growth
    assert load("baseline", [f"growth={cfg.growth}"])[0].growth == cfg.growth
    assert from_dict(json.loads(json.dumps(cfg.model_dump()))) == cfg


GOOD = op("set_lr", 0.1, step=5)
# This table has a few faults of each kind. The file tests/data/growth_faults.txt has all faults.
FAULTY: list[tuple[Any, list[str]]] = [
    (3, ["growth: 3 is not a schedule", "{ ops = ["]),
    (True, ["growth: True is not a schedule", "{ ops = ["]),
    ([GOOD], ["growth: ops[0] 'set_lr'", "'trigger' is a key of version 2", "trigger_loss is missing",
        "{ version = 2, ops = [...] }"]),
    ({"opps": [GOOD]}, ["growth: unknown key 'opps'", "did you mean 'ops'",
        "allowed: version, seed, defaults, ops"]),
    ({"version": 1}, ["growth: version=1", "write version=2"]),
    ({"ops": 3}, ["growth: ops=3", "a list of { name, value, trigger }"]),
    ({"ops": [GOOD, 5]}, ["growth: ops[1]=5", "{ name, value, trigger }"]),
    ({"ops": [{**GOOD, "name": "set_lrr"}]},
        ["growth: ops[0] 'set_lrr': unknown op", "did you mean 'set_lr'", "set_grad_accum"]),
    ({"ops": [{**GOOD, "name": "deepen"}]},
        ["growth: ops[0] 'deepen': unknown op", "set_lr", "set_grad_accum"]),
    ({"ops": [{**GOOD, "name": None}]}, ["growth: ops[0]: unknown op None", "set_lr", "set_grad_accum"]),
    ({"ops": [{**GOOD, "valu": 3}]}, ["growth: ops[0] 'set_lr': unknown key 'valu'", "did you mean 'value'",
        "allowed: id, name"]),
    ({"ops": [{"name": "set_lr", "value": 0.1}]},
        ["growth: ops[0] 'set_lr': the trigger is missing", "{ step = N } or { budget_frac = F }"]),
    ({"ops": [{"name": "set_lr", "trigger": {"step": 5}}]},
        ["growth: ops[0] 'set_lr': the value is missing", "a finite number"]),
    ({"ops": [{**GOOD, "value": "0.1"}]}, ["ops[0] 'set_lr': value='0.1'", "a finite number"]),
    ({"ops": [{**GOOD, "value": True}]}, ["ops[0] 'set_lr': value=True", "a finite number"]),
    ({"ops": [{**GOOD, "value": math.nan}]}, ["ops[0] 'set_lr': value=nan", "a finite number"]),
    ({"ops": [{**GOOD, "value": None}]}, ["ops[0] 'set_lr': value=None", "a finite number"]),
    ({"ops": [{**GOOD, "value": 0.0}]}, ["ops[0] 'set_lr': lr=0", "greater than 0"]),
    ({"ops": [{**GOOD, "value": -1}]}, ["ops[0] 'set_lr': lr=-1", "greater than 0"]),
    ({"ops": [op("set_batch_size", 4.5, step=5)]}, ["ops[0] 'set_batch_size': batch_size=4.5", "integer"]),
    ({"ops": [op("set_dropout", 1.0, step=5)]}, ["ops[0] 'set_dropout': dropout=1", "less than 1"]),
    ({"ops": [op("set_weight_decay", -0.1, step=5)]}, ["ops[0] 'set_weight_decay': weight_decay=-0.1"]),
    ({"ops": [{**GOOD, "trigger": 5}]}, ["ops[0] 'set_lr': trigger=5",
        "{ step = N } or { budget_frac = F }"]),
    ({"ops": [{**GOOD, "trigger": {}}]}, ["ops[0] 'set_lr': trigger", "got none",
        "{ step = N } or { budget_frac = F }"]),
    ({"ops": [op("set_lr", 0.1, step=5, budget_frac=0.5)]},
        ["ops[0] 'set_lr': trigger", "got step and budget_frac", "{ any = ["]),
    ({"ops": [op("set_lr", 0.1, steps=5)]}, ["unknown key trigger.steps", "did you mean 'step'"]),
    ({"ops": [op("set_lr", 0.1, step=0)]}, ["trigger.step=0", "1 or more"]),
    ({"ops": [op("set_lr", 0.1, step=2.5)]}, ["trigger.step=2.5", "a whole number"]),
    ({"ops": [op("set_lr", 0.1, budget_frac=0)]}, ["trigger.budget_frac=0", "above 0 and below 1"]),
    ({"ops": [op("set_lr", 0.1, budget_frac=1)]}, ["trigger.budget_frac=1", "above 0 and below 1"]),
    ({"ops": [op("set_lr", 0.1, budget_frac=1.5)]}, ["trigger.budget_frac=1.5", "above 0 and below 1"]),
    ({"ops": [op("set_lr", 0.1, budget_frac=math.nan)]}, ["trigger.budget_frac=nan", "above 0 and below 1"]),
    ({"ops": [op("set_lr", 0.1, budget_frac="half")]}, ["trigger.budget_frac='half'", "above 0 and below 1"]),
    ({"ops": [GOOD, op("set_grad_accum", 3, step=9)]},
        ["ops[1] 'set_grad_accum': grad_accum=3", "batch_size=64", "to a divisor of batch_size"]),
    ({"ops": [op("set_grad_accum", 4, step=5), op("set_batch_size", 2, step=9)]},
        ["ops[1] 'set_batch_size'", "batch_size=2"]),
]  # fmt: skip


@pytest.mark.parametrize(("growth", "words"), FAULTY)
def test_a_faulty_schedule_is_refused_with_the_place_and_the_allowed_values(
    growth: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as e:
        default(growth=growth)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert all(line.startswith("growth: ") for line in str(e.value).splitlines()), "one fault, one line"


def test_an_op_cannot_remove_the_dropout_that_rdrop_needs() -> None:
    with pytest.raises(ConfigError) as e:
        default(rdrop=0.5, dropout=0.1, growth={"ops": [GOOD, op("set_dropout", 0.0, step=9)]})
    assert all(
        word in str(e.value)
        for word in ("growth: ops[1] 'set_dropout'", "rdrop=0.5 needs dropout", "set dropout > 0")
    )


def test_all_faults_of_a_schedule_are_reported_together() -> None:
    bad = {"ops": [{**GOOD, "name": "grow"}, op("set_lr", "x", step=0)], "steps": 3}
    with pytest.raises(ConfigError) as e:
        default(growth=bad)
    assert str(e.value).count("\n") == 3, str(e.value)
    assert all(
        word in str(e.value)
        for word in (
            "ops[0] 'grow'",
            "ops[1] 'set_lr': value='x'",
            "ops[1] 'set_lr': trigger.step=0",
            "key 'steps'",
        )
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.toml", None, ["gone.toml", "cannot be read", "No such file", "give the path"]),
        ("folder.toml", ..., ["folder.toml", "cannot be read", "give the path"]),
        ("mine.yaml", "ops: [", ["mine.yaml", "not valid YAML", "line 1", "fix the file"]),
        ("mine.yml", "[1", ["mine.yml", "not valid YAML", "fix the file"]),
        ("mine.txt", "ops: []", ["mine.txt", "not a schedule", ".yml or .toml"]),
        ("mine", "", ["not a schedule", ".yml or .toml"]),
        ("mine.toml", "[[ops]", ["mine.toml", "not valid TOML", "line 1", "fix the file"]),
        ("mine.toml", "\xff", ["mine.toml", "is not UTF-8", "save the file as UTF-8"]),
        ("mine.json", '{"ops": [', ["mine.json", "not valid JSON", "line 1", "fix the file"]),
        ("mine.json", "3", ["growth: 3 is not a schedule", "{ ops = ["]),
        ("mine.json", '{"ops": [{"name": "set_lr", "value": NaN, "trigger": {"step": 1}}]}',
            ["value=nan", "a finite number"]),
        ("mine.toml", '[[ops]]\nname = "set_lr"\nvalue = 0.1',
            ["growth: ops[0] 'set_lr': the trigger is missing"]),
    ],
)  # fmt: skip
def test_a_file_without_a_schedule_is_refused_with_its_name(
    tmp_path: Path, name: str, text: Any, words: list[str]
) -> None:
    path = tmp_path / name
    if text is ...:
        path.mkdir()
    elif text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as e:
        load("baseline", [f"growth={path}"])
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("text", ['{"ops": [', "{ ops = [", '{ ops = [{ name = "set_lr" value = 1 }] }'])
def test_a_malformed_inline_schedule_is_not_reported_as_a_file(text: str) -> None:
    with pytest.raises(ConfigError, match="neither TOML, JSON nor YAML") as e:
        load("baseline", [f"growth={text}"])
    assert (
        text in str(e.value)
        and "write { ops = [{ name, value, trigger }, ...] }" in str(e.value)
        and "fix the file" not in str(e.value)
    )
