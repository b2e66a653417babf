"""Compares the model, the loss and the optimizers with simple second implementations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mainrun.config import TrainConfig, from_dict
from mainrun.core import attention, kernels
from mainrun.core.average import Average
from mainrun.core.device import Device
from mainrun.core.dropout import Masks, dropout_sites
from mainrun.core.layers import rope_table, rotate
from mainrun.core.optimizers import CautiousAdamW, Muon, Optimizers
from mainrun.data.tokenizer import EOS
from mainrun.plan.plan import Plan, StepInputs
from mainrun.plan.recipes import load
from mainrun.run.session import train
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, State, build, compute_loss

V = 53  # vocabulary
T = 12  # context length in tokens
MODERN: dict[str, Any] = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
    "attn_gate": True,
    "layer_scale": 0.3,
    "value_residual": True,
    "title_mask": True,
    "tie_head": False,
    "softcap": 4.0,
    "n_head": 4,
    "n_kv_head": 2,
    "init_depth_scaled": True,
}
SHORTCUTS: dict[str, Any] = {"value_shortcut": True, "x0_shortcut": True, "unet": True}
PARTLY_ROTATED: dict[str, Any] = {"position": "rope", "rope_share": 0.5, "key_shift": True}


pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> TrainConfig:
    return from_dict(TINY | {"block_size": T} | changes)


def inputs(cfg: TrainConfig, **changes: Any) -> StepInputs:
    return Plan(cfg, 100_000).at(0)._replace(**changes)


def shaken(cfg: TrainConfig, seed: int = 0) -> GPT:
    """Return a model with noise added to all weights, so that no bias is zero and no gain is one."""
    model = build(cfg, V)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.3
    return model.eval()


def some_titles(rows: int = 3, seed: int = 0) -> Tensor:
    """Return token ids of shape (rows, T).

    The <eos> tokens are at random positions and at the middle of each row.
    """
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(3, V, (rows, T), generator=generator)
    idx[torch.rand(rows, T, generator=generator) < 0.15] = EOS
    idx[:, T // 2] = EOS
    return idx


# -- reference implementations, which are simple and slow

TORCH_NAMES = {
    "self_attn.out_proj": "attn.o",
    "linear1": "mlp.up",
    "linear2": "mlp.down",
    "norm1": "attn_norm",
    "norm2": "mlp_norm",
}


def torch_logits(model: GPT, idx: Tensor) -> Tensor:
    """Compute the logits of the baseline with torch's own transformer layers and copied weights."""
    cfg, length = model.cfg, idx.size(1)
    weights = model.state_dict()
    x = weights["embed.weight"][idx] + weights["positions.weight"][:length]
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
    for i in range(cfg.n_layer):
        layer = nn.TransformerEncoderLayer(
            cfg.d_model,
            cfg.n_head,
            cfg.ff_width,
            0.0,
            "gelu",
            batch_first=True,
            norm_first=True,
            dtype=x.dtype,
        )
        mine = {n.removeprefix(f"blocks.{i}."): w for n, w in weights.items() if n.startswith(f"blocks.{i}.")}
        theirs = {
            f"self_attn.in_proj_{kind}": torch.cat([mine[f"attn.{part}.{kind}"] for part in "qkv"])
            for kind in ("weight", "bias")
        }
        for name, other in TORCH_NAMES.items():
            theirs |= {f"{name}.{kind}": mine[f"{other}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(theirs)
        x = layer(x, mask)
    x = F.layer_norm(x, (cfg.d_model,), weights["norm.weight"], weights["norm.bias"])
    return x @ weights["embed.weight"].T


def slow_logits(cfg: TrainConfig, w: dict[str, Tensor], idx: Tensor) -> Tensor:
    """Compute the logits of a dense model from its weights, with support for every option of the model.

    The function computes one token and one head at a time, and applies rotary embeddings as complex numbers.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def norm(x: Tensor, name: str) -> Tensor:
        if cfg.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def head_norm(x: Tensor, name: str) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] if cfg.qk_norm else x
        )

    def turn(x: Tensor, position: int) -> Tensor:
        if cfg.position != "rope":
            return x
        half = cfg.rotated_channels // 2
        speed = cfg.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        z = torch.complex(x[:half], x[half : 2 * half]) * torch.exp(1j * position * speed)
        return torch.cat([z.real, z.imag, x[2 * half :]])

    def shifted(key: Tensor, before: Tensor | None) -> Tensor:
        if not cfg.key_shift:
            return key
        before = torch.zeros_like(key) if before is None else before
        return torch.cat([key[: cfg.rotated_channels], before[cfg.rotated_channels :]])

    rows = []
    for row in idx:
        n = len(row)
        title = [int((row[: i + 1] == EOS).sum()) if cfg.title_mask else 0 for i in range(n)]
        embedded = x = w["embed.weight"][row]
        if cfg.position == "learned":
            x = x + w["positions.weight"][:n]
        first: Tensor | None = None
        inputs = [x]  # of each layer, before the shortcuts
        for i in range(cfg.n_layer):
            block, width = f"blocks.{i}", cfg.head_width
            if cfg.x0_shortcut:
                x = w[f"{block}.mix.x"] * x + w[f"{block}.mix.x0"] * inputs[0]
            if cfg.unet and i > (cfg.n_layer - 1) / 2:
                x = x + w[f"{block}.mix.skip"] * inputs[cfg.n_layer - i]
            seen = norm(x, f"{block}.attn_norm")
            q, k, v = (linear(seen, f"{block}.attn.{part}") for part in "qkv")
            if cfg.value_residual and first is not None:
                share = w[f"{block}.attn.first_share"]
                v = (1 - share) * v + share * first
            if cfg.value_shortcut:
                gates = w[f"{block}.attn.shortcut.gate"].repeat_interleave(width)
                v = v + gates * linear(embedded, f"{block}.attn.shortcut")
            first = v if first is None else first
            gate = (
                2 * torch.sigmoid(linear(seen, f"{block}.attn.gate"))
                if cfg.attn_gate
                else torch.ones(n, cfg.n_head, dtype=x.dtype)
            )
            out = []
            for t in range(n):
                heads = []
                for h in range(cfg.n_head):
                    mine, shared = slice(h * width, (h + 1) * width), h * cfg.kv_heads // cfg.n_head
                    theirs = slice(shared * width, (shared + 1) * width)
                    past = [s for s in range(t + 1) if title[s] == title[t]]
                    query = turn(head_norm(q[t, mine], f"{block}.attn.q_norm"), t)
                    keys = [turn(head_norm(k[s, theirs], f"{block}.attn.k_norm"), s) for s in past]
                    keys = [shifted(key, keys[j - 1] if j else None) for j, key in enumerate(keys)]
                    share = torch.stack([query @ key / math.sqrt(width) for key in keys]).softmax(0)
                    heads.append(gate[t, h] * sum(a * v[s, theirs] for a, s in zip(share, past, strict=True)))
                out.append(torch.cat(heads))
            x = x + linear(torch.stack(out), f"{block}.attn.o") * w.get(f"{block}.attn_scale", 1)
            seen = norm(x, f"{block}.mlp_norm")
            up = linear(seen, f"{block}.mlp.up")
            if cfg.mlp == "swiglu":
                gated = linear(seen, f"{block}.mlp.gate")
                hidden = gated * torch.sigmoid(gated) * up
            else:
                hidden = (
                    up.clamp(min=0) ** 2
                    if cfg.mlp == "relu2"
                    else up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
                )
            x = x + linear(hidden, f"{block}.mlp.down") * w.get(f"{block}.mlp_scale", 1)
            inputs.append(x)
        logits = norm(x, "norm") @ w["embed.weight" if cfg.tie_head else "head.weight"].T
        rows.append(cfg.softcap * torch.tanh(logits / cfg.softcap) if cfg.softcap else logits)
    return torch.stack(rows)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# -- the model


def test_the_baseline_has_the_parameters_of_the_public_one() -> None:
    (cfg,) = load("baseline")
    with torch.device("meta"):
        model = GPT(cfg, cfg.vocab_size)
    assert sum(p.numel() for p in model.parameters()) == 27_172_864


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_baseline_is_torchs_own_transformer(dtype: torch.dtype, tolerance: float) -> None:
    model = shaken(config(n_layer=3)).to(dtype)
    idx = some_titles()
    assert torch.allclose(model(idx), torch_logits(model, idx), atol=tolerance, rtol=1e-5)


def test_the_fresh_baseline_is_torchs_own_transformer_to_1e_5() -> None:
    model, idx = build(config(n_layer=3), V), some_titles()
    assert (model(idx) - torch_logits(model, idx)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "relu2", "n_kv_head": 1},
        MODERN,
        MODERN | {"norm": "layernorm", "bias": True, "qkv_bias": False, "title_mask": False},
        MODERN | SHORTCUTS | PARTLY_ROTATED | {"n_layer": 5},
        SHORTCUTS | PARTLY_ROTATED | {"n_layer": 4, "rope_share": 0.75},
    ],
    ids=["baseline", "relu2 and one kv head", "modern", "modern with biases", "shortcuts", "plain shortcuts"],
)
def test_every_dense_option_is_what_it_says(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    model, idx = shaken(cfg).double(), some_titles(rows=2)
    with torch.no_grad():
        # The tolerance allows for the rounding of the rotary table, which is in float32.
        assert (model(idx) - slow_logits(cfg, weights_of(model), idx)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"norm": "rmsnorm"}),
        ({}, {"position": "rope"}),
        ({"position": "rope"}, {"rope_theta": 20.0}),
        ({}, {"mlp": "relu2"}),
        ({}, {"mlp": "swiglu", "d_ff": 128}),
        ({"mlp": "swiglu"}, {"d_ff": 64}),
        ({}, {"bias": False}),
        ({}, {"qkv_bias": False}),
        ({"bias": False}, {"qkv_bias": True}),
        ({}, {"qk_norm": True}),
        ({}, {"attn_gate": True}),
        ({}, {"layer_scale": 0.1}),
        ({}, {"value_residual": True}),
        ({}, {"value_shortcut": True}),
        ({}, {"x0_shortcut": True}),
        ({}, {"unet": True}),
        ({"position": "rope"}, {"rope_share": 0.5}),
        ({"position": "rope", "rope_share": 0.5}, {"key_shift": True}),
        ({}, {"title_mask": True}),
        ({}, {"tie_head": False}),
        ({}, {"softcap": 3.0}),
        ({}, {"n_head": 4}),
        ({}, {"n_kv_head": 1}),
        ({}, {"n_layer": 3}),
        ({}, {"dtype": "bfloat16"}),
    ],
    ids=lambda d: "+".join(f"{k}={v}" for k, v in d.items()) or "baseline",
)
def test_every_model_field_matters(before: dict[str, Any], change: dict[str, Any]) -> None:
    """Each field changes the output of the model, even if all common weights are equal.

    All weights get gradients.
    """
    old, new = shaken(config(**before)), shaken(config(**before | change), seed=1)
    own = new.state_dict()
    new.load_state_dict(
        {n: w for n, w in old.state_dict().items() if n in own and own[n].shape == w.shape}, strict=False
    )
    idx = some_titles()
    logits = new(idx)
    assert logits.shape == (3, T, V) and logits.isfinite().all()
    assert (logits.float() - old(idx)).abs().max() > 1e-3
    loss = F.cross_entropy(logits.float().flatten(0, 1), idx.flatten())
    loss.backward()
    for name, p in new.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # Without rotary embeddings, a key bias changes all scores of a query equally and gets no gradient.
        assert p.grad.abs().max() > 1e-8 or name.endswith("attn.k.bias"), name


def test_the_start_is_as_documented() -> None:
    more = SHORTCUTS | {"bias": True, "position": "learned", "d_model": 128, "n_layer": 3}
    cfg = config(**MODERN | more)
    model = build(cfg, 1000)
    for name, p in weights_of(model).items():
        if name.endswith(".bias") or name == "positions.weight" or ".attn.gate." in name:
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("_scale"):
            assert (p == 0.3).all() and p.shape == (128,), name
        elif name.endswith("first_share"):
            assert float(p) == 0.5, name
        elif name.endswith((".mix.x0", ".mix.skip", ".shortcut.gate")):
            assert not p.any(), name
        elif name.endswith(".mix.x"):
            assert float(p) == 1, name
        else:
            expected = 0.02 / math.sqrt(6) if ".attn.o." in name or ".mlp.down." in name else 0.02
            assert p.ndim == 2 and abs(float(p.std()) / expected - 1) < 0.03, name
            assert abs(float(p.mean())) < expected / 20, name
    shares = [n for n, _ in model.named_parameters() if n.endswith("first_share")]
    assert shares == ["blocks.1.attn.first_share", "blocks.2.attn.first_share"], (
        "the first layer has nothing before it"
    )
    skips = [n for n, _ in model.named_parameters() if n.endswith("skip")]
    assert skips == ["blocks.2.mix.skip"], "layer 1 is in the middle, so it feeds no other layer"
    plain = build(config(d_model=128, init_std=0.05), V)
    assert all(
        abs(float(p.std()) / 0.05 - 1) < 0.05
        for n, p in weights_of(plain).items()
        if n.startswith("blocks.") and p.ndim == 2
    )


@pytest.mark.parametrize("change", [{"attn_gate": True}, {"layer_scale": 1.0}, {"softcap": 1000.0}])
def test_gates_and_gains_start_neutral(change: dict[str, Any]) -> None:
    old, new, idx = build(config(), V), build(config(**change), V), some_titles()
    new.load_state_dict(old.state_dict(), strict=False)
    assert torch.allclose(old(idx), new(idx), atol=1e-6)


def test_the_seed_decides_every_weight() -> None:
    a, b, other = (weights_of(build(config(seed=seed), V)) for seed in (1, 1, 2))
    torch.manual_seed(99)  # the state of the global random generator must not affect the weights
    again = weights_of(build(config(seed=1), V))
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], again[n]) for n in a)
    assert not torch.equal(a["embed.weight"], other["embed.weight"])


def test_grouped_kv_heads_are_dense_heads_with_repeated_keys_and_values() -> None:
    grouped, dense = shaken(config(n_head=4, n_kv_head=2)), shaken(config(n_head=4))
    weights = grouped.state_dict()
    for name, w in weights.items():
        if ".attn.k." in name or ".attn.v." in name:
            weights[name] = w.view(2, 8, *w.shape[1:]).repeat_interleave(2, dim=0).flatten(0, 1)
    dense.load_state_dict(weights)
    idx = some_titles()
    assert grouped.blocks[0].attn.k.weight.shape == (16, 32)
    assert torch.allclose(grouped(idx), dense(idx), atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rope_table(40, 16, 100.0)
    q, k = (torch.randn(16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    turned_q, turned_k = (rotate(x.expand(1, 1, 40, 16), cos, sin)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-39, 40):
        line = scores.diagonal(distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-4)
    assert scores[0].std() > 0.1, "and on the distance they do depend"
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(40), atol=1e-5)
    assert torch.equal(turned_q[0], q), "position 0 is not turned"


def test_with_rope_and_title_mask_a_title_reads_the_same_wherever_it_stands() -> None:
    model = shaken(config(position="rope", title_mask=True))
    title = torch.tensor([EOS, 7, 8, 9, 10])
    early = torch.cat([title, torch.tensor([EOS, 20, 21, 22, 23, 24, 25])])
    late = torch.cat([torch.tensor([EOS, 30, 31, 32, EOS, 33, 34]), title])
    logits = model(torch.stack([early, late]))
    assert torch.allclose(logits[0, :5], logits[1, 7:], atol=1e-5)


architectures = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "position": st.sampled_from(["learned", "rope"]),
        "mlp": st.sampled_from(["gelu", "relu2", "swiglu"]),
        "n_kv_head": st.sampled_from([0, 1, 2]),
        "layer_scale": st.sampled_from([0.0, 0.5]),
        "softcap": st.sampled_from([0.0, 5.0]),
        "n_layer": st.integers(1, 3),
        **dict.fromkeys(["bias", "qk_norm", "attn_gate", "value_residual", "tie_head"], st.booleans()),
    }
)


@given(architectures, st.booleans(), st.integers(1, T - 1), st.integers(0, 1000))
@settings(max_examples=25)
def test_no_logit_sees_a_later_token(fields: dict[str, Any], title_mask: bool, at: int, seed: int) -> None:
    model, idx = shaken(config(**fields, title_mask=title_mask), seed), some_titles(seed=seed)
    changed = idx.clone()
    # Replace the token with another word. Replacing an <eos> token merges two titles.
    changed[:, at] = 3 + (idx[:, at] - 3 + 1) % (V - 3)
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.allclose(before[:, :at], after[:, :at], atol=1e-6)
    assert not torch.allclose(before[:, at], after[:, at], atol=1e-3)


@given(architectures, st.integers(1, T - 1), st.integers(0, 1000))
@settings(max_examples=25)
def test_title_mask_hides_earlier_titles(fields: dict[str, Any], start: int, seed: int) -> None:
    """A title can see the words before its <eos> only if there is no title mask."""
    idx = some_titles(seed=seed)
    idx[:, start] = EOS
    idx[:, start + 1 :][idx[:, start + 1 :] == EOS] = 5  # the last title of each row starts at `start`
    changed = idx.clone()
    words = idx[:, :start] != EOS
    words[:, 0] = True
    changed[:, :start][words] = 3 + (idx[:, :start][words] + 11) % (V - 3)
    masked, open_ = (shaken(config(**fields, title_mask=mask), seed) for mask in (True, False))
    with torch.no_grad():
        assert torch.allclose(masked(idx)[:, start:], masked(changed)[:, start:], atol=1e-6)
        assert not torch.allclose(open_(idx)[:, start:], open_(changed)[:, start:], atol=1e-4)


def test_softcap_bounds_the_logits() -> None:
    model, free, idx = shaken(config(softcap=2.0)), shaken(config()), some_titles()
    with torch.no_grad():
        for m in (model, free):
            m.norm.weight *= 20  # type: ignore[operator]
        assert free(idx).abs().max() > 20
        assert 1.99 < model(idx).abs().max() <= 2.0


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model, idx = shaken(config(dtype="bfloat16")), some_titles()
    assert model(idx).dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.parameters())
    exact = shaken(config())(idx)
    gap = (model(idx).float() - exact).abs().max()
    assert 0 < gap < 0.05 * exact.abs().max()


def test_dropout_has_four_places_and_none_in_evaluation() -> None:
    cfg = config()
    model, idx = shaken(cfg), some_titles()
    still = model(idx)
    places = ("dropout", "attn_dropout", "resid_dropout", "stochastic_depth")
    for place in places:
        at = inputs(cfg, **dict.fromkeys(places, 0.0) | {place: 0.5})
        model.set_dropout(at, "plain")
        assert torch.equal(model(idx), still), "a score gives no masks"
        a, b, again = (model(idx, masks(cfg, at, idx, seed)) for seed in (3, 4, 3))
        assert torch.equal(a, again) and not torch.allclose(a, b, atol=1e-3), place
        assert not torch.allclose(a, still, atol=1e-3), place


def masks(cfg: TrainConfig, at: StepInputs, idx: Tensor, seed: int) -> Tensor | None:
    wide = cfg.model_copy(update={"block_size": idx.size(1)})
    machine = Device(cfg)
    machine.seed([seed])
    return machine.masks(dropout_sites(wide, at, len(idx), "plain"), 0)


def test_every_mask_is_used_once_and_drops_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dropout layer uses its own mask, drops the configured share, and scales up the rest."""
    cfg = config(n_layer=3)
    model, idx = shaken(cfg), some_titles()
    at = inputs(cfg, dropout=64 / 256, attn_dropout=32 / 256, resid_dropout=16 / 256)
    model.set_dropout(at, "plain")
    taken: list[tuple[int, int]] = []
    dropped: list[float] = []
    take, drop, attend = Masks.take, Masks.drop, attention.attend

    def take_too(self: Masks, shape: Any) -> Tensor:
        start = self.used
        found = take(self, shape)
        taken.append((start, self.used))
        assert torch.equal(found.flatten(), self.pool[start : self.used])
        return found

    def drop_too(self: Masks, x: Tensor, p: float) -> Tensor:
        start, y = self.used, drop(self, x, p)
        kept = self.pool[start : self.used].view(x.shape).bool()
        assert torch.equal(y, torch.where(kept, x * (1 / (1 - p)), 0))
        dropped.append(p)
        return y

    def attend_too(*args: Any) -> Tensor:
        dropped.append(args[-1])
        return attend(*args)

    monkeypatch.setattr(Masks, "take", take_too)
    monkeypatch.setattr(Masks, "drop", drop_too)
    monkeypatch.setattr(attention, "attend", attend_too)
    pool = masks(cfg, at, idx, 1)
    assert pool is not None
    model(idx, pool)
    assert dropped == [0.25, *[0.125, 0.0625, 0.0625] * 3]
    assert [start for start, _ in taken] == [0, *(end for _, end in taken[:-1])] and taken[-1][1] == len(pool)
    places = dropout_sites(cfg.model_copy(update={"block_size": idx.size(1)}), at, len(idx), "plain")
    assert [end - start for start, end in taken] == [size for size, _ in places]
    machine = Device(cfg)
    machine.seed([5])
    big = machine.masks([(1_000_000, 0.25), (1_000_000, 1 / 256), (1_000_000, 255 / 256)], 0)
    assert big is not None
    for part, p in zip(big.split(1_000_000), (0.25, 1 / 256, 255 / 256), strict=True):
        assert abs(1 - part.float().mean().item() - p) < 5 * (p * (1 - p) / 1e6) ** 0.5


def test_the_two_ways_of_attention_agree() -> None:
    shifted = SHORTCUTS | PARTLY_ROTATED | {"title_mask": True}
    for changes in ({}, {"title_mask": True}, {"n_kv_head": 1, "position": "rope", "qk_norm": True}, shifted):
        cfg = config(**changes)
        model, idx = shaken(cfg), some_titles()
        plain = model(idx)
        model.set_dropout(inputs(cfg), "sdpa")
        assert torch.allclose(model(idx), plain, atol=1e-5) and not torch.equal(model(idx), plain), (
            "else it is one way"
        )


# -- the loss


def test_label_smoothing_is_torchs() -> None:
    cfg = config()
    model, idx = shaken(cfg).train(), some_titles()
    x, y = idx[:, :-1], idx[:, 1:]
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.2)
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    for rdrop in (0.0, 3.0):  # without dropout, the two forward passes of R-Drop are equal
        loss, logged, _ = compute_loss(model, x, y, inputs(cfg, label_smoothing=0.2, rdrop=rdrop), None)
        assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(logged, plain, atol=1e-6)
        assert not logged.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rdrop_is_its_formula(smoothing: float) -> None:
    cfg = config(dropout=0.3)
    model, idx = shaken(cfg).train(), some_titles()
    x, y = idx[:, :-1], idx[:, 1:].flatten()
    model.set_dropout(inputs(cfg), "plain")
    pool = masks(cfg, inputs(cfg), torch.cat([x, x]), 5)
    loss, logged, _ = compute_loss(
        model, x, idx[:, 1:], inputs(cfg, rdrop=0.7, label_smoothing=smoothing), pool
    )
    one, two = model(torch.cat([x, x]), pool).chunk(2)
    p, q = one.flatten(0, 1).softmax(-1), two.flatten(0, 1).softmax(-1)
    rows = torch.arange(len(y))
    cross = -(p[rows, y].log().mean() + q[rows, y].log().mean()) / 2
    uniform = -(p.log().mean() + q.log().mean()) / 2
    agreement = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    assert agreement > 0.01, "two masks disagree, else this shows nothing"
    assert torch.allclose(loss, (1 - smoothing) * cross + smoothing * uniform + 0.7 * agreement, atol=1e-5)
    assert torch.allclose(logged, cross, atol=1e-5)


@pytest.mark.parametrize("chunk", [40, 1_000_000])
def test_the_gradient_of_rdrop_is_that_of_its_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", {"cpu": chunk})  # 40 logits: two tokens of two passes at a time
    torch.manual_seed(0)
    logits = torch.randn(14, 10, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 10, (7,))
    log_p = logits.log_softmax(-1)
    a, b = log_p.chunk(2)
    agreement = ((a.exp() - b.exp()) * (a - b)).sum(-1).mean() / 2
    loss = F.cross_entropy(logits, torch.cat([y, y]), label_smoothing=0.1) + 0.7 * agreement
    expected = torch.autograd.grad(3 * loss, logits)[0]

    got, plain = kernels.rdrop(logits, y, 0.7, 0.1)
    grad = torch.autograd.grad(3 * got, logits)[0]
    assert torch.allclose(got, loss, atol=1e-12)
    assert torch.allclose(plain, F.cross_entropy(logits, torch.cat([y, y])), atol=1e-12)
    assert torch.allclose(grad, expected, atol=1e-12)


def test_rdrop_without_dropout_is_cross_entropy() -> None:
    cfg = config()
    model, idx = shaken(cfg).train(), some_titles()
    loss, logged, _ = compute_loss(model, idx[:, :-1], idx[:, 1:], inputs(cfg, rdrop=5.0), None)
    expected = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(logged, expected, atol=1e-6)


# -- the optimizers


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize(
    "changes",
    [{}, MODERN, MODERN | {"bias": True, "position": "learned"}],
    ids=["baseline", "modern", "all kinds"],
)
def test_every_parameter_is_in_exactly_one_group(optimizer: str, changes: dict[str, Any]) -> None:
    cfg = config(optimizer=optimizer, momentum=0.9, **changes)
    model = build(cfg, V)
    optimizers = Optimizers(cfg, model)
    names = {p: n for n, p in model.named_parameters()}
    found = [(names[p], o, g) for o in optimizers.all for g in o.param_groups for p in g["params"]]
    assert sorted(n for n, _, _ in found) == sorted(names.values())
    for name, owner, group in found:
        p = model.get_parameter(name)
        inner = name.startswith("blocks.") and p.ndim == 2
        assert group["rate"] == ("lr" if inner else "lr_aux"), name
        assert (group["decay"] != "") == (p.ndim == 2), name
        assert isinstance(owner, Muon) == (optimizer == "muon" and inner), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_decay_shrinks_matrices_and_tables_at_their_own_rates_and_leaves_vectors(optimizer: str) -> None:
    cfg = config(optimizer=optimizer, layer_scale=0.3)
    model = shaken(cfg)
    before = weights_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    at = inputs(cfg, lr=0.1, lr_aux=0.02, weight_decay=0.5, weight_decay_aux=0.25)
    Optimizers(cfg, model).step(at)
    for name, p in model.named_parameters():
        shrink = 1.0
        if p.ndim == 2:
            shrink = 1 - 0.1 * 0.5 if name.startswith("blocks.") else 1 - 0.02 * 0.25
        assert torch.allclose(p, before[name] * shrink, rtol=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cautious_decay_shrinks_only_weights_that_the_update_shrinks(optimizer: str) -> None:
    """Compare a run with a run without decay, whose steps show the direction of each update."""
    cfg = config(optimizer=optimizer, momentum=0.9, cautious_decay=True)
    models = [shaken(cfg).double(), shaken(cfg).double()]
    decayed, plain = models
    optimizers = [Optimizers(cfg, model) for model in models]
    at = inputs(cfg, lr=0.1, lr_aux=0.02, weight_decay=0.5, weight_decay_aux=0.25)
    shrunk = total = 0
    for step in range(3):
        before = weights_of(decayed)
        plain.load_state_dict(decayed.state_dict())
        for i, (a, b) in enumerate(zip(*(model.parameters() for model in models), strict=True)):
            a.grad = torch.randn_like(a, generator=torch.Generator().manual_seed(100 * step + i))
            b.grad = a.grad.clone()
        optimizers[0].step(at)
        optimizers[1].step(at._replace(weight_decay=0.0, weight_decay_aux=0.0))
        for (name, p), q in zip(decayed.named_parameters(), plain.parameters(), strict=True):
            update = q.detach() - before[name]
            share = 0.1 * 0.5 if name.startswith("blocks.") else 0.02 * 0.25
            shrinks = (update * before[name] < 0) & (p.ndim == 2)
            assert torch.allclose(p, q - share * before[name] * shrinks, atol=1e-12), name
            if p.ndim == 2:
                shrunk += int(shrinks.sum())
                total += p.numel()
    assert 0.3 < shrunk / total < 0.7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cautious_decay_leaves_weights_that_no_update_moves(optimizer: str) -> None:
    cfg = config(optimizer=optimizer, cautious_decay=True)
    model = shaken(cfg)
    before = weights_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizers(cfg, model).step(inputs(cfg, lr=0.1, lr_aux=0.02, weight_decay=0.5))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cautious_decay_reads_no_value_of_a_tensor(optimizer: str) -> None:
    """A CUDA graph can record the decay, because fake tensors, which have no values, are enough for it."""
    cfg = config(optimizer=optimizer, cautious_decay=True)
    with FakeTensorMode():
        state = State(cfg, GPT(cfg, V))
        for p in state.model.parameters():
            p.grad = torch.zeros_like(p)
        state.optimizers.set_rates(inputs(cfg, weight_decay=0.5), 0)
        for _ in range(2):
            for owner in state.optimizers.all:
                if isinstance(owner, CautiousAdamW):
                    owner.decay()
                    owner.state = {p: {"exp_avg": torch.zeros_like(p)} for p in state.model.parameters()}
                else:
                    owner.step()


def test_cautious_adamw_keeps_the_decay_of_its_groups() -> None:
    cfg = config(optimizer="adamw", cautious_decay=True)
    model = shaken(cfg)
    optimizers = Optimizers(cfg, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(inputs(cfg, weight_decay=0.5, weight_decay_aux=0.25))
    assert [type(owner) for owner in optimizers.all] == [CautiousAdamW]
    assert sorted(group["weight_decay"] for group in optimizers.groups) == [0.0, 0.25, 0.5]


def hand_written_steps(
    cfg: TrainConfig, w: dict[str, Tensor], batches: list[Tensor], at: StepInputs
) -> dict[str, Tensor]:
    """Compute the steps of SGD with Nesterov momentum, or of AdamW, from their formulas.

    The gradients come from `slow_logits`, and are clipped before each update.
    """
    w = {n: p.clone() for n, p in w.items()}
    first, second = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for step, idx in enumerate(batches, 1):
        leaves = {n: p.requires_grad_() for n, p in w.items()}
        logp = slow_logits(cfg, leaves, idx[:, :-1]).log_softmax(-1)
        loss = -logp.gather(-1, idx[:, 1:, None]).mean()
        gradients = dict(zip(w, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        new = {}
        for name, p in w.items():
            p = p.detach()
            rate = at.lr if name.startswith("blocks.") and p.ndim == 2 else at.lr_aux
            decay = at.weight_decay if name.startswith("blocks.") else at.weight_decay_aux
            if p.ndim < 2:
                decay = 0.0
            g = gradients[name] * min(1.0, cfg.clip / (norm + 1e-6))
            if cfg.optimizer == "sgd":
                g = g + decay * p
                first[name] = g if step == 1 else cfg.momentum * first[name] + g
                new[name] = p - rate * (g + cfg.momentum * first[name])
            else:
                first[name] = cfg.beta1 * first[name] + (1 - cfg.beta1) * g
                second[name] = cfg.beta2 * second[name] + (1 - cfg.beta2) * g.square()
                m, v = first[name] / (1 - cfg.beta1**step), second[name] / (1 - cfg.beta2**step)
                new[name] = p * (1 - rate * decay) - rate * m / (v.sqrt() + cfg.eps)
        w = new
    return w


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_three_steps_are_the_reference_steps(changes: dict[str, Any]) -> None:
    cfg = config(n_layer=1, clip=0.5, norm="rmsnorm", qkv_bias=False, **changes)
    model = shaken(cfg).double()
    at = inputs(cfg, lr=0.05, lr_aux=0.02, weight_decay=0.1, weight_decay_aux=0.2)
    batches = [some_titles(rows=2, seed=s)[:, :6] for s in range(3)]
    expected = hand_written_steps(cfg, weights_of(model), batches, at)
    start, optimizers = weights_of(model), Optimizers(cfg, model)
    for idx in batches:
        model.zero_grad()
        logits = model(idx[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizers.step(at)
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-8), name
        assert not torch.allclose(p, start[name], atol=1e-4), name


def test_muon_moves_matrices_by_the_nearest_orthogonal_one_at_adamws_size() -> None:
    cfg = config(optimizer="muon", momentum=0.0)
    model = shaken(cfg)
    before = weights_of(model)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    gradients = {n: p.grad for n, p in model.named_parameters()}
    Optimizers(cfg, model).step(inputs(cfg, lr=0.1, lr_aux=0.01, weight_decay=0.0))
    for name, p in model.named_parameters():
        update = before[name] - p.detach()
        if name.startswith("blocks.") and p.ndim == 2:
            g = gradients[name]
            assert g is not None
            u, _, vt = torch.linalg.svd(g, full_matrices=False)
            nearest = u @ vt
            assert F.cosine_similarity(update.flatten(), nearest.flatten(), dim=0) > 0.9, name
            assert 0.1 * 0.2 * 0.6 < update.square().mean().sqrt() < 0.1 * 0.2 * 1.3, name
        else:  # the first step of AdamW changes every weight by about the learning rate
            assert torch.allclose(update.abs(), torch.full_like(update, 0.01), rtol=1e-3), name


def test_muon_in_batches_is_torchs_muon_one_by_one() -> None:
    cfg = config(optimizer="muon", momentum=0.9)
    ours, theirs = (
        [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in SHAPES]
        for _ in "ab"
    )
    mine = Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.2}], momentum=cfg.momentum)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + i))
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        # Batched matrix products round differently in bfloat16.
        assert torch.allclose(a, b, atol=2e-3), a.shape
        assert not torch.allclose(
            a, torch.randn(a.shape, generator=torch.Generator().manual_seed(1)), atol=0.1
        )


SHAPES = [(8, 8), (8, 32), (32, 8), (8, 8), (8, 32)]


def test_muon_remembers_earlier_gradients() -> None:
    """With a Nesterov momentum of 0.9, the first gradient still affects the second step."""
    cfg = config(optimizer="muon", momentum=0.9)
    model = shaken(cfg)
    optimizers = Optimizers(cfg, model)
    steps = [
        {
            n: torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            for n, p in model.named_parameters()
        }
        for i in (1, 2)
    ]
    for gradients in steps:
        before = weights_of(model)
        for n, p in model.named_parameters():
            p.grad = gradients[n].clone()
        optimizers.step(inputs(cfg, lr=0.1, lr_aux=0.01, weight_decay=0.0))

    def nearest(matrix: Tensor) -> Tensor:
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vt

    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            first, second = (g[name] for g in steps)
            average = 0.9 * 0.1 * first + 0.1 * second
            like, unlike = nearest(0.1 * second + 0.9 * average), nearest(second)
            update = before[name] - p.detach()
            assert F.cosine_similarity(update.flatten(), like.flatten(), dim=0) > 0.9, name
            assert F.cosine_similarity(update.flatten(), unlike.flatten(), dim=0) < 0.9, name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_an_optimizers_state_goes_out_and_comes_back(optimizer: str) -> None:
    cfg = config(optimizer=optimizer, momentum=0.9)
    one, two = shaken(cfg), shaken(cfg)
    a, b = Optimizers(cfg, one), Optimizers(cfg, two)
    at = inputs(cfg, lr=0.01, lr_aux=0.01)

    def steps(model: GPT, optimizers: Optimizers, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizers.step(at)

    steps(one, a, range(3))
    two.load_state_dict(one.state_dict())
    b.load({k: v.clone() for k, v in a.state().items()})
    steps(one, a, range(3, 6))
    steps(two, b, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert {k.rsplit("/", 1)[1] for k in a.state()} <= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


# -- accumulation and averages


def test_accumulation_is_a_memory_setting(tmp_path: Path) -> None:
    runs = []
    for pieces in (1, 4):
        cfg = config(num_titles=200, grad_accum=pieces, lr=0.1, lr_aux=0.1, eval_per_epoch=0)
        train(cfg, tmp_path)
        runs.append(RunDir(tmp_path / cfg.run_id))
    losses = [[r["loss"] for r in run.metrics() if r["event"] == "step"] for run in runs]
    assert len(losses[0]) > 10 and losses[0][0] - losses[0][-1] > 0.1, "it learnt something"
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    a, b = (newest_tensors(run) for run in runs)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def newest_tensors(run: RunDir) -> dict[str, Tensor]:
    found = checkpoint.load_newest(run.checkpoints, lambda meta: None, lambda text: None)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"swa": 0.5}], ids=["ema", "swa"])
def test_the_average_is_its_formula(changes: dict[str, Any]) -> None:
    cfg = config(**changes)
    plan = Plan(cfg, 8 * T * 20 + 1)
    assert plan.steps == 20
    model = shaken(cfg)
    average = Average(cfg, model)
    history = [weights_of(model)]
    for step in range(plan.steps):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        average.update(plan.at(step))
        history.append(weights_of(model))
    for name in history[0]:
        expected = history[0][name]
        if cfg.ema:
            for step, new in enumerate(history[1:]):
                keep = min(0.9, (1 + step) / (10 + step))
                expected = keep * expected + (1 - keep) * new[name]
        else:  # SWA is the mean of the weights over the last half of the steps
            expected = torch.stack([w[name] for w in history[-10:]]).mean(0)
        assert torch.allclose(average.shadow[name], expected, atol=1e-5), name
    live = weights_of(model)
    with average.applied():
        scored = weights_of(model)
    assert all(torch.equal(scored[n], average.shadow[n]) for n in scored)
    assert all(torch.equal(live[n], p) for n, p in model.named_parameters()), (
        "the trained weights come back to the last bit"
    )
    assert not torch.allclose(scored["embed.weight"], live["embed.weight"])


def test_without_an_average_the_trained_weights_are_scored() -> None:
    cfg = config()
    model = shaken(cfg)
    average, before = Average(cfg, model), weights_of(model)
    average.update(inputs(cfg))
    with average.applied():
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters()) and not average.shadow
