"""The operations that change a model. Each operation computes the new parameters from the old parameters.

Each dimension of a parameter belongs to a named space, for example the hidden units; see SPACES. An operation
maps the spaces of the new model to the spaces of the old model. The operation also scales parameters so that
both models compute the same function. All random numbers come from the seed of the operation.

To add an operation, write a function that takes a Change and returns Pieces. Then add a row to OPS at the end
of this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.initial import initial_std
from mainrun.growth.moments import IndexMap, Piece, along
from mainrun.plan.ops import Op
from mainrun.train import GPT

# Each letter names a space: D = model width, V = vocabulary, T = positions, H = heads, F = hidden units,
# h = channels of one head, Q = channels of all query heads, K = channels of all key or all value heads,
# N = key/value heads, E = experts, R = rank of low-rank terms in attention, L = rank of low-rank terms in
# MLPs, S = rank of the low-rank term of the embedding, P = hidden units of a predictor of surprise, Z = the
# single output of a linear score.
SPACES = {
    "embed.weight": "VD", "embed.lora_a": "SD", "embed.lora_b": "VS",
    "positions.weight": "TD", "head.weight": "VD",
    "attn.q.weight": "QD", "attn.q.lora_a": "RD", "attn.q.lora_b": "QR", "attn.q.bias": "Q",
    "attn.k.weight": "KD", "attn.k.lora_a": "RD", "attn.k.lora_b": "KR", "attn.k.bias": "K",
    "attn.v.weight": "KD", "attn.v.lora_a": "RD", "attn.v.lora_b": "KR", "attn.v.bias": "K",
    "attn.o.weight": "DQ", "attn.o.lora_a": "RQ", "attn.o.lora_b": "DR", "attn.o.bias": "D",
    "attn.gate.weight": "HD", "attn.q_norm.weight": "h", "attn.k_norm.weight": "h", "attn.first_share": "",
    "attn.shortcut.weight": "KD", "attn.shortcut.gate": "N", "mix.x": "", "mix.x0": "", "mix.skip": "",
    "mlp.up.weight": "FD", "mlp.up.lora_a": "LD", "mlp.up.lora_b": "FL", "mlp.up.bias": "F",
    "mlp.gate.weight": "FD", "mlp.gate.lora_a": "LD", "mlp.gate.lora_b": "FL", "mlp.gate.bias": "F",
    "mlp.down.weight": "DF", "mlp.down.lora_a": "LF", "mlp.down.lora_b": "DL", "mlp.down.bias": "D",
    "mlp.router.weight": "ED",
    "attn_scale": "D", "mlp_scale": "D",
    "router.score.weight": "ZD", "router.now.weight": "ZD", "router.before.weight": "ZD", "router.bias": "Z",
    "router.o_ce": "", "router.m_cu": "", "router.prior_norm.weight": "D",
    "router.prior.gate.weight": "PD", "router.prior.up.weight": "PD", "router.prior.down.weight": "DP",
    **{f"{norm}.{kind}": "D" for norm in ("norm", "attn_norm", "mlp_norm") for kind in ("weight", "bias")},
}  # fmt: skip

Pieces = dict[str, Piece]


def part(name: str) -> str:
    """Shorten the name of a parameter: `blocks.3.mlp.experts.1.up.weight` becomes `mlp.up.weight`."""
    return re.sub(r"^blocks\.\d+\.|experts\.\d+\.", "", name)


def flow(name: str) -> tuple[str, str]:
    """Return the output space and the input space of a parameter. The input space of a vector is ""."""
    spaces = SPACES[part(name)]
    if len(spaces) < 2:
        return spaces, ""
    rows = spaces[0]
    columns = spaces[1]
    if name.startswith(("embed.", "positions.")):  # each row of a lookup table belongs to one input
        return columns, rows
    return rows, columns


@dataclass
class Change:
    """The input of an operation: the old and new configs and parameters, and a random generator."""

    op: Op
    before: TrainConfig
    after: TrainConfig
    old: dict[str, nn.Parameter]
    new: dict[str, nn.Parameter]  # the new parameters, of which only the shapes are used
    generator: torch.Generator
    truncated: dict[str, float] = field(default_factory=dict)  # see IndexMap.truncated

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def rms(self, name: str) -> float:
        """Return the root mean square of a parameter in the old model."""
        return float(self.old[name].detach().float().square().mean().sqrt())

    def by_space(self, **spaces: Tensor) -> Pieces:
        """Map each new parameter to the old parameter of the same name, using the index of each given space.

        A parameter that does not exist in the old model becomes zero.
        """
        pieces: Pieces = {}
        for name in self.new:
            if name in self.old:
                index = tuple(spaces.get(space) for space in SPACES[part(name)])
                pieces[name] = Piece(name, index)
            else:
                pieces[name] = Piece(None)
        return pieces

    def fill(self, pieces: Pieces, parts: tuple[str, ...], dim: int, std: float | None = None) -> None:
        """Set the new elements along a dimension to random values.

        parts: the short names of the parameters, as returned by `part`.
        std: the standard deviation; by default that of the initial weights of the new model.
        """
        for name, piece in pieces.items():
            if part(name) not in parts:
                continue
            index = piece.index[dim]
            if index is None:
                continue
            shape = self.new[name].shape
            is_new = along((index < 0).float(), dim, len(shape))
            usual = initial_std(self.after, name.removesuffix(".weight"), shape[1])
            random = self.normal(shape, usual if std is None else std)
            pieces[name] = replace(piece, plus=random * is_new)


# -- a new model


def grow(op: Op, before: TrainConfig, after: TrainConfig, model: GPT, seed: int) -> tuple[GPT, IndexMap]:
    """Return the new model and the index map of its parameters. The old model does not change.

    before, after: the configs of the old and the new model.
    seed: the seed of all random numbers in the operation.
    """
    new = empty_model(model, after)
    pieces, moved = map_parameters(op, before, after, model, new, seed)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in new.named_parameters():
            value = pieces[name].value(old, p)
            # without this check, copy_ would silently broadcast a tensor of the wrong shape
            assert value.shape == p.shape, f"{name}: {tuple(value.shape)} for {tuple(p.shape)}"
            p.copy_(value)
    return new, moved


def map_parameters(
    op: Op, before: TrainConfig, after: TrainConfig, model: GPT, new: GPT, seed: int
) -> tuple[Pieces, IndexMap]:
    """Return the pieces of all parameters, and the index map of the trainable parameters.

    new: the new model, which may be on the meta device, because its values are not read.
    """
    old = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    change = Change(op, before, after, old, dict(new.named_parameters()), generator)
    pieces = OPS[op.name](change)
    old_shapes = {name: p.shape for name, p in old.items()}
    new_shapes = {name: p.shape for name, p in new.named_parameters() if p.requires_grad}
    trained_pieces = {name: pieces[name] for name in new_shapes}
    return pieces, IndexMap(trained_pieces, old_shapes, new_shapes, change.truncated)


def meta_model(model: GPT, cfg: TrainConfig) -> GPT:
    """Return a model for the config `cfg` on the meta device, where tensors have shapes but no values."""
    with torch.device("meta"):
        return GPT(cfg, model.embed.num_embeddings - model.cfg.unused_ids)


def empty_model(model: GPT, cfg: TrainConfig) -> GPT:
    """Return an uninitialised model for the config `cfg`, with the dtype, device and mode of `model`."""
    new = meta_model(model, cfg).to(model.embed.weight.dtype).to_empty(device=model.embed.weight.device)
    new.train(model.training)
    buffers = dict(model.named_buffers())
    for name, buffer in new.named_buffers():
        # operations do not change buffers, which do not depend on the weights
        if name in buffers:
            buffer.copy_(buffers[name])
    for block in new.blocks:
        block.attn.fused = model.blocks[0].attn.fused
    return new


# -- depth

# the output parameters of the two residual branches of a block
BRANCH_ENDS = (
    "attn.o.weight",
    "attn.o.bias",
    "attn.o.lora_b",
    "mlp.down.weight",
    "mlp.down.bias",
    "mlp.down.lora_b",
)


def stack_layers(change: Change) -> Pieces:
    """Copy each new layer from its source layer.

    With init=identity, all copies of a layer except the first return their input unchanged at the start,
    because the output weights of their branches are zero. The first layer of a model has no `first_share`, so
    the `first_share` of its copies starts at zero.
    """
    sources = change.op.value
    pieces: Pieces = {}
    for name in change.new:
        match = re.match(r"blocks\.(\d+)\.(.+)", name)
        if not match:
            pieces[name] = Piece(name)
            continue
        layer = int(match[1])
        source = f"blocks.{sources[layer]}.{match[2]}"
        inserted = change.op.init == "identity" and sources[layer] in sources[:layer]
        if source not in change.old or (inserted and part(name) in BRANCH_ENDS):
            pieces[name] = Piece(None)
        elif inserted:
            # The output weights of the branch are zero, so the gradient is zero at first. The momentum of the
            # source would be wrong.
            pieces[name] = Piece(source, grad=None)
        else:
            pieces[name] = Piece(source)
    return pieces


# -- width


def widen_mlp(change: Change) -> Pieces:
    """Add hidden units to each MLP.

    With init=copy, the new units are copies of random units. With init=identity, the input weights of new
    units are random, and the output weights of new units are zero. The low-rank terms of a unit are copied
    together with the weights of the unit.
    """
    old = change.before.ff_width
    new = change.after.ff_width
    if new < old:
        raise ValueError(
            f"hidden width {new} is below the current hidden width {old}; give an integer above {old}"
        )
    pieces = change.by_space()
    for name in change.new:
        if part(name) != "mlp.up.weight":
            continue
        if change.op.init == "identity":
            units = torch.cat([torch.arange(old), torch.full((new - old,), -1)])
            share = torch.ones(new, dtype=torch.float64)
        else:
            units, share = _copied_units(old, new, change.generator)
        mlp = name.removesuffix("up.weight")
        mapped: Pieces = {}
        for matrix in (f"{mlp}down.weight", f"{mlp}down.lora_a"):
            mapped[matrix] = Piece(matrix, (None, units), weight=share)
        for side in (f"{mlp}up", f"{mlp}gate"):
            for matrix in (f"{side}.weight", f"{side}.lora_b"):
                mapped[matrix] = Piece(matrix, (units, None), grad=share.unsqueeze(1))
            mapped[f"{side}.bias"] = Piece(f"{side}.bias", (units,), grad=share)
        for mapped_name, piece in mapped.items():
            if mapped_name in change.new:
                pieces[mapped_name] = piece
    change.fill(pieces, ("mlp.up.weight", "mlp.gate.weight"), 0)
    return pieces


def _copied_units(old: int, new: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the source of each hidden unit, and the unit's share of the source's output.

    The source of a new unit is random. Copies of a unit get unequal shares, because copies with equal shares
    would get equal gradients and stay equal.
    """
    units = torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])
    share = torch.rand(new, generator=generator, dtype=torch.float64) + 0.5
    share /= torch.zeros(old, dtype=torch.float64).index_add(0, units, share)[units]
    return units, share


def channels(heads: Tensor, width: int) -> Tensor:
    """Return the source channel of each channel, given the source head of each head.

    The number -1 stands for a new head or a new channel.
    """
    index = heads.unsqueeze(1) * width + torch.arange(width)
    return index.where(heads.unsqueeze(1) >= 0, torch.tensor(-1)).flatten()


def widen_model(change: Change) -> Pieces:
    """Copy each channel n times, as in HyperCloning. Weights whose inputs are copied are divided by n."""
    before = change.before
    after = change.after
    if after.head_width != before.head_width:
        got = f"the head width would change from {before.head_width} to {after.head_width}"
        raise ValueError(
            f"{got}; keep the head width, because rotary positions and attention scores depend on it"
        )
    n = after.d_model // before.d_model
    snr_db = change.op.value.get("noise_snr_db")
    spaces = _copied_spaces(before, after, n)
    pieces = change.by_space(**spaces)
    for name, piece in pieces.items():
        writes, reads = flow(name)
        weight = 1.0
        grad = 1.0
        if reads in spaces:
            weight = 1 / n
        if writes in spaces:
            grad = 1 / n  # each of n copies receives 1/n of the gradient
        if before.tie_head and name in ("norm.weight", "norm.bias"):
            # a tied head sums n copies of each product, so the weight of the final norm is divided by n
            weight = 1 / n
            grad = 1.0
        plus = None
        if snr_db is not None and reads in spaces:
            plus = _paired_noise(change, name, spaces[reads], n, snr_db)
        pieces[name] = replace(piece, weight=weight, grad=grad, plus=plus)
    return pieces


def _copied_spaces(before: TrainConfig, after: TrainConfig, n: int) -> dict[str, Tensor]:
    """Return the indices of all spaces that change when the model width is multiplied by n."""
    heads = torch.arange(before.n_head)
    spaces: dict[str, Tensor] = {}
    if after.kv_heads == before.kv_heads:
        # the copies of a query head stay in one group, because all copies use the same keys and values
        heads = heads.repeat_interleave(n)
    else:
        heads = heads.repeat(n)
        spaces["K"] = channels(torch.arange(before.kv_heads).repeat(n), before.head_width)
    spaces["D"] = torch.arange(before.d_model).repeat(n)
    spaces["F"] = torch.arange(before.ff_width).repeat(n)
    spaces["H"] = heads
    spaces["Q"] = channels(heads, before.head_width)
    return spaces


def _paired_noise(change: Change, name: str, columns: Tensor, n: int, snr_db: float) -> Tensor:
    """Return noise that makes copies diverge but does not change the output of the model.

    One copy of a column gets the noise +N, and another copy gets -N. Both copies have the same input, so the
    noise cancels out.
    """
    std = change.rms(name) / n * 10 ** (-snr_db / 20)
    plus = torch.zeros(change.new[name].shape)
    copies = columns.argsort(stable=True).view(-1, n)  # (source columns, n)
    for i in range(0, n - 1, 2):
        noise = change.normal((plus.size(0), len(copies)), std)
        plus[:, copies[:, i]] = noise
        plus[:, copies[:, i + 1]] = -noise
    return plus


def add_heads(change: Change) -> Pieces:
    """Add heads with random input weights and zero output weights, at the end of each query group."""
    before = change.before
    after = change.after
    old = before.n_head // before.kv_heads  # number of query heads per group in the old model
    new = after.n_head // after.kv_heads
    if new < old or after.kv_heads < before.kv_heads or after.head_width != before.head_width:
        got = f"{after.n_head} heads of width {after.head_width} over {after.kv_heads} key/value heads"
        needed = f"{before.n_head} heads of width {before.head_width} over {before.kv_heads}"
        fix = f"keep the width, and at least {before.kv_heads} key/value heads with {old} query heads each"
        raise ValueError(f"{got} cannot contain the old {needed}; {fix}")
    group = torch.arange(after.n_head) // new
    place = torch.arange(after.n_head) % new
    is_old = (group < before.kv_heads) & (place < old)
    heads = (group * old + place).where(is_old, torch.tensor(-1))
    kv_heads = _extended(before.kv_heads, after.kv_heads)
    pieces = change.by_space(
        H=heads, Q=channels(heads, before.head_width), K=channels(kv_heads, before.head_width)
    )
    change.fill(pieces, ("attn.q.weight", "attn.k.weight", "attn.v.weight"), 0)
    return pieces


def _extended(old: int, new: int) -> Tensor:
    """Return the index of a space that is extended at its end: 0, 1, ..., old - 1, -1, ..., -1."""
    index = torch.arange(new)
    return index.where(index < old, torch.tensor(-1))


# -- experts

NoisePair = tuple[str, int, int, int]  # the source, the shard, the first copy and the index of a pair


def upcycle_moe(change: Change) -> Pieces:
    """Make every expert a copy of the MLP, or a copy of one shard of the MLP.

    The experts that together contain one copy of the MLP form a group. All experts of a group have equal
    router weights, so the router always chooses whole groups. The gradient factors assume that tokens are
    evenly distributed over the copies.
    """
    _check_experts(change)
    pieces = change.by_space()
    noise: dict[NoisePair, Tensor] = {}
    for name in change.new:
        if part(name) == "mlp.router.weight":
            pieces[name] = Piece(None, plus=_router_rows(change))
        elif ".experts." in name:
            pieces[name] = _expert_piece(change, name, noise)
    return pieces


def _shards(change: Change) -> int:
    """Return the number of shards that an MLP is split into."""
    shards: int = change.op.value.get("shards", 1)
    return shards


def _has_zero_router(change: Change) -> bool:
    return change.op.value.get("router", "random") == "zero"


def _check_experts(change: Change) -> None:
    """Raise ValueError if the experts cannot compute the same function as the MLP."""
    shards = _shards(change)
    hidden = change.before.ff_width
    experts = change.after.experts
    k = change.after.top_k
    if change.after.ff_width * shards != hidden or experts % shards or k % shards:
        got = f"shards={shards} must divide hidden={hidden}, experts={experts} and top_k={k}"
        raise ValueError(f"{got}; use a common divisor of hidden, experts and top_k")
    has_noise = change.op.value.get("noise_snr_db") is not None
    if has_noise and not _has_zero_router(change):
        raise ValueError(
            "noise_snr_db changes the output of a model with router=random, whose experts diverge without "
            "noise; remove noise_snr_db, or use router=zero"
        )


def _router_rows(change: Change) -> Tensor | None:
    """Return router weights with one random row per group of experts. Return None for zero weights."""
    if _has_zero_router(change):
        return None
    shards = _shards(change)
    std = change.op.value.get("router_std", 0.02)
    rows = change.normal((change.after.experts // shards, change.after.d_model), std)
    return rows.repeat_interleave(shards, dim=0)


def _expert_piece(change: Change, name: str, noise: dict[NoisePair, Tensor]) -> Piece:
    """Return the piece of one parameter of an expert."""
    experts = change.after.experts
    shards = _shards(change)
    expert = int(re.findall(r"experts\.(\d+)", name)[0])
    source = re.sub(r"experts\.\d+\.", "", name)
    spaces = SPACES[part(name)]
    units: Tensor | None = None
    if shards > 1:
        hidden = change.after.ff_width
        units = torch.arange(hidden) + expert % shards * hidden
    index = tuple(units if space == "F" else None for space in spaces)
    if spaces[0] != "D":  # the up and gate projections
        return Piece(source, index, grad=shards / experts)
    # The remaining parameters belong to the down projection. With softmax, the weights of a zero router sum
    # to top_k / experts, and the scale of the down projection compensates for this.
    scale = 1.0
    grad = 1.0 / experts
    if change.after.router_weights == "softmax":
        scale = experts / change.after.top_k
        grad = change.after.top_k / experts / experts
    if "F" not in spaces:  # the bias of the down projection
        return Piece(source, index, weight=scale, grad=grad)
    plus: Tensor | None = None
    snr_db = change.op.value.get("noise_snr_db")
    if snr_db is not None:
        std = change.rms(source) * scale * shards * 10 ** (-snr_db / 20)
        plus = _expert_noise(change, noise, source, expert, std)
    return Piece(source, index, weight=scale * shards, grad=grad, plus=plus)


def _expert_noise(
    change: Change, noise: dict[NoisePair, Tensor], source: str, expert: int, std: float
) -> Tensor | None:
    """Return noise that cancels out between two experts. Return None for an expert without a partner.

    A zero router chooses the first copies for all tokens. The noise cancels out only if the router chooses
    both experts of a pair or neither expert.
    """
    shards = _shards(change)
    copy = expert // shards
    chosen = change.after.top_k // shards
    if copy + 1 == chosen and chosen % 2:
        return None
    first = 0
    if copy >= chosen:
        first = chosen
    pair = (source, expert % shards, first, (copy - first) // 2)
    if pair not in noise:
        noise[pair] = change.normal((change.after.d_model, change.after.ff_width), std)
    if (copy - first) % 2:
        return -noise[pair]
    return noise[pair]


# -- low-rank terms


def set_attn_lora_rank(change: Change) -> Pieces:
    return _set_rank(change, "attn.", change.before.attn_lora_rank, change.after.attn_lora_rank)


def set_mlp_lora_rank(change: Change) -> Pieces:
    return _set_rank(change, "mlp.", change.before.mlp_lora_rank, change.after.mlp_lora_rank)


def set_embedding_lora_rank(change: Change) -> Pieces:
    return _set_rank(change, "embed.", change.before.embed_lora_rank, change.after.embed_lora_rank)


def _set_rank(change: Change, prefix: str, old: int, new: int) -> Pieces:
    """Set the rank of the low-rank terms (lora_alpha / rank) B A.

    A new term has a random A and a zero B. A higher rank adds random rows to A, adds zero columns to B, and
    multiplies B by new / old. A lower rank replaces B A with its best approximation of this rank.
    """
    if new < 1:
        raise ValueError(
            f"rank {new} is not allowed; give at least 1, or remove the term with merge_lora_weights"
        )
    pieces = change.by_space()
    for name in change.new:
        if not name.endswith(".lora_a") or not part(name).startswith(prefix):
            continue
        module = name.removesuffix(".lora_a")
        a = f"{module}.lora_a"
        b = f"{module}.lora_b"
        std = change.new[a].size(1) ** -0.5
        if not old:
            pieces[a] = Piece(None, plus=change.normal(change.new[a].shape, std))
            pieces[b] = Piece(None)
        elif new >= old:
            rank = _extended(old, new)
            pieces[a] = Piece(a, (rank, None))
            pieces[b] = Piece(b, (None, rank), weight=new / old, grad=old / new)
            change.fill(pieces, (part(a),), 0, std)
        else:
            low_a, low_b, lost = truncate(change.old[a].detach(), change.old[b].detach(), new)
            pieces[a] = Piece(None, plus=low_a)
            pieces[b] = Piece(None, plus=low_b * (new / old))
            change.truncated[module] = lost
    return pieces


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Approximate B A by a product of lower rank. Return the new A and B, and the lost share of the norm.

    QR decompositions of both factors and an SVD of a small matrix avoid the full product B A.
    """
    qa, ra = torch.linalg.qr(a.double().mT)
    qb, rb = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.mT)
    root = s[:rank].sqrt()
    norm = float(s.norm())
    lost = 0.0
    if norm:
        lost = float(s[rank:].norm()) / norm
    return root.unsqueeze(1) * (vt[:rank] @ qa.mT), (qb @ u[:, :rank]) * root, lost


def merge_lora_weights(change: Change) -> Pieces:
    """Add (lora_alpha / rank) B A to the weights. The output of a tied head does not change."""
    pieces = change.by_space()
    for name, a in change.old.items():
        if not name.endswith(".lora_a"):
            continue
        b = change.old[f"{name.removesuffix('a')}b"]
        weight = f"{name.removesuffix('lora_a')}weight"
        scale = change.before.lora_alpha / a.size(0)
        term = scale * (b.detach().double() @ a.detach().double())
        pieces[weight] = replace(pieces[weight], plus=term)
    return pieces


# -- frozen layers, and the vocabulary


def unchanged(change: Change) -> Pieces:
    """Copy all parameters. Freezing and unfreezing change only the config and the optimizer state."""
    return change.by_space()


def resize_vocabulary(change: Change) -> Pieces:
    """Add small random rows to the embedding and the head. The logits of unused ids are -inf."""
    old = change.old["embed.weight"].size(0)
    new = change.new["embed.weight"].size(0)
    pieces = change.by_space(V=_extended(old, new))
    change.fill(pieces, ("embed.weight", "head.weight"), 0)
    return pieces


OPS: dict[str, Callable[[Change], Pieces]] = {
    "stack_layers": stack_layers,
    "widen_mlp": widen_mlp,
    "widen_model": widen_model,
    "add_heads": add_heads,
    "upcycle_moe": upcycle_moe,
    "set_attn_lora_rank": set_attn_lora_rank,
    "set_mlp_lora_rank": set_mlp_lora_rank,
    "set_embedding_lora_rank": set_embedding_lora_rank,
    "merge_lora_weights": merge_lora_weights,
    "freeze_layer": unchanged,
    "unfreeze_layer": unchanged,
    "resize_vocabulary": resize_vocabulary,
}
