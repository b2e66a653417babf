"""The ops of the architecture: a model before, the model after, and where each of its numbers came from.

Each parameter spans spaces (SPACES): the width of the model, the channels of its heads, the hidden units, ... An op says how the spaces of
the new model come from the old ones, and what a tensor is multiplied by for the function to stay. Nothing here touches the training
loop, and what is random comes from a seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.growth.moments import IndexMap, Piece, along

if TYPE_CHECKING:
    from mainrun.train import GPT

# D width, V ids, T positions, H heads, Q channels of all heads, K channels of all heads of keys and values, h channels of one head,
# F hidden units, E experts, R rank in attention, S rank of the embedding
SPACES = {
    "embed.weight": "VD", "embed.lora_a": "SD", "embed.lora_b": "VS", "positions.weight": "TD", "head.weight": "VD",
    "attn.q.weight": "QD", "attn.q.lora_a": "RD", "attn.q.lora_b": "QR", "attn.q.bias": "Q",
    "attn.k.weight": "KD", "attn.k.lora_a": "RD", "attn.k.lora_b": "KR", "attn.k.bias": "K",
    "attn.v.weight": "KD", "attn.v.lora_a": "RD", "attn.v.lora_b": "KR", "attn.v.bias": "K",
    "attn.o.weight": "DQ", "attn.o.lora_a": "RQ", "attn.o.lora_b": "DR", "attn.o.bias": "D",
    "attn.gate.weight": "HD", "attn.q_norm.weight": "h", "attn.k_norm.weight": "h", "attn.first_share": "",
    "mlp.up.weight": "FD", "mlp.up.bias": "F", "mlp.gate.weight": "FD", "mlp.gate.bias": "F", "mlp.down.weight": "DF", "mlp.down.bias": "D",
    "mlp.router.weight": "ED", "attn_scale": "D", "mlp_scale": "D",
    **{f"{norm}.{kind}": "D" for norm in ("norm", "attn_norm", "mlp_norm") for kind in ("weight", "bias")},
}  # fmt: skip


def part(name: str) -> str:
    """`blocks.3.mlp.experts.1.up.weight` -> `mlp.up.weight`"""
    return re.sub(r"^blocks\.\d+\.|experts\.\d+\.", "", name)


def flow(name: str) -> tuple[str, str]:
    """The space that a tensor writes to, and the one that it reads (empty: none). A table is read by its rows, a matrix by its columns."""
    letters = SPACES[part(name)]
    if len(letters) < 2:
        return letters, ""
    return (letters[1], letters[0]) if name.startswith(("embed.", "positions.")) else (letters[0], letters[1])


Pieces = dict[str, Piece]


@dataclass
class Change:
    """An op, at work."""

    op: Any
    before: TrainConfig
    after: TrainConfig
    old: dict[str, nn.Parameter]
    new: dict[str, nn.Parameter]
    generator: torch.Generator
    truncated: dict[str, float] = field(default_factory=dict)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def rms(self, name: str) -> float:
        return float(self.old[name].detach().float().square().mean().sqrt())

    def by_space(self, **spaces: Tensor) -> Pieces:
        """Each tensor from the one of its name, whose spaces are taken by these indices; what has none is zero."""
        return {
            name: Piece(name, tuple(spaces.get(s) for s in SPACES[part(name)]))
            if name in self.old
            else Piece(None)
            for name in self.new
        }

    def fill(self, pieces: Pieces, names: tuple[str, ...], dim: int, std: float | None = None) -> None:
        """Random numbers where a dimension is new."""
        for name, piece in pieces.items():
            if part(name) in names and name in self.new and piece.index[dim] is not None:
                index, shape = piece.index[dim], self.new[name].shape
                new = along((index < 0).float(), dim, len(shape))  # type: ignore[operator, union-attr]
                pieces[name] = replace(
                    piece, plus=self.normal(shape, self.before.init_std if std is None else std) * new
                )


def grow(op: Any, before: TrainConfig, after: TrainConfig, model: GPT, seed: int) -> tuple[GPT, IndexMap]:
    """The model after an op, and where its numbers came from. seed: of what the op draws.

    op: its name, value and init, of mainrun.plan.ops; before and after: the configs in force.
    """
    new = like(model, after)
    pieces, moved = mapped(op, before, after, model, new, seed)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in new.named_parameters():
            value = pieces[name].value(old, p)
            assert value.shape == p.shape, (
                f"{name}: {tuple(value.shape)} for {tuple(p.shape)}"
            )  # copy_ would segment it
            p.copy_(value)
    return new, moved


def mapped(
    op: Any, before: TrainConfig, after: TrainConfig, model: GPT, new: GPT, seed: int
) -> tuple[Pieces, IndexMap]:
    """Where all numbers of the new model come from, and those of them that train. It may lie on the meta device."""
    old = dict(model.named_parameters())
    change = Change(op, before, after, old, dict(new.named_parameters()), torch.Generator().manual_seed(seed))
    pieces = OPS[op.name](change)
    trained = {name: p.shape for name, p in new.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in old.items()}
    return pieces, IndexMap({name: pieces[name] for name in trained}, shapes, trained, change.truncated)


def outline(model: GPT, cfg: TrainConfig) -> GPT:
    """A model of another config, without any numbers."""
    with torch.device("meta"):
        return type(model)(cfg, model.embed.num_embeddings - model.cfg.unused_ids)


def like(model: GPT, cfg: TrainConfig) -> GPT:
    """A model of another config, beside this one. Nothing is drawn: its numbers are whatever its memory holds."""
    made = outline(model, cfg)
    new = made.to(model.embed.weight.dtype).to_empty(device=model.embed.weight.device).train(model.training)
    for name, buffer in new.named_buffers():
        buffer.copy_(
            model.get_buffer(name)
        )  # of the context's length and a head's width, which no op changes
    for block in new.blocks:
        block.attn.fused = model.blocks[0].attn.fused
    return new


# -- depth

ENDS = (
    "attn.o.weight",
    "attn.o.bias",
    "attn.o.lora_b",
    "mlp.down.weight",
    "mlp.down.bias",
)  # of the branches of a block


def stack_layers(c: Change) -> Pieces:
    """Each new layer from its source. identity: from a source's second copy on, both branches end in zeros, biases too.

    The first layer of all has no share of the first values; elsewhere its copy begins with none.
    """
    found = {}
    for name in c.new:
        inside = re.match(r"blocks\.(\d+)\.(.+)", name)
        if not inside:
            found[name] = Piece(name)
            continue
        layer = int(inside[1])
        source = f"blocks.{c.op.value[layer]}.{inside[2]}"
        inserted = c.op.init == "identity" and c.op.value[layer] in c.op.value[:layer]
        # what stands behind zeros has no gradient at first, so the source's momentum would only move it astray
        found[name] = Piece(source, grad=None if inserted else 1.0) if source in c.old else Piece(None)
        if inserted and part(name) in ENDS:
            found[name] = Piece(None)
    return found


# -- width


def widen_mlp(c: Change) -> Pieces:
    """copy: a new hidden unit is a copy, and all copies of one share its output. identity: new units, without output.

    Even shares would get the same gradients for ever; of uneven ones each is moved by another part of itself, so copies part.
    """
    old, new, found = c.before.ff_width, c.after.ff_width, c.by_space()
    if new < old:
        raise ValueError(f"{new} < current hidden {old}; give an integer > {old}")
    for name in [n for n in c.new if part(n) == "mlp.up.weight"]:
        mlp = name.removesuffix("up.weight")
        if c.op.init == "identity":
            units, share = (
                torch.cat([torch.arange(old), torch.full((new - old,), -1)]),
                torch.ones(new, dtype=torch.float64),
            )
        else:
            units = torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=c.generator)])
            share = torch.rand(new, generator=c.generator, dtype=torch.float64) + 0.5
            share /= torch.zeros(old, dtype=torch.float64).index_add(0, units, share)[units]
        for side in ("up", "gate"):
            found[f"{mlp}{side}.weight"] = Piece(
                f"{mlp}{side}.weight", (units, None), grad=share.unsqueeze(1)
            )
            found[f"{mlp}{side}.bias"] = Piece(f"{mlp}{side}.bias", (units,), grad=share)
        found[f"{mlp}down.weight"] = Piece(f"{mlp}down.weight", (None, units), weight=share)
    c.fill(found, ("mlp.up.weight", "mlp.gate.weight"), 0)
    return found


def channels(heads: Tensor, width: int) -> Tensor:
    """Of each channel of these heads (-1: new) the one that it comes from."""
    each = heads.unsqueeze(1) * width + torch.arange(width)
    return each.where(heads.unsqueeze(1) >= 0, torch.tensor(-1)).flatten()


def widen_model(c: Change) -> Pieces:
    """HyperCloning: n copies of each channel, so what reads them takes 1/n of its weight from each."""
    n, b, a = c.after.d_model // c.before.d_model, c.before, c.after
    if a.head_width != b.head_width:
        raise ValueError(
            f"a head would become {a.head_width} wide; keep its {b.head_width}: rotary positions and scores depend on it"
        )
    heads = torch.arange(b.n_head)
    keep = a.kv_heads == b.kv_heads
    heads = (
        heads.repeat_interleave(n) if keep else heads.repeat(n)
    )  # kept keys and values: a group's queries stay together
    spaces = {
        "D": torch.arange(b.d_model).repeat(n),
        "F": torch.arange(b.ff_width).repeat(n),
        "H": heads,
        "Q": channels(heads, b.head_width),
    }
    if not keep:
        spaces["K"] = channels(torch.arange(b.kv_heads).repeat(n), b.head_width)
    found = c.by_space(**spaces)
    for name, piece in found.items():
        to, of = flow(name)
        # the error that reaches one of n copies is 1/n of what reached the source
        found[name] = replace(
            piece, weight=1 / n if of in spaces else 1.0, grad=1 / n if to in spaces else 1.0
        )
        if b.tie_head and part(name) in ("norm.weight", "norm.bias") and not name.startswith("blocks."):
            # a tied head sums n copies of each product; the embedding cannot take the 1/n, so the norm before the head does
            found[name] = replace(piece, weight=1 / n, grad=1.0)
    if (snr := c.op.value.get("noise_snr_db")) is not None:
        for name in [n for n in found if flow(n)[1] in spaces]:
            found[name] = replace(found[name], plus=_paired_noise(c, name, spaces[flow(name)[1]], n, snr))
    return found


def _paired_noise(c: Change, name: str, columns: Tensor, n: int, snr_db: float) -> Tensor:
    """+N for one copy of a column and -N for the next: their inputs are equal, so nothing changes but that the copies part."""
    std = c.rms(name) / n * 10 ** (-snr_db / 20)
    plus = torch.zeros(c.new[name].shape)
    places = columns.argsort(stable=True).view(-1, n)  # of each source's copies
    for i in range(0, n - 1, 2):
        noise = c.normal((plus.size(0), len(places)), std)
        plus[:, places[:, i]] = noise
        plus[:, places[:, i + 1]] = -noise
    return plus


def add_heads(c: Change) -> Pieces:
    """New heads are free, and go out through zeros. Where queries share keys and values, each group grows at its end."""
    b, a = c.before, c.after
    old, new = b.n_head // b.kv_heads, a.n_head // a.kv_heads
    if new < old or a.kv_heads < b.kv_heads or a.head_width != b.head_width:
        got = f"{a.n_head} heads of {a.head_width} over {a.kv_heads} of keys and values"
        held = f"{b.n_head} of {b.head_width} over {b.kv_heads}"
        raise ValueError(
            f"{got} do not hold {held}; keep the width, as many keys and values, and {old} or more queries to each"
        )
    group, place = torch.arange(a.n_head) // new, torch.arange(a.n_head) % new
    heads = (group * old + place).where((group < b.kv_heads) & (place < old), torch.tensor(-1))
    kv = torch.arange(a.kv_heads).where(torch.arange(a.kv_heads) < b.kv_heads, torch.tensor(-1))
    found = c.by_space(H=heads, Q=channels(heads, b.head_width), K=channels(kv, b.head_width))
    c.fill(found, ("attn.q.weight", "attn.k.weight", "attn.v.weight"), 0)
    return found


# -- experts


def upcycle_moe(c: Change) -> Pieces:
    """Every expert is the MLP; or, fine-grained, one of its shards, with the shards of one group behind one router row, so that k/shards
    whole groups are chosen. What the chosen weights do not sum to, the down projection makes up for (softmax: of a zero router).

    Moments: the gradient is thought to be spread evenly over the copies.
    """
    value, experts, k = c.op.value, c.after.experts, c.after.top_k
    shards, hidden = value.get("shards", 1), c.after.ff_width
    softmax, zero = c.after.router_weights == "softmax", value.get("router", "random") == "zero"
    if hidden * shards != c.before.ff_width or experts % shards or k % shards:
        raise ValueError(
            f"shards={shards} must divide hidden={c.before.ff_width}, experts={experts} and top_k={k}; use a divisor of all"
        )
    snr = value.get("noise_snr_db")
    if snr is not None and not zero:
        raise ValueError(
            "noise_snr_db with router=random changes the function, and its experts differ soon; leave it out, or use router=zero"
        )
    lost = experts / k if softmax else 1.0
    share = (k / experts if softmax else 1.0) / experts
    found, drawn = c.by_space(), dict[Any, Tensor]()
    for name in c.new:
        if part(name) == "mlp.router.weight":
            groups, width = experts // shards, c.after.d_model
            rows = (
                None
                if zero
                else c.normal((groups, width), value.get("router_std", 0.02)).repeat_interleave(shards, dim=0)
            )
            found[name] = Piece(None, plus=rows)
        elif ".experts." in name:
            expert = int(re.findall(r"experts\.(\d+)", name)[0])
            units = torch.arange(hidden) + expert % shards * hidden if shards > 1 else None
            source = re.sub(r"experts\.\d+\.", "", name)
            spaces = SPACES[part(name)]
            piece = Piece(source, tuple(units if s == "F" else None for s in spaces), grad=shards / experts)
            if spaces[0] == "D":
                piece = replace(piece, weight=lost * (shards if "F" in spaces else 1), grad=share)
            if snr is not None and spaces == "DF":
                std = c.rms(source) * lost * shards * 10 ** (-snr / 20)
                piece = replace(
                    piece,
                    plus=_expert_noise(c, drawn, source, expert // shards, expert % shards, k // shards, std),
                )
            found[name] = piece
    return found


def _expert_noise(
    c: Change, drawn: dict[Any, Tensor], source: str, copy: int, shard: int, chosen: int, std: float
) -> Tensor | None:
    """+N and -N for two copies of a shard. A zero router takes the first of them for all tokens: a pair must be wholly in or out."""
    first = 0 if copy < chosen else chosen
    if copy + 1 == chosen and chosen % 2:
        return None
    pair = (source, shard, first, (copy - first) // 2)
    if pair not in drawn:
        drawn[pair] = c.normal((c.after.d_model, c.after.ff_width), std)
    return -drawn[pair] if (copy - first) % 2 else drawn[pair]


# -- low-rank terms


def set_rank(c: Change) -> Pieces:
    """From none: B = 0. Up: more rows of A at random, columns of B zero, B times r'/r as the scale is alpha/r. Down: the best there is."""
    name = "attn_lora_rank" if c.op.name == "set_attn_lora_rank" else "embed_lora_rank"
    old, new = getattr(c.before, name), getattr(c.after, name)
    if new < 1:
        raise ValueError(
            f"rank {new} is not allowed; give 1 or more, or merge_lora_weights to be rid of the term"
        )
    found = c.by_space()
    inside = "attn." if name == "attn_lora_rank" else "embed."
    for a in [n for n in c.new if n.endswith(".lora_a") and part(n).startswith(inside)]:
        b = a.removesuffix("a") + "b"
        std = c.new[a].size(1) ** -0.5
        if not old:
            found[a], found[b] = Piece(None, plus=c.normal(c.new[a].shape, std)), Piece(None)
        elif new >= old:
            rank = torch.arange(new).where(torch.arange(new) < old, torch.tensor(-1))
            found[a] = Piece(a, (rank, None))
            found[b] = Piece(b, (None, rank), weight=new / old, grad=old / new)
            c.fill(found, (part(a),), 0, std)
        else:
            low_a, low_b, c.truncated[a.removesuffix(".lora_a")] = truncate(
                c.old[a].detach(), c.old[b].detach(), new
            )
            found[a], found[b] = Piece(None, plus=low_a), Piece(None, plus=low_b * (new / old))
    return found


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of that rank to B A, without ever making B A: QR of both, SVD of the small core. And the share that is lost."""
    qa, ra = torch.linalg.qr(a.double().mT)
    qb, rb = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.mT)
    root, size = s[:rank].sqrt(), float(s.norm())
    return (
        root.unsqueeze(1) * (vt[:rank] @ qa.mT),
        (qb @ u[:, :rank]) * root,
        float(s[rank:].norm()) / size if size else 0.0,
    )


def merge_lora_weights(c: Change) -> Pieces:
    """W += (alpha / rank) B A. A tied head has the term as well, so the merged embedding is what both ends had."""
    found = c.by_space()
    for a in [n for n in c.old if n.endswith(".lora_a")]:
        rank, name = c.old[a].size(0), a.removesuffix("lora_a")
        term = (c.before.lora_alpha / rank) * (
            c.old[f"{name}lora_b"].detach().double() @ c.old[a].detach().double()
        )
        found[f"{name}weight"] = replace(found[f"{name}weight"], plus=term)
    return found


# -- what trains, and the vocabulary


def freeze(c: Change) -> Pieces:
    """Nothing moves: which layers train, the config says; a frozen one has no state, a thawed one begins without."""
    return c.by_space()


def resize_vocabulary(c: Change) -> Pieces:
    """New ids at the end, small and random. Until they are used their logits are -inf (unused_ids), so nothing changes."""
    old, new = c.old["embed.weight"].size(0), c.new["embed.weight"].size(0)
    ids = torch.arange(new)
    found = c.by_space(V=ids.where(ids < old, torch.tensor(-1)))
    c.fill(found, ("embed.weight", "head.weight"), 0)
    return found


OPS: dict[str, Callable[[Change], Pieces]] = {
    "stack_layers": stack_layers,
    "widen_mlp": widen_mlp,
    "widen_model": widen_model,
    "add_heads": add_heads,
    "upcycle_moe": upcycle_moe,
    "set_attn_lora_rank": set_rank,
    "set_embedding_lora_rank": set_rank,
    "merge_lora_weights": merge_lora_weights,
    "freeze_layer": freeze,
    "unfreeze_layer": freeze,
    "resize_vocabulary": resize_vocabulary,
}
