"""Whether an op kept what it promised: checks on the models before and after it, each of which can fail."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.moe import MoE
from mainrun.growth.moments import IndexMap

if TYPE_CHECKING:
    from mainrun.core.optimizers import Optimizers
    from mainrun.train import GPT

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}  # how far logits may move by rounding
EQUAL = 1e-5  # copies that differ by less, relative to their size, have not parted: rounding alone does that


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


def probe(vocab_size: int, length: int, seed: int, rows: int = 4) -> Tensor:
    """A fixed batch of ids, (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def still(*models: GPT, full: bool = False) -> Iterator[None]:
    """In eval mode, without gradients; full: in the precision of the weights, whatever the config computes in."""
    before = [(model.training, model.cfg) for model in models]
    for model in models:
        model.eval()
        model.cfg = model.cfg.model_copy(update={"dtype": "float32"}) if full else model.cfg
    try:
        with torch.no_grad():
            yield
    finally:
        for model, (mode, cfg) in zip(models, before, strict=True):
            model.train(mode)
            model.cfg = cfg


# -- what an op declares


def delta(old: GPT, new: GPT, idx: Tensor, full: bool = False) -> tuple[float, float]:
    """The most that a logit moves, and the largest one before. New ids may have no chance: if they have one, nothing is the same."""
    with still(old, new, full=full):
        before, after = old(idx), new(idx)
    more, after = after[..., before.size(-1) :], after[..., : before.size(-1)]
    moved = (before.double() - after.double()).abs().masked_fill_(before == after, 0)  # -inf stays -inf
    same = bool((more == -torch.inf).all()) and bool(moved.isfinite().all())
    return float(moved.max()) if same else math.inf, float(before[before > -torch.inf].abs().max())


def preserved(promise: str, old: GPT, new: GPT, idx: Tensor) -> Check:
    """exact: to rounding, which grows with the logits. none and approx promise no bound, but the logits must be numbers."""
    moved, size = delta(old, new, idx, full=promise == "exact")
    ok, means = moved == 0, "bit-exact means 0"
    if promise == "exact":
        most = EXACT[new.embed.weight.dtype] * max(1.0, size)
        ok, means = moved <= most, f"exact means {most:.3g} at most, of logits up to {size:.3g}"
    elif promise != "bitexact":
        with still(new):
            ok, means = bool(new(idx).logsumexp(-1).isfinite().all()), "logits must be numbers"
    return Check("function", ok, f"max |delta logits| {moved:.3g}; {means}")


def covered(coverage: float, least: float) -> Check:
    return Check(
        "coverage",
        coverage >= least,
        f"{coverage:.1%} of the optimiser's state went over, {least:.1%} is asked for",
    )


def tied(before: TrainConfig, new: GPT) -> Check:
    """A tied head is the embedding itself, no second tensor that begins alike; and no other two tensors share their memory."""
    owners = Counter(p.untyped_storage().data_ptr() for p in new.parameters())
    shared = [name for name, p in new.named_parameters() if owners[p.untyped_storage().data_ptr()] > 1]
    is_tied = new.head is None
    ok = is_tied == before.tie_head == new.cfg.tie_head and not shared
    return Check(
        "tying",
        ok,
        f"head {'tied' if is_tied else 'apart'}, before {'tied' if before.tie_head else 'apart'}; shared: {shared or 'none'}",
    )


def grouped(new: nn.Module, optimizers: Optimizers) -> Check:
    """Each tensor that trains in exactly one group, and nothing there that the model does not have."""
    held = Counter(
        id(p) for optimizer in optimizers.all for group in optimizer.param_groups for p in group["params"]
    )
    mine = {id(p): name for name, p in new.named_parameters() if p.requires_grad}
    wrong = [f"{name} in {held[i]} groups" for i, name in mine.items() if held[i] != 1]
    wrong += (
        [f"{len(held.keys() - mine.keys())} tensors that do not train here"]
        if held.keys() - mine.keys()
        else []
    )
    return Check("groups", not wrong, ", ".join(wrong[:5]) or f"{len(mine)} tensors, each in one group")


# -- locks, some steps later


def symmetry_lock(moved: IndexMap, new: nn.Module, alike: float = EQUAL) -> list[str]:
    """Tensors whose copied rows are all still equal. `moved` is that of the op; its copies compute one thing for ever unless they part."""
    tensors, gaps = dict(new.named_parameters()), dict[str, float]()
    for name, mine, first, theirs in moved.copies():
        x, y = _unshared(moved, tensors, name)[mine], _unshared(moved, tensors, first)[theirs]
        gap = float((x - y).norm() / y.norm().clamp(min=1e-30))
        gaps[name] = max(gap, gaps.get(name, 0.0))
    return [name for name, gap in gaps.items() if gap <= alike]


def _unshared(moved: IndexMap, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Columns of a split unit began as shares of one; the rows are compared as they would be without."""
    weight = moved.pieces[name].weight
    x = tensors[name].detach().double()
    return x / weight.to(x) if isinstance(weight, Tensor) else x / weight


def experts_of(model: GPT) -> dict[str, MoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def router_inputs(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """What the router of each layer sees of these ids."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: found.__setitem__(name, args[0])

    hooks = [moe.register_forward_pre_hook(watch(name)) for name, moe in experts_of(model).items()]
    try:
        with still(model):
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def router_lock(model: GPT, idx: Tensor) -> list[str]:
    """Layers whose tokens all go to the same experts, or whose router has nothing to learn from."""
    found = []
    experts = experts_of(model)
    for name, x in router_inputs(model, idx).items():
        moe = experts[name]
        with torch.no_grad():
            used = int(moe.route(x)[0].unique().numel())
        if moe.k == 1 and moe.renormalised:
            found.append(
                f"{name}: the one weight of a token is always 1, so the router has no gradient; use top_k=2 or softmax weights"
            )
        elif used <= moe.k < len(moe.experts):
            found.append(f"{name}: all tokens go to the same {used} of {len(moe.experts)} experts")
    return found


# -- the four checks of a staged growth


def rope_integrity(old: GPT, new: GPT) -> Check:
    """Rotary positions are a table for one width of a head: it must be the same after the op, and the heads as wide as it."""
    before, after = old.cfg.head_width, new.cfg.head_width
    attn: Any = new.blocks[0].attn
    ok = before == after == attn.width and attn.q.weight.size(0) == new.cfg.n_head * after
    if new.cfg.position == "rope":
        tables = [(old.get_buffer(name), new.get_buffer(name)) for name in ("cos", "sin")]
        ok &= all(torch.equal(a, b) and b.size(-1) * 2 == after for a, b in tables)
    return Check("rope", ok, f"heads {before} wide before, {after} after")


def router_scale(old: GPT, new: GPT, idx: Tensor, most: float = 0.01) -> Check:
    """The spread of the scores over the experts is what it was: n times as wide, a router is n times as sure. Of dense layers: none."""
    spreads = []
    for model in (old, new):
        layers = experts_of(model)
        with torch.no_grad():
            spreads.append(
                [
                    float(layers[n].scores(x).double().std(-1).mean())
                    for n, x in router_inputs(model, idx).items()
                ]
            )
    before, after = spreads
    if not before:
        return Check("router scale", all(map(math.isfinite, after)), "there was no router before")
    ok = len(before) == len(after) and all(
        abs(b - a) <= most * b + 1e-12 for b, a in zip(before, after, strict=True)
    )
    shown = [", ".join(f"{x:.3g}" for x in spread) for spread in spreads]
    return Check("router scale", ok, f"scores spread by {shown[0]} before, {shown[1]} after")


def heads_diverge(moved: IndexMap, new: nn.Module) -> Check:
    """Some steps after an op that copies: no tensor of copies is still one thing several times."""
    copied = sorted({name for name, *_ in moved.copies()})
    locked = symmetry_lock(moved, new)
    return Check(
        "symmetry",
        not locked,
        f"{len(locked)} of {len(copied)} tensors with copies are locked"
        + f": {', '.join(locked[:3])}" * bool(locked),
    )


def layer_identity(new: GPT, layers: Sequence[int], idx: Tensor) -> Check:
    """Inserted layers give back what they get, to the bit."""
    wrong: list[int] = []

    def watch(layer: int) -> Callable[..., None]:
        return lambda _, args, out: None if torch.equal(args[0], out[0]) else wrong.append(layer)

    hooks = [new.blocks[i].register_forward_hook(watch(i)) for i in layers]
    try:
        with still(new):
            new(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return Check(
        "layer identity",
        not wrong,
        f"layers {', '.join(map(str, wrong))} change what they get"
        if wrong
        else f"{len(layers)} inserted layers",
    )
