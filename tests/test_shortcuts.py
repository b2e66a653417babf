"""Shortcuts past layers, partly rotated heads and shifted keys: at the start, in training and in growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from growing import IDX, go_on, op, trained
from growing import config as growing_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mainrun.config import TrainConfig, from_dict
from mainrun.core.attention import shift_keys
from mainrun.core.layers import bias_of
from mainrun.core.optimizers import Optimizers
from mainrun.core.shortcuts import UNetSkips
from mainrun.data.tokenizer import EOS
from mainrun.errors import ConfigError, UsageError
from mainrun.growth.verify import check_rope, logit_change
from mainrun.plan.plan import Plan
from mainrun.run.session import train
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, build, set_up

V, T = 41, 12
SHORTCUTS: dict[str, Any] = {"value_shortcut": True, "x0_shortcut": True, "unet": True}
SHIFTED: dict[str, Any] = {"position": "rope", "rope_share": 0.5, "key_shift": True}
ALL = SHORTCUTS | SHIFTED

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | {"block_size": T, "n_head": 4, "n_kv_head": 2, "n_layer": 4} | changes)


def shaken(cfg: TrainConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """Return a model with noise in all weights, so that no shortcut has the weight 0."""
    model = build(cfg, V)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.3
    return model.to(dtype).eval()


def ids(seed: int = 0, rows: int = 3) -> Tensor:
    """Return rows of token ids. Titles begin at tokens 0, 5 and 9."""
    idx = torch.randint(3, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    idx[:, [0, 5, 9]] = EOS
    return idx


# -- the start

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bfloat16, first values and an untied head": {
        "dtype": "bfloat16", "value_residual": True, "tie_head": False
    },
    "experts": {"experts": 2},
    "routed": {"block_pattern": "DMDT"},
    "low rank": {"attn_lora_rank": 2, "embed_lora_rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_a_new_model_with_shortcuts_is_the_model_without_them_bit_for_bit(fields: dict[str, Any]) -> None:
    without = build(config(**fields), V).eval()
    model = build(config(**fields | SHORTCUTS), V).eval()
    old = without.state_dict()
    new = model.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert len(new) == len(old) + 4 * 2 + 4 * 2 + 2
    assert torch.equal(model(ids()), without(ids()))


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_every_parameter_has_a_gradient_and_every_shortcut_learns(fields: dict[str, Any]) -> None:
    """DDP needs a gradient for each parameter. A gate of 0 gets a gradient from a random projection."""
    cfg = config(**fields | ALL, optimizer="muon", lr=0.01, lr_aux=0.01)
    model = build(cfg, V).train()
    optimizers = Optimizers(cfg, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):  # the projections get a gradient as soon as the gates are not 0
        model.zero_grad()
        logits, routing = model(ids(step), routing_info=True)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids(step + 9).flatten()) + routing.losses.sum()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizers.step(Plan(cfg, 100_000).at(0), step)
    added = [name for name in before if ".mix." in name or ".shortcut." in name]
    assert len(added) == 4 * 2 + 4 * 2 + 2
    for name, p in model.named_parameters():
        assert name not in added or not torch.equal(p, before[name]), name


def test_projections_are_matrices_and_other_weights_are_vectors_without_decay() -> None:
    cfg = config(**ALL, optimizer="muon")
    optimizers = Optimizers(cfg, build(cfg, V))
    kinds = {
        optimizers.names[p]: (group["rate"], group["decay"])
        for group in optimizers.groups
        for p in group["params"]
    }
    for name, kind in kinds.items():
        if name.endswith(".shortcut.weight"):
            assert kind == ("lr", "weight_decay")
        elif ".mix." in name or name.endswith(".shortcut.gate"):
            assert kind == ("lr_aux", ""), name


@pytest.mark.parametrize("layers", range(2, 8))
def test_each_layer_of_the_first_half_feeds_its_mirror_image(layers: int) -> None:
    skips = UNetSkips(config(n_layer=layers, unet=True))
    fed = {}
    for layer in range(layers):
        given = skips.take(layer)
        if given is not None:
            fed[layer] = int(given)
        skips.store(layer, torch.tensor(layer))
    assert fed == {layers - 1 - layer: layer for layer in range(layers // 2)}
    assert not skips.outputs, "no output is kept longer than needed"


# -- no information crosses a title or comes from the future


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_keys_from_the_token_before_stay_in_their_title(attention: str) -> None:
    cfg = config(**ALL, title_mask=True)
    model = shaken(cfg)
    model.set_dropout(Plan(cfg, 100_000).at(0), attention)
    other = ids()
    other[:, 1:5] = ids(seed=5)[:, 1:5]  # the first title
    other[:, 10:] = ids(seed=5)[:, 10:]  # the third title, except for its first token
    same = (model(other) - model(ids())).abs().amax((0, 2)) == 0
    assert same.tolist() == [True] + [False] * 4 + [True] * 5 + [False] * 2


@pytest.mark.parametrize("pattern", ["D", "DM", "DMDT"])
@pytest.mark.parametrize("title_mask", [False, True])
def test_no_logit_depends_on_a_later_token(pattern: str, title_mask: bool) -> None:
    model = shaken(config(**ALL, title_mask=title_mask, block_pattern=pattern))
    for cut in (3, 7):
        other = ids()
        other[:, cut:] = ids(seed=5)[:, cut:]
        assert (model(other) - model(ids()))[:, :cut].abs().max() < 1e-12
        assert (model(other) - model(ids()))[:, cut:].abs().max() > 1e-3


def test_shifted_keys() -> None:
    k = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    expected = [[1, 2, 0, 0], [5, 6, 3, 4], [9, 10, 7, 8], [13, 14, 11, 12]]
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert shift_keys(k, 2, None)[0, 0].tolist() == expected
    assert shift_keys(k, 2, bias_of(causal, k.dtype))[0, 0].tolist() == expected
    title = torch.tensor([0, 0, 1, 1])
    bias = bias_of((causal & (title == title.unsqueeze(1)))[None, None], k.dtype)
    expected[2] = [9, 10, 0, 0]
    assert shift_keys(k, 2, bias)[0, 0].tolist() == expected
    assert shift_keys(k[:, :, :1], 2, bias[..., :1, :1])[0, 0].tolist() == [[1, 2, 0, 0]]


# -- the config


@given(st.integers(1, 100), st.floats(0, 1, exclude_min=True))
def test_the_number_of_rotated_channels_is_even_and_near_the_share(half: int, share: float) -> None:
    cfg = config(position="rope", head_dim=2 * half, rope_share=share)
    rotated = cfg.rotated_channels
    assert rotated % 2 == 0 and 2 <= rotated <= 2 * half
    assert rotated == 2 or abs(rotated - 2 * half * share) <= 1


REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a share without rotation": (
        {"rope_share": 0.5},
        "rope_share=0.5 needs position=rope, but position=learned rotates no channels; "
        "set position=rope or rope_share=1",
        {"position": "rope"},
    ),
    "no channels to shift": (
        {"position": "rope", "key_shift": True},
        "key_shift=true needs channels that are not rotated, but position=rope with rope_share=1.0 leaves "
        "none of the 8 channels of a head; set rope_share=0.5, or set key_shift=false",
        {"rope_share": 0.5},
    ),
    "shifted keys without rotation": (
        {"key_shift": True},
        "none of the 8 channels of a head; set position=rope and rope_share=0.5, or set key_shift=false",
        {"position": "rope", "rope_share": 0.5},
    ),
    "a share that is rounded up to all channels": (
        {"position": "rope", "rope_share": 0.9, "key_shift": True},
        "position=rope with rope_share=0.9 leaves none of the 8 channels",
        {"rope_share": 0.5},
    ),
    "heads that are too narrow": (
        {"position": "rope", "rope_share": 0.5, "key_shift": True, "head_dim": 2},
        "leaves none of the 2 channels of a head; make the heads wider with head_dim=4 and rope_share=0.5",
        {"head_dim": 4},
    ),
    "one layer": (
        {"unet": True, "n_layer": 1},
        "unet=true needs two layers to connect, but n_layer=1; set n_layer to 2 or more, or unet=false",
        {"n_layer": 2},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_do_not_fit_together_are_refused_with_a_fix(name: str) -> None:
    fields, message, fix = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        config(**fields)
    assert message in str(error.value)
    config(**fields | fix)


# -- growth

ZERO_ROUTER = {"experts": 4, "top_k": 2, "router": "zero", "noise_snr_db": 20.0}
# The fields that each operation supports. Other operations change no weights.
GROWTH: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "stack_layers": ([0, 0, 1, 1], {"init": "identity"}, {"value_shortcut": True} | SHIFTED),
    "widen_mlp": (20, {}, ALL),
    "widen_model": ({"factor": 2}, {}, {"x0_shortcut": True, "unet": True} | SHIFTED),
    "add_heads": (4, {}, {"x0_shortcut": True, "unet": True} | SHIFTED),
    "upcycle_moe": (ZERO_ROUTER, {}, ALL),
    "set_attn_lora_rank": (2, {}, ALL),
    "set_mlp_lora_rank": (2, {}, ALL),
    "set_embedding_lora_rank": (2, {}, ALL),
    "freeze_layer": (1, {}, ALL),
    "resize_vocabulary": (450, {}, ALL),
}


@pytest.mark.parametrize("name", GROWTH)
def test_an_operation_keeps_the_function_of_the_shortcuts(name: str) -> None:
    value, keys, fields = GROWTH[name]
    model, optimizers = trained(growing_config(**fields), count=1)
    new, _, _ = go_on(model, optimizers, op(name, value, **keys))
    assert logit_change(model, new, IDX)[0] < 1e-10
    assert check_rope(model, new).ok
    go_on(model, optimizers, op(name, value, **keys), count=1)


@pytest.mark.parametrize("name", GROWTH)
def test_operations_that_cannot_extend_a_shortcut_are_refused_before_step_0(name: str) -> None:
    value, _, fields = GROWTH[name]
    growth = {"ops": [{"name": name, "value": value, "trigger": {"step": 3}}]}
    growing_config(growth=growth, **fields)
    for field in SHORTCUTS.keys() - fields.keys():
        with pytest.raises(ConfigError) as error:
            growing_config(growth=growth, **{field: True})
        expected = (
            f"{name} cannot be combined with {field}=true, whose weights it cannot extend; remove the op, or "
            f"set {field}=false"
        )
        assert expected in str(error.value)


# -- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a finished run of a routed model with all fields on."""
    cfg = config(**ALL, num_titles=150, block_pattern="DMDT", title_mask=True, optimizer="muon", lr=0.01)
    out = tmp_path_factory.mktemp("runs")
    train(cfg, out)
    return RunDir(out / cfg.run_id)


def test_a_run_passes_the_guards_that_look_at_the_model(finished: RunDir) -> None:
    summary = finished.summary()
    assert summary is not None
    verdicts = {guard["name"]: guard["status"] for guard in summary["guards"]}
    for name in ("causality", "targets_unseen", "no_learning", "last_and_best"):
        assert verdicts[name] == "pass", name


def test_a_run_cannot_start_from_weights_that_rotate_other_channels(finished: RunDir, tmp_path: Path) -> None:
    fields = {"start": f"run:{finished.path}", "num_titles": 150, "block_pattern": "DMDT"}
    set_up(config(**ALL, **fields))
    for change, text in (
        ({"rope_share": 0.75}, "rope_share is 0.5 in the start and 0.75 in this config"),
        ({"key_shift": False}, "key_shift is True in the start and False in this config"),
        ({"unet": False}, "blocks.2.mix.skip"),
    ):
        with pytest.raises(UsageError, match=text):
            set_up(config(**ALL | fields | change))
