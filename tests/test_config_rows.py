"""Compare every number of a config and its plan with hand-written values."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mainrun import config
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import ConfigError
from mainrun.plan import recipes
from mainrun.plan.ops import ARCHITECTURE
from mainrun.plan.plan import Decision, Plan, Segment
from mainrun.plan.recipes import load, parse_set
from mainrun.store.lineage import chain

INF = math.inf


def refusals(**fields: Any) -> str:
    """Return the error message for these fields, or an empty text if they are allowed."""
    try:
        from_dict(fields)
    except ConfigError as e:
        return str(e)
    return ""


def above(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else math.nextafter(value, INF)


def below(value: Any) -> Any:
    return value - 1 if isinstance(value, int) else math.nextafter(value, -INF)


# -- single fields

BELOW_1 = 1 - 2**-53  # the largest float below 1
ABOVE_0 = 5e-324  # the smallest float above 0
ABOVE_1 = 1 + 2**-52
NUMBERS: list[tuple[str, str, Any, Any, Any]] = [
    ("seed", "static", 1337, 0, 4_294_967_295),
    ("threads", "static", 0, 0, 1024),
    ("num_titles", "static", 100_000, 2, 100_000_000),
    ("val_frac", "static", 0.1, ABOVE_0, BELOW_1),
    ("dev_frac", "static", 0.0, 0.0, BELOW_1),
    ("vocab_size", "static", 16_000, 300, 1_000_000),
    ("block_size", "static", 128, 2, 65_536),
    ("batch_size", "scheduled", 64, 1, 65_536),
    ("grad_accum", "scheduled", 1, 1, 65_536),
    ("epochs", "scheduled", 7, 1, 10_000),
    ("max_steps", "scheduled", 0, 0, 1_000_000_000),
    ("members", "static", 1, 1, 64),
    ("n_layer", "static", 6, 1, 1024),
    ("n_head", "static", 8, 1, 1024),
    ("n_kv_head", "static", 0, 0, 1024),
    ("d_model", "static", 512, 2, 65_536),
    ("d_ff", "static", 0, 0, 1_048_576),
    ("rope_theta", "static", 10_000.0, ABOVE_1, 1e9),
    ("rope_share", "static", 1.0, ABOVE_0, 1.0),
    ("layer_scale", "static", 0.0, 0.0, 10.0),
    ("softcap", "static", 0.0, 0.0, 1000.0),
    ("init_std", "static", 0.02, ABOVE_0, 1.0),
    ("head_dim", "static", 0, 0, 65_536),
    ("experts", "static", 0, 0, 65_536),
    ("top_k", "static", 2, 1, 65_536),
    ("capacity", "scheduled", 0.5, ABOVE_0, 1.0),
    ("prior_factor", "static", 0.0625, ABOVE_0, 4.0),
    ("sharpness", "scheduled", 0.3, ABOVE_0, 1000.0),
    ("sharpness_end", "scheduled", 6.0, ABOVE_0, 1000.0),
    ("prior_loss", "scheduled", 0.05, 0.0, 100.0),
    ("student_loss", "scheduled", 0.01, 0.0, 100.0),
    ("router_loss", "scheduled", 0.01, 0.0, 100.0),
    ("router_z_loss", "scheduled", 0.0001, 0.0, 100.0),
    ("attn_lora_rank", "static", 0, 0, 65_536),
    ("mlp_lora_rank", "static", 0, 0, 65_536),
    ("embed_lora_rank", "static", 0, 0, 65_536),
    ("lora_alpha", "static", 16.0, ABOVE_0, 1e6),
    ("unused_ids", "static", 0, 0, 1_000_000),
    ("lr", "scheduled", 0.006, ABOVE_0, 1000.0),
    ("lr_aux", "scheduled", 0.0, 0.0, 1000.0),
    ("lr_router", "scheduled", 0.0, 0.0, 1000.0),
    ("lr_prior", "scheduled", 0.0, 0.0, 1000.0),
    ("lr_student", "scheduled", 0.0, 0.0, 1000.0),
    ("lr_lora", "scheduled", 0.0, 0.0, 1000.0),
    ("momentum", "static", 0.0, 0.0, BELOW_1),
    ("beta1", "static", 0.9, 0.0, BELOW_1),
    ("beta2", "static", 0.999, 0.0, BELOW_1),
    ("eps", "static", 1e-8, ABOVE_0, 1.0),
    ("weight_decay", "scheduled", 0.0, 0.0, 100.0),
    ("weight_decay_aux", "scheduled", None, 0.0, 100.0),
    ("clip", "static", 1.0, 0.0, 1e6),
    ("warmup_frac", "scheduled", 0.0, 0.0, 1.0),
    ("warmup_iters", "scheduled", 0, 0, 1_000_000_000),
    ("decay_frac", "scheduled", 0.2, 0.0, 1.0),
    ("min_lr_frac", "scheduled", 0.0, 0.0, 1.0),
    ("dropout", "scheduled", 0.0, 0.0, BELOW_1),
    ("attn_dropout", "scheduled", None, 0.0, BELOW_1),
    ("resid_dropout", "scheduled", None, 0.0, BELOW_1),
    ("stochastic_depth", "scheduled", 0.0, 0.0, BELOW_1),
    ("rdrop", "scheduled", 0.0, 0.0, 100.0),
    ("label_smoothing", "scheduled", 0.0, 0.0, BELOW_1),
    ("ema", "scheduled", 0.0, 0.0, BELOW_1),
    ("swa", "scheduled", 0.0, 0.0, 1.0),
    ("ngram", "scheduled", 0, 0, 20),
    ("ngram_weight", "scheduled", 0.3, ABOVE_0, BELOW_1),
    ("eval_per_epoch", "inert", 3, 0, 10_000),
    ("eval_interval", "inert", 0, 0, 1_000_000_000),
    ("log_every", "inert", 1, 1, 1_000_000),
    ("grad_norm_steps", "inert", 0, 0, 1_000_000),
    ("checkpoint_every", "inert", 0, 0, 1_000_000_000),
]
CHOICES: list[tuple[str, str, Any, list[Any]]] = [  # field, class, default, allowed values
    ("device", "static", "auto", ["auto", "cpu", "cuda"]),
    ("dtype", "static", "float32", ["float32", "bfloat16"]),
    ("compile", "static", "auto", ["auto", "on", "off"]),
    ("shard", "static", False, [True, False]),
    ("attention", "static", "auto", ["auto", "plain", "sdpa"]),
    ("shuffle", "static", True, [True, False]),
    ("tokenizer_fit", "static", "train", ["train", "train+val"]),
    ("case", "static", "kept", ["kept", "marked"]),
    ("order", "static", "sequential", ["sequential", "shuffle_titles"]),
    ("norm", "static", "layernorm", ["layernorm", "rmsnorm"]),
    ("position", "static", "learned", ["learned", "rope"]),
    ("mlp", "static", "gelu", ["gelu", "relu2", "swiglu"]),
    ("bias", "static", True, [True, False]),
    ("qkv_bias", "static", None, [None, True, False]),
    ("qk_norm", "static", False, [True, False]),
    ("attn_gate", "static", False, [True, False]),
    ("value_residual", "static", False, [True, False]),
    ("value_shortcut", "static", False, [True, False]),
    ("x0_shortcut", "static", False, [True, False]),
    ("unet", "static", False, [True, False]),
    ("title_mask", "static", False, [True, False]),
    ("tie_head", "static", True, [True, False]),
    ("init", "static", "normal", ["normal", "kaiming"]),
    ("init_depth_scaled", "static", False, [True, False]),
    ("token_scores", "inert", False, [True, False]),
    ("router_weights", "static", "renormalised", ["renormalised", "softmax"]),
    ("gate", "static", "soft", ["soft", "straight"]),
    ("route", "static", "auto", ["auto", "own", "student"]),
    ("optimizer", "static", "sgd", ["sgd", "adamw", "muon"]),
    ("wd_schedule", "scheduled", "constant", ["constant", "linear", "cosine"]),
    ("schedule", "scheduled", "cosine", ["constant", "cosine", "wsd"]),
    ("decay_shape", "scheduled", "linear", ["linear", "cosine", "sqrt"]),
]
OTHERS: list[tuple[str, str, Any]] = [
    ("preset", "inert", "custom"),
    ("corpus", "static", "synthetic"),
    ("start", "static", ""),
    ("documents", "static", False),
    ("tokenizer", "static", "bpe"),
    ("base_frozen", "static", False),
    ("cautious_decay", "static", False),
    ("frozen", "static", ()),
    ("key_shift", "static", False),
    ("block_pattern", "static", "D"),
    ("growth", "scheduled", {"version": 2, "ops": []}),
    ("official_geometry", "inert", ""),
]


def test_every_field_has_one_row() -> None:
    names = [row[0] for row in (*NUMBERS, *CHOICES, *OTHERS)]
    assert sorted(names) == sorted(TrainConfig.model_fields)


@pytest.mark.parametrize(("field", "kind", "default"), [row[:3] for row in (*NUMBERS, *CHOICES, *OTHERS)])
def test_class_and_default(field: str, kind: str, default: Any) -> None:
    assert TrainConfig.class_of(field) == kind
    assert TrainConfig().model_dump()[field] == default


@pytest.mark.parametrize(("field", "lowest", "highest"), [(row[0], *row[3:]) for row in NUMBERS])
def test_the_smallest_and_largest_allowed_values(field: str, lowest: Any, highest: Any) -> None:
    # A value at the limit may conflict with another field, which gives a different message.
    for value in (lowest, highest):
        assert f"{field}={value!r} is not allowed" not in refusals(**{field: value})
    for value in (below(lowest), above(highest)):
        assert f"{field}={value!r} is not allowed" in refusals(**{field: value})


@pytest.mark.parametrize(("field", "allowed"), [(row[0], row[3]) for row in CHOICES])
def test_the_choices(field: str, allowed: list[Any]) -> None:
    for value in allowed:
        assert not refusals(**{field: value})
    for value in ("none of them", 2, *([] if None in allowed else [None])):
        assert f"{field}={value!r} is not allowed" in refusals(**{field: value})


@pytest.mark.parametrize("field", ["lr", "clip", "rope_theta", "min_lr_frac", "attn_dropout"])
@pytest.mark.parametrize("value", [INF, -INF, math.nan])
def test_numbers_must_be_finite(field: str, value: float) -> None:
    assert f"{field}={value!r} is not allowed: input should be a finite number" in refusals(**{field: value})


def test_a_config_is_immutable_strict_and_has_a_schema() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        from_dict({}).lr = 1.0
    assert "lr='0.5' is not allowed" in refusals(lr="0.5")
    assert "n_layer=2.0 is not allowed" in refusals(n_layer=2.0)
    assert TrainConfig.model_json_schema()["properties"]["growth"]["type"] == "object"


@pytest.mark.parametrize(
    ("layers", "ok"),
    [([], True), ([0], True), ([0, 5], True), ((1, 2), True), ([6], False), ([0, 0], False), ([2, 1], False)],
)
def test_frozen_layers_must_exist_and_be_in_order(layers: Any, ok: bool) -> None:
    message = refusals(frozen=layers)
    assert (not message) == ok
    if not ok:
        assert (
            f"frozen={list(layers)} is not allowed with n_layer=6; "
            "list different layers of 0..5 in ascending order" == message
        )


@pytest.mark.parametrize("layers", [[-1], [1.0], ["1"], [True]])
def test_a_frozen_layer_must_be_a_whole_number(layers: Any) -> None:
    assert refusals(frozen=layers).startswith("frozen=")


# -- conflicting fields

OPS = {"ops": [{"name": "set_lr", "value": 0.01, "trigger": {"step": 5}}]}
ROPE_ODD = {"position": "rope", "d_model": 24}
PAIRS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"n_head": 7},
        "n_head=7 does not divide d_model=512; set n_head to one of [2, 4, 8], or d_model=518",
        {"n_head": 7, "head_dim": 64},
    ),
    (
        {"n_head": 2, "d_model": 63},
        "n_head=2 does not divide d_model=63; set d_model=64",
        {"n_head": 3, "d_model": 63},
    ),
    (
        {"n_head": 5, "d_model": 12},
        "n_head=5 does not divide d_model=12; set n_head to one of [2, 3, 6], or d_model=10",
        {"n_head": 6, "d_model": 12},
    ),
    (
        {"n_head": 8, "d_model": 5},
        "n_head=8 does not divide d_model=5; set d_model=16",
        {"n_head": 5, "d_model": 5},
    ),
    (
        {"n_kv_head": 3},
        "n_kv_head=3 does not divide n_head=8; set n_kv_head to 0 or to a divisor of n_head",
        {"n_kv_head": 8},
    ),
    (
        {"n_kv_head": 16},
        "n_kv_head=16 does not divide n_head=8; set n_kv_head to 0 or to a divisor of n_head",
        {"n_kv_head": 1},
    ),
    (
        ROPE_ODD,
        "position=rope needs an even head width, got d_model/n_head = 3; change d_model or n_head",
        ROPE_ODD | {"d_model": 32},
    ),
    (
        ROPE_ODD,
        "position=rope needs an even head width, got d_model/n_head = 3; change d_model or n_head",
        {"d_model": 24},
    ),
    (
        {"position": "rope", "head_dim": 33},
        "position=rope needs an even head width, got head_dim = 33; change head_dim",
        {"position": "rope", "head_dim": 34},
    ),
    (
        {"experts": 2, "top_k": 3},
        "top_k=3 is larger than experts=2; lower top_k, or set experts=0 for a dense MLP",
        {"experts": 3, "top_k": 3},
    ),
    (
        {"experts": 1},
        "top_k=2 is larger than experts=1; lower top_k, or set experts=0 for a dense MLP",
        {"experts": 0, "top_k": 9},
    ),
    (
        {"max_steps": 1, "growth": OPS},
        "max_steps=1 cannot be combined with a growth schedule, "
        "because a growth schedule spans all epochs; set max_steps=0",
        {"growth": OPS},
    ),
    (
        {"grad_accum": 3},
        "grad_accum=3 does not divide batch_size=64; set grad_accum to a divisor of batch_size",
        {"grad_accum": 64},
    ),
    (
        {"ema": 0.5, "swa": 0.25},
        "ema=0.5 and swa=0.25 are both on, but only one average can be scored; set one of them to 0",
        {"swa": 0.25},
    ),
    (
        {"rdrop": 0.5},
        "rdrop=0.5 needs dropout, because R-Drop compares dropout masks; "
        "set dropout > 0 or stochastic_depth > 0",
        {"rdrop": 0.5, "dropout": 0.1},
    ),
    (
        {"rdrop": 0.5, "stochastic_depth": 0.0},
        "rdrop=0.5 needs dropout, because R-Drop compares dropout masks; "
        "set dropout > 0 or stochastic_depth > 0",
        {"rdrop": 0.5, "stochastic_depth": 0.1},
    ),
    (
        {"cautious_decay": True},
        "cautious_decay=true and optimizer=sgd cannot be combined, because only adamw and muon can decay a "
        "part of the weights; use optimizer=adamw or muon, or cautious_decay=false",
        {"cautious_decay": True, "optimizer": "adamw"},
    ),
    (
        {"rdrop": 0.5, "dropout": 0.1, "attn_dropout": 0.0, "resid_dropout": 0.0, "unused_ids": 1},
        "unused_ids=1 and rdrop=0.5 cannot be combined, because unused "
        "ids have probability 0 and the loss would be infinite; set one of them to 0",
        {"rdrop": 0.5, "attn_dropout": 0.1},
    ),
    (
        {"label_smoothing": 0.1, "unused_ids": 1},
        "unused_ids=1 and label_smoothing=0.1 cannot be combined, because unused "
        "ids have probability 0 and the loss would be infinite; set one of them to 0",
        {"unused_ids": 1},
    ),
    (
        {"schedule": "wsd", "warmup_frac": 0.75, "decay_frac": 0.5},
        "warmup_frac=0.75 and decay_frac=0.5 overlap; their sum must be at most 1",
        {"schedule": "wsd", "warmup_frac": 0.5, "decay_frac": 0.5},
    ),
    (
        {"schedule": "wsd", "warmup_frac": 0.75, "decay_frac": 0.5},
        "warmup_frac=0.75 and decay_frac=0.5 overlap; their sum must be at most 1",
        {"schedule": "cosine", "warmup_frac": 0.75, "decay_frac": 0.5},
    ),
    (
        {"schedule": "wsd", "warmup_frac": 1.0},
        "warmup_frac=1.0 and decay_frac=0.2 overlap; their sum must be at most 1",
        {"warmup_frac": 1.0},
    ),
]
KINDS = "D (dense), M (Mixture-of-Depths), S (surprise pairs), T (temporal surprise)"
PAIRS += [
    (
        {"block_pattern": "DX"},
        f"block_pattern='DX' contains 'X'; use the letters {KINDS}",
        {"block_pattern": "DM"},
    ),
    (
        {"block_pattern": "dm"},
        f"block_pattern='dm' contains 'd'; use the letters {KINDS}",
        {"block_pattern": "DM"},
    ),
    (
        {"block_pattern": "DMD", "n_layer": 2},
        "block_pattern='DMD' has 3 letters for n_layer=2 layers; "
        "write at most one letter per layer, because the pattern is repeated over the layers",
        {"block_pattern": "DMD", "n_layer": 3},
    ),
    (
        {"block_pattern": ""},
        "block_pattern='' has 0 letters for n_layer=6 layers; "
        "write at most one letter per layer, because the pattern is repeated over the layers",
        {"block_pattern": "D"},
    ),
    (
        {"block_pattern": "M"},
        "block_pattern='M' makes the first layer 'M'; begin the pattern with D",
        {"block_pattern": "DM"},
    ),
    (
        {"block_pattern": "TD"},
        "block_pattern='TD' makes the first layer 'T'; begin the pattern with D",
        {"block_pattern": "DT"},
    ),
    (
        {"block_pattern": "DSS"},
        "block_pattern='DSS' puts S in layer 2 after 'S' (layers: DSSDSS); "
        "put a D before each S, because S measures the change made by the preceding D block",
        {"block_pattern": "DSDS"},
    ),
    (
        {"block_pattern": "DMS", "n_layer": 4},
        "block_pattern='DMS' puts S in layer 2 after 'M' (layers: DMSD); "
        "put a D before each S, because S measures the change made by the preceding D block",
        {"block_pattern": "DMT"},
    ),
    (
        {"block_pattern": "DTS", "n_layer": 3},
        "block_pattern='DTS' puts S in layer 2 after 'T' (layers: DTS); "
        "put a D before each S, because S measures the change made by the preceding D block",
        {"block_pattern": "DST"},
    ),
]
GEOMETRY = "write ROWSxTOKENS, such as 64x128, with at most block_size=128 tokens"
PAIRS += [
    (
        {"official_geometry": text},
        f"official_geometry={text!r} is not allowed; {GEOMETRY}",
        {"official_geometry": good},
    )
    for text, good in [
        ("0x8", "1x8"),
        ("8x0", "8x1"),
        ("8x129", "8x128"),
        ("8", "8x8"),
        ("8x", "8x8"),
        ("x8", "8x8"),
        ("8x-1", "8x8"),
    ]
]
TOKENIZERS = "use bpe, unigram or hf:DIR, where DIR contains a tokenizer.json"
PAIRS += [
    ({"tokenizer": text}, f"tokenizer={text!r} is not a tokenizer; {TOKENIZERS}", {"tokenizer": good})
    for text, good in [("wordpiece", "bpe"), ("hf", "unigram"), ("bpe:x", "bpe"), ("", "bpe")]
]
PAIRS += [
    (
        {"case": "marked", "tokenizer": "hf:base", "vocab_size": 400},
        "case=marked cannot be combined with tokenizer='hf:base', because the tokenizer of a checkpoint has "
        "no signs for capitals; set case=kept, or tokenizer to bpe or unigram",
        {"case": "marked", "tokenizer": "unigram"},
    )
]
TITLES_ONLY = "set documents=false, or use a corpus of the form file:, hub: or mix:"
PAIRS += [
    (
        {"documents": True, "corpus": corpus},
        f"documents=true cannot be combined with corpus={corpus}, which consists of titles; {TITLES_ONLY}",
        {"documents": True, "corpus": good},
    )
    for corpus, good in [("synthetic", "file:a"), ("hn", "mix:a.toml"), ("hn-2025", "hub:a/b@c#d")]
]
CORPORA = (
    "use synthetic, hn, hn-2025, file:PATH[#COLUMN], hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN or mix:PATH.toml"
)
PAIRS += [
    ({"corpus": text}, f"corpus={text!r} is not a corpus; {CORPORA}", {"corpus": good})
    for text, good in [
        ("wiki", "synthetic"), ("file", "file:a"), ("file:", "file:a#b"), ("mix:", "mix:a.toml"),
        ("mix", "mix:a.toml"), ("hub:", "hub:a/b@c#d"), ("hub", "hub:a/b@c/*.parquet#d"),
        ("hn:a", "hn"), ("hn-2025:a", "hn-2025"), ("synthetic:a", "synthetic"), ("wiki:a", "file:a"),
        ("", "hn"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "words", "good"), PAIRS, ids=[",".join(f"{k}={v}" for k, v in bad.items()) for bad, _, _ in PAIRS]
)
def test_conflicting_fields(bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    assert refusals(**bad) == words
    assert not refusals(**good)


def test_changed_keeps_the_other_fields_and_removes_growth() -> None:
    cfg = from_dict({"lr": 0.5, "growth": OPS})
    other = cfg.changed(seed=5, dropout=0.25)
    assert (other.lr, other.seed, other.dropout, other.growth.ops) == (0.5, 5, 0.25, ())
    with pytest.raises(ValueError) as e:
        cfg.changed(lr=-1.0, clip=-2.0)
    assert "(lr: peak learning rate (muon: of the matrices only)); clip=-2.0 is not allowed" in str(e.value)


def test_segment_configs_have_the_config_and_one_more_per_op() -> None:
    assert [phase.lr for phase in from_dict({"lr": 0.5, "growth": OPS}).segment_configs] == [0.5, 0.01]


# -- derived values


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "head_width", 64),
        ({"head_dim": 10}, "head_width", 10),
        ({}, "kv_heads", 8),
        ({"n_kv_head": 2}, "kv_heads", 2),
        ({"d_model": 504}, "ff_width", 2016),
        ({"d_model": 504, "mlp": "swiglu"}, "ff_width", 1344),  # 8 * 504 / 3 = 1344, a multiple of 64
        ({"d_model": 512, "mlp": "swiglu"}, "ff_width", 1408),  # 1365.3, rounded up to 22 * 64
        ({"d_model": 24, "mlp": "swiglu"}, "ff_width", 64),  # exactly 64
        ({"d_model": 32, "mlp": "swiglu"}, "ff_width", 128),  # 85.3, rounded up to 2 * 64
        ({"d_model": 4800, "mlp": "swiglu"}, "ff_width", 12_800),  # exactly 200 * 64
        ({"mlp": "relu2"}, "ff_width", 2048),
        ({"d_ff": 7, "mlp": "swiglu"}, "ff_width", 7),
        ({"dropout": 0.5}, "dropouts", (0.5, 0.5, 0.5)),
        ({"dropout": 0.5, "attn_dropout": 0.0}, "dropouts", (0.5, 0.0, 0.5)),
        ({"dropout": 0.5, "resid_dropout": 0.25}, "dropouts", (0.5, 0.5, 0.25)),
        ({}, "letters", "DDDDDD"),
        ({}, "routed_layers", ()),
        ({"block_pattern": "DM", "n_layer": 5}, "letters", "DMDMD"),
        ({"block_pattern": "DM", "n_layer": 5}, "routed_layers", (1, 3)),
        ({"block_pattern": "DSTM", "n_layer": 4}, "letters", "DSTM"),
        ({"block_pattern": "DSTM"}, "routed_layers", (1, 2, 3, 5)),
        ({}, "prior_width", 32),
        ({"d_model": 576}, "prior_width", 36),
        ({"d_model": 528}, "prior_width", 34),  # 33, plus 1
        ({"d_model": 544}, "prior_width", 34),  # exactly 34
        ({"d_model": 520}, "prior_width", 34),  # 32.5, rounded up to 33, plus 1
        ({"prior_factor": 1e-9}, "prior_width", 2),
        ({"prior_factor": 1e-12}, "prior_width", 2),
        ({"d_model": 24}, "prior_width", 2),
        ({"d_model": 40}, "prior_width", 4),
        ({"d_model": 200, "prior_factor": 0.07}, "prior_width", 14),  # 14.000000000000002
        ({"prior_factor": 4.0}, "prior_width", 2048),
        ({}, "passes", 1),
        ({"rdrop": 0.5, "dropout": 0.5}, "passes", 2),
        ({"rdrop": 0.5, "dropout": 0.5}, "presentations", 2),
        ({"rdrop": 0.5, "dropout": 0.5, "members": 3}, "presentations", 6),
        ({"batch_size": 3, "block_size": 5}, "geometry", (3, 5)),
        ({"official_geometry": "7x11"}, "geometry", (7, 11)),
    ],
)
def test_derived_values(fields: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(from_dict(fields), name) == value


def test_the_digest_is_the_hash_of_the_sorted_fields_without_the_preset_name() -> None:
    fields = {"b": 1, "preset": "x", "a": [2]}
    assert config.digest_of(fields) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()
    assert config.digest_of(fields | {"preset": "y"}) == config.digest_of(fields)
    cfg = from_dict({"preset": "a:b:c"})
    assert cfg.digest == config.digest_of(cfg.model_dump())
    assert cfg.run_id == f"a-b-c-{cfg.digest[:8]}" and len(cfg.run_id) == 14


def test_the_task_has_the_public_numbers() -> None:
    assert config.TASK == {"seed": 1337, "epochs": 7, "max_steps": 0, "val_frac": 0.1, "num_titles": 100_000}
    assert config.MIN_COVERAGE == 0.97


# -- the plan

# The plans have 81 train tokens, 8 tokens per step and 10 steps per epoch.
SMALL: dict[str, Any] = {"block_size": 4, "batch_size": 2, "epochs": 1}


def make_plan(train_tokens: int = 81, fired: tuple[int, ...] = (), **fields: Any) -> Plan:
    return Plan(from_dict(SMALL | fields), train_tokens, fired)


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({}, [cosine(s / 10) for s in range(10)]),
        ({"min_lr_frac": 0.5}, [0.5 + 0.5 * cosine(s / 10) for s in range(10)]),
        ({"min_lr_frac": 1.0}, [1.0] * 10),
        ({"warmup_frac": 0.2}, [0.5, 1.0, *(cosine(s / 8) for s in range(8))]),
        (
            {"warmup_frac": 0.2, "min_lr_frac": 0.1},
            [0.5, 1.0, *(0.1 + 0.9 * cosine(s / 8) for s in range(8))],
        ),
        ({"warmup_iters": 4, "warmup_frac": 0.9}, [0.25, 0.5, 0.75, 1.0, *(cosine(s / 6) for s in range(6))]),
        ({"warmup_iters": 20}, [s / 20 for s in range(1, 11)]),
        ({"warmup_frac": 1.0}, [s / 10 for s in range(1, 11)]),
        ({"warmup_frac": 0.05}, [cosine(s / 10) for s in range(10)]),  # a warm-up of half a step is skipped
        ({"warmup_frac": 0.06}, [1.0, *(cosine(s / 9) for s in range(9))]),
        ({"schedule": "constant"}, [1.0] * 10),
        ({"schedule": "constant", "warmup_frac": 0.3, "min_lr_frac": 0.1}, [1 / 3, 2 / 3, *[1.0] * 8]),
        ({"schedule": "wsd"}, [*[1.0] * 9, 0.5]),
        ({"schedule": "wsd", "decay_frac": 0.4}, [*[1.0] * 7, 0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "decay_frac": 0.4, "min_lr_frac": 0.2}, [*[1.0] * 7, 0.8, 0.6, 0.4]),
        (
            {"schedule": "wsd", "decay_frac": 0.4, "decay_shape": "cosine"},
            [*[1.0] * 7, cosine(0.25), 0.5, cosine(0.75)],
        ),
        (
            {"schedule": "wsd", "decay_frac": 0.4, "decay_shape": "sqrt"},
            [*[1.0] * 7, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5],
        ),
        ({"schedule": "wsd", "decay_frac": 0.0}, [1.0] * 10),
        ({"schedule": "wsd", "decay_frac": 1.0}, [1 - s / 10 for s in range(10)]),
        (
            {"schedule": "wsd", "decay_frac": 0.5, "warmup_frac": 0.5},
            [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
        ),
        (
            {"schedule": "wsd", "decay_frac": 0.5, "warmup_iters": 8},
            [*(s / 8 for s in range(1, 9)), 1.0, 0.5],
        ),
        ({"max_steps": 4}, [cosine(s / 4) for s in range(4)]),
        ({"max_steps": 40}, [cosine(s / 10) for s in range(10)]),  # max_steps never makes a run longer
    ],
)
def test_the_learning_rate_step_by_step(fields: dict[str, Any], factors: list[float]) -> None:
    plan = make_plan(lr=0.5, lr_aux=0.25, **fields)
    assert plan.steps == len(factors)
    assert [plan.lr_factor(s) for s in range(plan.steps)] == pytest.approx(factors, abs=1e-12)
    assert [plan.at(s).lr for s in range(plan.steps)] == pytest.approx([0.5 * f for f in factors], abs=1e-12)
    assert [plan.at(s).lr_aux for s in range(plan.steps)] == pytest.approx(
        [0.25 * f for f in factors], abs=1e-12
    )


def test_lr_aux_defaults_to_lr() -> None:
    assert make_plan(lr=0.5).at(3).lr_aux == make_plan(lr=0.5).at(3).lr > 0


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ("constant", [1.0] * 10),
        ("linear", [1 - s / 10 for s in range(10)]),
        ("cosine", [cosine(s / 10) for s in range(10)]),
    ],
)
def test_the_weight_decay_step_by_step(shape: str, shares: list[float]) -> None:
    plan = make_plan(weight_decay=0.5, wd_schedule=shape)
    assert [plan.at(s).weight_decay for s in range(10)] == pytest.approx([0.5 * share for share in shares])


@pytest.mark.parametrize(
    ("wanted", "used"),
    [
        (0.0, 0),
        (1e-9, 1),
        (0.1, 26),
        (0.25, 64),
        (0.5, 128),
        (0.7, 179),
        (1 / 256, 1),
        (0.006, 2),
        (0.996, 255),
        (0.999, 255),
        (BELOW_1, 255),
    ],
)
def test_dropout_is_rounded_to_256ths(wanted: float, used: int) -> None:
    inputs = make_plan(dropout=wanted, attn_dropout=0.5, resid_dropout=0.25).at(0)
    assert (inputs.dropout, inputs.attn_dropout, inputs.resid_dropout) == (used / 256, 0.5, 0.25)


def test_the_weight_decay_of_the_tables_step_by_step() -> None:
    """Both weight decays have the same shape. If the second is unset, it is equal to the first."""
    unset = make_plan(weight_decay=0.5, wd_schedule="linear")
    other = make_plan(weight_decay=0.5, weight_decay_aux=0.25, wd_schedule="linear")
    zero = make_plan(weight_decay=0.5, weight_decay_aux=0.0, wd_schedule="linear")
    for step in range(10):
        whole = 0.5 * (1 - step / 10)
        assert [plan.at(step).weight_decay for plan in (unset, other, zero)] == [whole] * 3
        assert [plan.at(step).weight_decay_aux for plan in (unset, other, zero)] == [whole, whole / 2, 0.0]
    equal = make_plan(weight_decay=0.5, weight_decay_aux=0.5, wd_schedule="linear")
    assert [equal.at(step) for step in range(10)] == [unset.at(step) for step in range(10)]


def test_an_op_that_sets_the_weight_decay_moves_the_second_one_only_if_it_is_unset() -> None:
    ops = {"ops": [op("set_weight_decay", 0.5, step=5)]}
    for second, after in ((None, 0.5), (0.25, 0.25)):
        plan = make_plan(weight_decay=0.125, weight_decay_aux=second, growth=ops)
        inputs = plan.at(5)
        assert (inputs.weight_decay, inputs.weight_decay_aux) == (0.5, after)


def test_stochastic_depth_is_rounded_to_256ths_and_shown_if_it_is_on() -> None:
    for wanted, used in ((0.0, 0), (1e-9, 1), (0.1, 26), (0.999, 255)):
        plan = make_plan(stochastic_depth=wanted)
        assert plan.at(0).stochastic_depth == used / 256
        assert plan.table()["first_step"].get("stochastic_depth", 0) == used / 256
        assert ("stochastic_depth" in plan.table()["last_step"]) == bool(used)


def test_the_inputs_of_a_step() -> None:
    inputs = make_plan(
        grad_accum=2, rdrop=0.75, label_smoothing=0.125, dropout=0.5, lr=0.5, weight_decay=0.25
    ).at(0)
    assert inputs._asdict() == {
        "lr": 0.5, "lr_aux": 0.5, "weight_decay": 0.25, "weight_decay_aux": 0.25, "dropout": 0.5,
        "attn_dropout": 0.5, "resid_dropout": 0.5, "stochastic_depth": 0.0, "batch_size": 2,
        "grad_accum": 2, "rdrop": 0.75, "label_smoothing": 0.125, "average": 1.0,
        **dict.fromkeys(ROUTED, 0.0), "lr_lora": 0.0,
    }  # fmt: skip


ROUTED: dict[str, Any] = {
    "capacity": 0.25, "sharpness": 2.0, "prior_loss": 0.5, "student_loss": 0.75, "router_loss": 1.5,
    "router_z_loss": 1.25, "lr_router": 0.125, "lr_prior": 0.375, "lr_student": 0.625,
}  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "unused"),
    [
        ("D", list(ROUTED)),
        ("DM", ["sharpness", "prior_loss", "lr_prior"]),
        ("DS", ["router_loss", "router_z_loss"]),
        ("DT", ["router_loss", "router_z_loss"]),
        ("DSM", []),
    ],
)
def test_an_input_of_routed_blocks_is_0_if_no_block_uses_it(pattern: str, unused: list[str]) -> None:
    plan = make_plan(block_pattern=pattern, sharpness_end=2.0, schedule="constant", **ROUTED)
    inputs = plan.at(3)._asdict()
    assert {name: inputs[name] for name in ROUTED} == ROUTED | dict.fromkeys(unused, 0.0)
    assert all(type(inputs[name]) is float for name in ROUTED)
    shown = plan.table()["first_step"]
    assert [name for name in ROUTED if name not in shown] == unused
    other = {name: value / 2 for name, value in ROUTED.items() if name in unused}
    if "sharpness" in unused:
        other["sharpness_end"] = 7.0
    changed = make_plan(
        block_pattern=pattern, **{"sharpness_end": 2.0, "schedule": "constant"} | ROUTED | other
    )
    assert chain("00", changed) == chain("00", plan), "these values do not change the keys of a run"


@pytest.mark.parametrize(
    ("fields", "rate"), [({}, 0.5), ({"lr_aux": 0.25}, 0.25), ({"lr_aux": 0.25, "lr_router": 0.125}, 0.125)]
)
def test_the_rates_of_routers_follow_the_schedule(fields: dict[str, Any], rate: float) -> None:
    plan = make_plan(lr=0.5, block_pattern="DS", schedule="cosine", warmup_iters=2, **fields)
    peaks = {
        "lr_router": rate,
        "lr_prior": fields.get("lr_aux", 0.5),
        "lr_student": fields.get("lr_aux", 0.5),
    }
    for step in range(plan.steps):
        inputs = plan.at(step)
        for name, peak in peaks.items():
            assert getattr(inputs, name) == pytest.approx(peak * plan.lr_factor(step))


# -- the sharpness: 10 steps, with w steps of warm-up


def test_the_sharpness_step_by_step() -> None:
    plan = make_plan(block_pattern="DS", sharpness=1.0, sharpness_end=3.0, warmup_iters=4)
    rise = [0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    expected = [1 + 2 * (1 - cosine(progress)) for progress in rise]
    assert [plan.at(step).sharpness for step in range(10)] == pytest.approx(expected, abs=1e-12)
    assert plan.sharpness(25) == 3.0
    falling = make_plan(block_pattern="DT", sharpness=3.0, sharpness_end=1.0)
    assert falling.at(0).sharpness == 3.0 and falling.at(9).sharpness == 1.0
    assert falling.at(3).sharpness == pytest.approx(3 - 2 * (1 - cosine(3 / 9)))


@pytest.mark.parametrize(("start", "end"), [(0.3, 6.0), (0.1, 100.0), (0.7, 0.2), (1000.0, 0.3), (0.03, 0.9)])
def test_the_ends_of_the_sharpness_are_exact(start: float, end: float) -> None:
    plan = make_plan(block_pattern="DS", sharpness=start, sharpness_end=end, warmup_iters=3)
    assert [plan.at(step).sharpness for step in range(4)] == [start] * 4
    assert plan.at(9).sharpness == end


def test_a_run_that_only_warms_up_keeps_its_sharpness() -> None:
    for warmup in (9, 10, 50):
        plan = make_plan(block_pattern="DS", sharpness=1.0, sharpness_end=3.0, warmup_iters=warmup)
        assert [plan.at(step).sharpness for step in range(10)] == [1.0] * 10
    one = make_plan(block_pattern="DS", sharpness=1.0, sharpness_end=3.0, max_steps=1)
    assert one.at(0).sharpness == 1.0


def test_a_new_capacity_leaves_the_sharpness_alone() -> None:
    fields: dict[str, Any] = {"block_pattern": "DS", "sharpness": 1.0, "sharpness_end": 3.0, "capacity": 0.75}
    plain = make_plan(**fields)
    plan = make_plan(**fields, growth={"ops": [op("set_capacity", 0.25, step=5)]})
    assert [plan.at(step).capacity for step in range(10)] == [0.75] * 5 + [0.25] * 5
    assert [plan.at(step).sharpness for step in range(10)] == [plain.at(step).sharpness for step in range(10)]


@pytest.mark.parametrize(
    ("fields", "start", "shares"),
    [
        ({}, 10, [1.0] * 10),
        ({"ema": 0.5}, 10, [1 - min(0.5, (1 + s) / (10 + s)) for s in range(10)]),
        ({"ema": 0.15}, 10, [0.9, *[0.85] * 9]),
        ({"swa": 0.3}, 7, [*[1.0] * 8, 1 / 2, 1 / 3]),
        ({"swa": 1.0}, 0, [1 / n for n in range(1, 11)]),
        ({"swa": 0.01}, 10, [1.0] * 10),
    ],
)
def test_the_weight_of_the_new_parameters_in_the_average(
    fields: dict[str, Any], start: int, shares: list[float]
) -> None:
    plan = make_plan(**fields)
    assert plan.swa_start == start
    assert [plan.at(s).average for s in range(10)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("tokens", "fields", "per_epoch", "steps", "budget"),
    [
        (9, {}, 1, 1, 8),
        (15, {}, 1, 1, 8),
        (16, {}, 2, 2, 16),
        (80, {}, 10, 10, 80),
        (81, {"epochs": 3}, 10, 30, 240),
        (87, {"epochs": 3}, 10, 30, 240),
        (87, {"epochs": 3, "max_steps": 29}, 10, 29, 240),
        (87, {"epochs": 3, "max_steps": 31}, 10, 30, 240),
    ],
)
def test_the_number_of_steps(
    tokens: int, fields: dict[str, Any], per_epoch: int, steps: int, budget: int
) -> None:
    plan = make_plan(tokens, **fields)
    assert (plan.train_tokens, plan.steps_per_epoch, plan.steps, plan.budget) == (
        tokens,
        per_epoch,
        steps,
        budget,
    )
    assert [plan.tokens(done) for done in (0, 1, steps)] == [0, 8, 8 * steps]
    assert plan.checkpoint_every == per_epoch
    assert make_plan(tokens, checkpoint_every=3, **fields).checkpoint_every == 3


def test_train_must_have_enough_tokens_for_one_step() -> None:
    with pytest.raises(ConfigError) as e:
        make_plan(8)
    assert str(e.value) == (
        "train has 8 tokens, but one step needs batch_size*block_size+1 = 9; "
        "lower batch_size or block_size, or raise num_titles"
    )
    with pytest.raises(
        ConfigError, match=r"train has 1,024 tokens, but one step needs batch_size\*block_size\+1 = 1,025;"
    ):
        make_plan(1024, growth={"ops": [op("set_batch_size", 256, step=5)]})


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, {1, 3, 6, 9, 12, 15, 18, 20}),
        ({"eval_per_epoch": 0}, {1, 20}),
        ({"eval_per_epoch": 1}, {1, 10, 20}),
        ({"eval_per_epoch": 10}, set(range(1, 21))),
        ({"eval_per_epoch": 11}, set(range(1, 21))),
        ({"eval_interval": 7}, {1, 7, 14, 20}),
        ({"eval_interval": 7, "eval_per_epoch": 0}, {1, 7, 14, 20}),
        ({"eval_interval": 20}, {1, 20}),
        ({"eval_interval": 19}, {1, 19, 20}),
        ({"eval_interval": 100}, {1, 20}),
        ({"eval_interval": 1}, set(range(1, 21))),
    ],
)
def test_the_steps_with_an_evaluation(fields: dict[str, Any], steps: set[int]) -> None:
    plan = make_plan(epochs=2, **fields)
    assert plan.eval_steps == steps
    assert plan.table()["evaluations"] == len(steps)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"schedule": "constant"}, []),
        ({"schedule": "constant", "warmup_iters": 3}, [3]),
        ({}, [1]),  # the first step has the peak rate, and the decay starts after it
        ({"warmup_iters": 3}, [3, 4]),
        ({"schedule": "wsd", "decay_frac": 0.5}, [6]),
        ({"schedule": "wsd", "decay_frac": 0.5, "warmup_frac": 0.5}, [5, 6]),
        ({"schedule": "wsd", "decay_frac": 0.1}, []),
        ({"schedule": "constant", "swa": 0.5}, [6]),
        ({"schedule": "constant", "swa": 0.1}, []),
        ({"schedule": "constant", "swa": 0.2}, [9]),
        (
            {
                "schedule": "constant",
                "growth": {"ops": [{"name": "set_lr", "value": 0.1, "trigger": {"step": 9}}]},
            },
            [9],
        ),
    ],
)
def test_breaks(fields: dict[str, Any], steps: list[int]) -> None:
    assert make_plan(**fields).breaks == steps


def test_the_resolved_table() -> None:
    plan = make_plan(
        epochs=2,
        schedule="wsd",
        decay_frac=0.25,
        warmup_iters=2,
        lr=0.5,
        mlp="swiglu",
        d_model=32,
        n_kv_head=4,
    )
    inputs = {
        "lr": 0.25, "lr_aux": 0.25, "weight_decay": 0.0, "weight_decay_aux": 0.0, "dropout": 0.0,
        "attn_dropout": 0.0, "resid_dropout": 0.0, "batch_size": 2,
        "grad_accum": 1, "rdrop": 0.0, "label_smoothing": 0.0, "average": 1.0,
    }  # fmt: skip
    assert plan.table() == {
        "train_tokens": 81, "tokens_per_step": 8, "steps_per_epoch": 10, "steps": 20, "warmup_steps": 2,
        "decay_start": 15,
        "swa_start": None, "growth": None, "evaluations": 8, "checkpoint_every": 10,
        "official_geometry": [2, 4], "d_ff": 128,
        "n_kv_head": 4, "first_step": inputs,
        "last_step": inputs | {"lr": pytest.approx(0.1), "lr_aux": pytest.approx(0.1)},
    }  # fmt: skip
    assert make_plan(swa=0.5).table()["swa_start"] == 5


# -- reading positions


@pytest.mark.parametrize(
    ("order", "tokens", "places"),
    [
        ("sequential", 20, [(0, 0), (0, 8), (1, 0), (1, 8), (2, 0)]),
        ("sequential", 17, [(0, 0), (0, 8), (1, 0), (1, 8), (2, 0)]),
        ("sequential", 16, [(0, 0), (1, 0), (2, 0)]),  # a second span would need a 17th token as its target
        ("sequential", 9, [(0, 0), (1, 0)]),
        ("shuffle_titles", 17, [(0, 0), (0, 8), (1, 0)]),
        ("shuffle_titles", 16, [(0, 0), (0, 0), (1, 0), (1, 0)]),  # both steps read the first tokens
        ("shuffle_titles", 20, [(0, 0), (0, 8), (1, 0)]),
    ],
)
def test_the_place_of_a_step(order: str, tokens: int, places: list[tuple[int, int]]) -> None:
    segment = Segment(from_dict(SMALL | {"order": order}))
    assert segment.span == 8
    assert [segment.place(step, tokens) for step in range(len(places))] == places


def test_the_place_of_a_step_in_a_later_segment() -> None:
    segment = Segment(from_dict(SMALL), first=5, epoch=1, start=8)
    assert [segment.place(step, 33) for step in range(5, 13)] == [
        (1, 8),
        (1, 16),
        (1, 24),
        (2, 0),
        (2, 8),
        (2, 16),
        (2, 24),
        (3, 0),
    ]
    assert [segment.after(step, 33) for step in range(5, 10)] == [(1, 8), (1, 16), (1, 24), (1, 32), (2, 8)]
    # A larger step before this segment has read past the end of the tokens.
    past = Segment(from_dict(SMALL), first=5, epoch=1, start=40)
    assert [past.place(step, 33) for step in (5, 6, 9)] == [(2, 0), (2, 8), (3, 0)]
    assert Segment(from_dict(SMALL))[1:] == (0, 0, 0, 0, 0, None)


# -- growth


def op(name: str, value: Any = None, **trigger: Any) -> dict[str, Any]:
    entry = {"name": name, "trigger": trigger}
    return entry if value is None else entry | {"value": value}


def plan_with(*ops: dict[str, Any], fired: tuple[int, ...] = (), **fields: Any) -> Plan:
    return make_plan(401, fired, epochs=2, growth={"ops": list(ops)}, **{"schedule": "constant"} | fields)


@pytest.mark.parametrize(
    ("trigger", "first"),
    [
        ({"step": 30}, 30),
        ({"tokens": 240}, 30),
        ({"tokens": 243}, 30),
        ({"tokens": 245}, 31),
        ({"budget_frac": 0.3}, 30),
        ({"budget_frac": 0.001}, 0),
        ({"any": [{"step": 30}, {"tokens": 400}]}, 30),
        ({"any": [{"step": 30}, {"tokens": 80}]}, 10),
        ({"any": [{"budget_frac": 0.5}, {"tokens": 80}]}, 10),
        ({"any": [{"budget_frac": 0.05}, {"tokens": 80}]}, 5),
        ({"step": 99}, 99),
    ],
)
def test_when_an_op_with_a_static_trigger_fires(trigger: dict[str, Any], first: int) -> None:
    plan = plan_with(op("set_lr", 0.125, **trigger), lr=0.5)
    assert plan.fired == (first,) and plan.undecided is None
    assert (plan.before, plan.since) == (None, 0)
    assert plan.segments[1][1:3] == (first, 8 * first)
    assert plan.at(first).lr == 0.125
    assert first == 0 or plan.at(first - 1).lr == 0.5
    again = plan_with(op("set_lr", 0.125, **trigger), fired=plan.fired, lr=0.5)
    assert (again.fired, again.before, again.since) == (plan.fired, None, 0)
    assert again.at(first).lr == 0.125


def test_an_op_waits_for_the_one_before_it() -> None:
    plan = plan_with(
        op("set_lr", 0.125, step=40), op("set_dropout", 0.5, step=3), op("set_weight_decay", 0.25, tokens=8)
    )
    assert plan.fired == (40, 40, 40)


def test_an_op_that_would_fire_too_late_is_refused() -> None:
    with pytest.raises(ConfigError) as e:
        plan_with(op("set_lr", 0.25, step=5), op("set_lr", 0.125, step=100))
    assert str(e.value) == (
        "growth: ops[1] 'set_lr' would fire after step 100, but less than one step would then be left "
        "(without this op, the run has 100 steps); give the op an earlier trigger"
    )
    with pytest.raises(ConfigError, match=r"'set_batch_size' would fire after step 99,.*has 100 steps"):
        plan_with(op("set_batch_size", 4, step=99))
    assert plan_with(op("set_batch_size", 4, step=98)).steps == 99
    assert plan_with(op("set_batch_size", 1, step=99)).steps == 101


def test_a_growing_batch_size() -> None:
    plan = plan_with(
        op("set_batch_size", 4, tokens=160),
        op("set_batch_size", 8, tokens=320),
        op("set_grad_accum", 2, tokens=480),
    )
    assert [segment[1:6] for segment in plan.segments] == [
        (0, 0, 0, 0, 0), (20, 160, 0, 160, 0), (30, 320, 0, 320, 0), (35, 480, 1, 96, 0)
    ]  # fmt: skip
    assert plan.steps == 45 and plan.tokens(45) == 800
    assert [plan.tokens(done) for done in (19, 20, 21, 30, 31)] == [152, 160, 176, 320, 352]
    assert [plan.at(s).batch_size for s in (19, 20, 29, 30)] == [2, 4, 4, 8]
    assert [plan.at(s).grad_accum for s in (34, 35)] == [1, 2]
    assert [plan.segment_at(s).first for s in (0, 19, 20, 44, 99)] == [0, 0, 20, 35, 35]
    # Each epoch has three evaluations. The ops shorten an epoch from 50 steps to 25 and then to 12.
    assert plan.eval_steps == {1, 16, 28, 34, 38, 42, 45}
    assert plan.breaks == [20, 30, 35]


def test_a_changed_eval_interval() -> None:
    plan = plan_with(op("set_eval_interval", 20, step=30), op("set_lr", 0.25, step=35), eval_interval=10)
    assert plan.eval_steps == {1, 10, 20, 30, 50, 70, 90, 100}


def test_a_reset_of_the_learning_rate_schedule() -> None:
    plan = plan_with(
        op("set_warmup_iters", 5, step=20),
        op("reset_lr_schedule", step=60),
        schedule="cosine",
        warmup_iters=10,
    )
    assert [plan.lr_factor(s) for s in (0, 9, 19)] == pytest.approx([0.1, 1.0, cosine(9 / 90)])
    assert [plan.lr_factor(s) for s in (20, 59)] == pytest.approx([cosine(15 / 95), cosine(54 / 95)])
    assert [plan.lr_factor(s) for s in (60, 64, 65, 99)] == pytest.approx([0.2, 1.0, 1.0, cosine(34 / 35)])
    assert [segment.lr_start for segment in plan.segments] == [0, 0, 60]
    assert (plan.warmup_steps, plan.decay_start) == (10, 10)
    assert plan.breaks == [5, 6, 10, 11, 20, 60, 65, 66]
    shares = plan_with(op("reset_lr_schedule", step=60), schedule="wsd", warmup_frac=0.1, decay_frac=0.5)
    assert [shares.lr_factor(s) for s in (60, 63, 64, 80, 90)] == pytest.approx([0.25, 1.0, 1.0, 1.0, 0.5])


def test_a_plan_with_an_undecided_op() -> None:
    ops = op("set_lr", 0.25, step=10), op("set_lr", 0.125, loss_below=3.0), op("set_dropout", 0.5, step=50)
    waits = plan_with(*ops, lr=0.5)
    assert waits.undecided is not None and waits.undecided.place == 1
    assert (waits.fired, waits.steps, len(waits.segments)) == ((10,), 100, 2)
    assert waits.table()["growth"] == "set_lr 0.25 after step 10, then set_lr 0.125 at loss < 3"
    decided = plan_with(*ops, lr=0.5, fired=(10, 34))
    assert decided.undecided is None and decided.fired == (10, 34, 50)
    assert decided.before is not None and (decided.before.fired, decided.since) == ((10,), 34)
    assert [decided.at(s).lr for s in (9, 10, 33, 34)] == [0.5, 0.25, 0.25, 0.125]
    assert [decided.at(s).dropout for s in (49, 50)] == [0.0, 0.5]
    assert (
        decided.table()["growth"]
        == "set_lr 0.25 after step 10, set_lr 0.125 after step 34, set_dropout 0.5 after step 50"
    )
    late = plan_with(*ops, lr=0.5, fired=(10, 96))  # the second op fires late, so the last op is due at once
    assert late.fired == (10, 96, 96)


def test_a_skipped_op() -> None:
    ops = op("set_lr", 0.25, step=10), op("set_batch_size", 4, step=20), op("set_dropout", 0.5, step=30)
    plan = plan_with(*ops, lr=0.5, fired=(10, ~20))
    assert plan.fired == (10, ~20, 30)
    assert plan.before is not None and (plan.before.fired, plan.since) == ((10, 20, 30), 20)
    assert {plan.at(s).batch_size for s in range(100)} == {2}
    assert [plan.at(s).dropout for s in (29, 30)] == [0.0, 0.5]
    assert plan.steps == 100
    at_once = plan_with(op("set_lr", 0.25, budget_frac=0.001), fired=(~0,), lr=0.5)
    assert (at_once.fired, at_once.since, at_once.at(0).lr) == ((~0,), 0, 0.5)
    needs = op("stack_layers", [0, 0], step=10), op("freeze_layer", 1, step=20)
    with pytest.raises(ConfigError) as e:
        plan_with(*needs, fired=(~10,), n_layer=1)
    assert str(e.value).startswith(
        "growth: ops[0] was skipped, and a later op cannot be applied without it: ops[1] 'freeze_layer': "
        "layer 1"
    )


@pytest.mark.parametrize(
    ("decision", "number"), [(Decision(7), 7), (Decision(0), 0), (Decision(7, True), -8)]
)
def test_a_decision_as_an_integer(decision: Decision, number: int) -> None:
    assert decision.to_int() == number
    assert Decision.from_int(number) == decision


def test_a_plan_after_one_more_decision() -> None:
    ops = op("set_lr", 0.25, step=10), op("set_lr", 0.125, loss_below=3.0), op("set_dropout", 0.5, step=50)
    plan = plan_with(*ops)
    assert plan.decided(Decision(34)).fired == (10, 34, 50)
    assert plan.decided(Decision(34, skipped=True)).fired == (10, ~34, 50)
    assert plan.decided(Decision(10, skipped=True), place=0).fired == (~10,)
    assert plan.decided(Decision(34)).decided(Decision(40, skipped=True), place=1).fired == (10, ~40, 50)


def test_ops_after_a_late_decision_are_dropped() -> None:
    """A config is refused if an op is due after the end. An op that becomes late during a run is dropped."""
    ops = op("set_lr", 0.25, loss_below=3.0), op("set_batch_size", 8, step=50)
    plan = plan_with(*ops, fired=(99,))
    assert (plan.fired, len(plan.segments), plan.steps) == ((99,), 2, 100)
    assert plan_with(*ops, fired=(96,)).fired == (96, 96)
    passed = (
        op("set_lr", 0.25, loss_below=3.0),
        op("set_lr", 0.125, step=50),
        op("set_batch_size", 8, step=99),
    )
    assert plan_with(*passed, fired=(~30,)).fired == (~30, 50)


def test_a_decision_changes_nothing_before_it() -> None:
    ops = (op("set_eval_interval", 30, loss_below=3.0),)
    plan = plan_with(*ops, fired=(20,), eval_interval=10, schedule="cosine", warmup_iters=5)
    assert plan.eval_steps == {1, 10, 20, 50, 80, 100}
    assert plan.breaks == [5, 6]
    faster = plan_with(op("set_batch_size", 4, loss_below=3.0), fired=(20,), schedule="cosine")
    assert faster.steps == 60
    assert [faster.lr_factor(s) for s in (20, 50)] == pytest.approx([cosine(20 / 60), cosine(50 / 60)])
    # Before the decision, the learning rate was planned for 100 steps.
    assert [faster.at(s).lr for s in (0, 19, 20)] == pytest.approx(
        [0.006, 0.006 * cosine(0.19), 0.006 * cosine(20 / 60)]
    )
    assert [faster.at(s).batch_size for s in (19, 20)] == [2, 4]


def test_the_effects_of_architecture_ops_by_step() -> None:
    plan = plan_with(
        op("set_lr", 0.25, step=5),
        op("freeze_layer", 0, step=10),
        op("freeze_layer", 1, step=10),
        op("unfreeze_layer", 0, step=20),
    )
    assert set(plan.grown) == {10, 20}
    effects = [
        json.dumps(segment.op.effect(), sort_keys=True)
        for segment in plan.segments
        if segment.op and segment.op.name in ARCHITECTURE
    ]
    assert plan.grown == {10: (effects[0] + effects[1]).encode(), 20: effects[2].encode()}


# -- presets


def write(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(preset: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as e:
        load(preset, sets)
    return str(e.value)


NO_LIST = " is not a list of tables; write [[steps]] before the fields of each step"
LADDER = '[[steps]]\nlr = 0.5\n[[steps]]\nname = "b"\nabout = "more"\nseed = 3\n'


def test_the_steps_of_a_ladder_have_names_or_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, f'about = "what it is"\n{LADDER}')
    assert [(c.preset, c.lr, c.seed) for c in load(path)] == [("mine:0", 0.5, 1337), ("mine:b", 0.5, 3)]
    assert [c.preset for c in load(f"{path}:0")] == ["mine:0"]
    assert [c.preset for c in load(f"{path}:b")] == ["mine:b"]
    assert [c.seed for c in load(path, ["seed=9", "seed=8"])] == [8, 8]


def test_scale_also_overrides_a_preset_without_steps(tmp_path: Path) -> None:
    (cfg,) = load(write(tmp_path, "lr = 0.5\nseed = 3\n[scale]\nseed = 4\n"))
    assert (cfg.lr, cfg.seed, cfg.preset) == (0.5, 4, "mine")


@pytest.mark.parametrize(
    ("text", "preset", "words"),
    [
        ("steps = [{a = 1}, 1]", "{}", "steps = [{'a': 1}, 1] in mine.toml" + NO_LIST),
        ("steps = 3", "{}", "steps = 3 in mine.toml" + NO_LIST),
        ("steps = []", "{}", "steps = [] in mine.toml" + NO_LIST),
        ("steps = [1]", "{}", "steps = [1] in mine.toml" + NO_LIST),
        ("scale = 3", "{}", "scale = 3 in mine.toml is not a table; "
                            "write [scale], and below it lines of the form field = value"),
        ("preset = 'x'", "{}", "preset = 'x' in mine.toml has no effect, because a preset is named after its "
                               "file; remove the line"),
        ("[scale]\npreset = 'x'", "{}", "preset = 'x' in mine.toml has no effect, because a preset is named "
                                        "after its file; remove the line"),
        ("[[steps]]\n[[steps]]\npreset = 'x'", "{}",
            "preset = 'x' in mine.toml has no effect, "
            "because a preset is named after its file; remove the line"),
        (LADDER, "{}:c", "preset 'mine' has no step 'c'; its steps: 0, b"),
        ("lr = 0.5", "{}:b", "preset 'mine' has no steps, got '{}:b'; write --preset {}"),
        (LADDER, "{}:", "preset '{}:' names no step; write {}:STEP, or {} for all steps"),
        (
            LADDER.replace('"b"', '"0"'),
            "{}",
            "two steps of mine.toml are called '0'; give the steps different names",
        ),
        (
            LADDER.replace('"b"', '"/"'),
            "{}",
            "step 2 of mine.toml has the invalid name '/'; "
            "use at most 80 letters, digits, spaces and . + - _, and begin with a letter or digit",
        ),
    ],
)  # fmt: skip
def test_an_unusable_preset_file(tmp_path: Path, text: str, preset: str, words: str) -> None:
    path = write(tmp_path, text)
    assert refusal(preset.replace("{}", path)) == words.replace("{}", path)


@pytest.mark.parametrize(
    ("name", "ok"),
    [
        ("a" * 80, True),
        ("a" * 81, False),
        ("a.b+c-d_e f", True),
        (".a", False),
        ("-a", False),
        (" a", False),
        ("", False),
        ("a/b", False),
    ],
)
def test_the_name_of_a_step(tmp_path: Path, name: str, ok: bool) -> None:
    path = write(tmp_path, f'[[steps]]\nname = "{name}"\n')
    if ok:
        assert load(path)[0].preset == f"mine:{name}"
    else:
        assert f"step 1 of mine.toml has the invalid name {name!r}" in refusal(path)


def test_a_file_name_that_cannot_be_a_directory_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "lr = 0.5", "-mine")
    assert refusal(path).startswith(
        f"preset file {path} has the invalid name '-mine'; use at most 80 letters"
    )


def test_a_base_must_be_one_config(tmp_path: Path) -> None:
    ladder = write(tmp_path, LADDER, "ladder")
    path = write(tmp_path, f'base = "{ladder}"')
    assert (
        refusal(path) == f"base = '{ladder}' in mine.toml is a ladder; name one of its steps, like {ladder}:0"
    )
    one = write(tmp_path, '[[steps]]\nname = "only"\nlr = 0.25\n', "one")
    assert load(write(tmp_path, f'base = "{one}"'))[0].lr == 0.25
    me = write(tmp_path, f'base = "{tmp_path / "mine.toml"}"')
    assert refusal(me) == f"preset '{me}' is its own base ({me} -> {me}); remove one of the base keys"


def test_a_cycle_of_bases_is_refused_with_its_chain(tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / f"{name}.toml") for name in "abc")
    for name, base in (("a", b), ("b", c), ("c", b)):
        write(tmp_path, f'base = "{base}"', name)
    assert (
        refusal(a) == f"preset '{b}' is its own base ({a} -> {b} -> {c} -> {b}); remove one of the base keys"
    )


def test_a_step_continues_from_the_step_before_unless_it_has_a_base(tmp_path: Path) -> None:
    other = write(tmp_path, "seed = 5\nclip = 0.5", "other")
    path = write(
        tmp_path,
        f'lr = 0.5\n[[steps]]\nseed = 1\n[[steps]]\nbase = "{other}"\nlr = 0.25\n[[steps]]\nseed = 7\n',
    )
    assert [(c.lr, c.seed, c.clip) for c in load(path)] == [(0.5, 1, 1.0), (0.25, 5, 0.5), (0.25, 7, 0.5)]


def test_set_preset_is_refused(tmp_path: Path) -> None:
    assert (
        refusal("baseline", "preset=x")
        == "--set preset=x has no effect, because a preset is named after its file; "
        "choose a preset with --preset"
    )


@pytest.mark.parametrize("preset", ["baseline:x", "baseline:"])
def test_a_step_of_a_preset_without_steps_is_refused(preset: str) -> None:
    assert "baseline" in refusal(preset) and "step" in refusal(preset)


def test_the_built_in_names_are_the_names_of_the_files() -> None:
    assert recipes.preset_names() == sorted(p.stem for p in recipes.PRESETS.iterdir() if p.suffix == ".toml")
    assert {"baseline", "optimized"} <= set(recipes.preset_names())
    known = ", ".join(recipes.preset_names())
    assert (
        refusal("basline")
        == f"unknown preset 'basline' (did you mean 'baseline'?); allowed: {known}, or a file ending in .toml"
    )
    assert (
        refusal("gone.toml") == f"preset file gone.toml does not exist; give a TOML file or one of: {known}"
    )
    assert (
        refusal("gone.toml:x") == f"preset file gone.toml does not exist; give a TOML file or one of: {known}"
    )


def test_unreadable_preset_files_are_refused(tmp_path: Path) -> None:
    known = ", ".join(recipes.preset_names())
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    assert refusal(str(folder)) == f"preset file {folder} is a folder; give a TOML file or one of: {known}"
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"about = '\xff'")
    assert refusal(str(latin)).startswith(f"preset file {latin} is not UTF-8")
    assert refusal(write(tmp_path, "lr = ")).startswith(
        f"preset file {tmp_path / 'mine.toml'} is not valid TOML: "
    )


def test_a_colon_in_a_folder_name_does_not_separate_a_step(tmp_path: Path) -> None:
    place = tmp_path / "a:b"
    place.mkdir()
    path = write(place, LADDER)
    assert [cfg.preset for cfg in load(path)] == ["mine:0", "mine:b"]
    assert [cfg.preset for cfg in load(f"{path}:b")] == ["mine:b"]


# -- --set, and one wrong value


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=0.5", "lr", 0.5),
        (" lr = 0.5 ", "lr", 0.5),
        ("a=none", "a", None),
        ("a=None", "a", None),
        ("a=NONE ", "a", None),
        ("a=nones", "a", "nones"),
        ("a=true", "a", True),
        ("a=True", "a", "True"),
        ("a=[1, 2]", "a", [1, 2]),
        ("a='b'", "a", "b"),
        ("a=b=c", "a", "b=c"),
        ("a=", "a", ""),
        ("a=1e3", "a", 1000.0),
        ("a=0x10", "a", 16),
    ],
)
def test_how_set_reads_a_value(text: str, key: str, value: Any) -> None:
    assert parse_set(text) == (key, value)
    assert type(parse_set(text)[1]) is type(value)


def test_set_refuses_an_unusable_value() -> None:
    with pytest.raises(ConfigError) as e:
        parse_set("seed=" + "7" * 400)
    assert str(e.value).startswith(
        "--set seed=777"
    ) and " cannot be used: a number has more than 300 digits" in str(e.value)
    assert len(str(e.value)) < 250


@pytest.mark.parametrize("text", ["lr", "=1", " =1", ""])
def test_set_without_a_key_or_an_equals_sign(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_set(text)
    assert str(e.value) == f"--set got {text!r}; write key=value, like --set lr=0.01"


ALL_FIELDS = "; `mainrun presets --fields` lists all fields"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": -1.0}, ["lr=-1.0 is not allowed: input should be greater than 0 (lr: peak learning rate "
                        "(muon: of the matrices only))"]),
        ({"bias": 1}, ["bias=1 is not allowed: write true or false (bias: biases in linear layers and "
                       "LayerNorm"]),
        ({"qkv_bias": "x"}, ["qkv_bias='x' is not allowed: write true or false (qkv_bias: biases of the "
                             "q, k and v projections; unset: same as bias)"]),
        ({"lrr": 1}, ["unknown field 'lrr' (did you mean 'lr'?)" + ALL_FIELDS]),
        (
            {"learning_rate": 1},
            ["unknown field 'learning_rate' (did you mean 'lr': peak learning rate (muon: of the matrices "
             "only)?)" + ALL_FIELDS],
        ),
        ({"qqqqqqqq": 1}, ["unknown field 'qqqqqqqq'" + ALL_FIELDS]),
        ({"qqqqqqqq": 1, "clip": -1.0}, ["clip=-1.0 is not allowed", "unknown field 'qqqqqqqq'"]),
        ({"growth": 3}, ["growth: 3 is not a schedule"]),
    ],
)  # fmt: skip
def test_the_message_for_a_wrong_value(fields: dict[str, Any], words: list[str]) -> None:
    lines = refusals(**fields).splitlines()
    assert len(lines) == len(words)
    assert all(line.startswith(word) for line, word in zip(lines, words, strict=True)), lines


def test_only_ten_faults_are_listed() -> None:
    twelve = [row[0] for row in NUMBERS[:12]]
    lines = refusals(**dict.fromkeys(twelve, -1)).splitlines()
    assert [line.split("=")[0] for line in lines[:10]] == twelve[:10] and lines[10:] == ["and 2 more faults"]
    guesses = refusals(**{f"{name}q": 1 for name in twelve}).splitlines()
    assert len(guesses) == 11 and all("did you mean" in line for line in guesses[:10])


def test_from_dict_keeps_the_preset_name() -> None:
    assert from_dict({"preset": "x", "lr": 0.5}).preset == "x"
    assert from_dict({"lr": 0.5}).preset == "custom"
    assert from_dict({"growth": json.dumps(OPS)}).growth.ops[0].value == 0.01


def test_wrong_fields_are_reported_before_the_faults_of_ops() -> None:
    """The syntax of ops is always checked, but their effects are checked only for a valid config."""
    late = {"ops": [{"name": "set_grad_accum", "value": 3, "trigger": {"step": 5}}]}
    assert refusals(growth=late).startswith("growth: ops[0] 'set_grad_accum': grad_accum=3")
    assert refusals(growth=late, lr=-1.0).splitlines() == refusals(lr=-1.0).splitlines()
    assert refusals(growth=late, ema=0.5, swa=0.5).startswith("ema=0.5")
    two = refusals(growth={"opps": 1, "ops": [{"name": "set_lr"}]})
    assert two.splitlines() == sorted(two.splitlines(), key=lambda line: "ops[" in line)
