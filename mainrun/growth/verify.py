"""Check a grown model by comparing the models before and after an operation."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.moe import MoE
from mainrun.core.optimizers import Optimizers
from mainrun.growth.moments import IndexMap
from mainrun.train import GPT

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}  # the largest change in a logit that rounding may cause
EQUAL = 1e-5  # the largest relative difference between equal copies that rounding may cause


@dataclass(frozen=True)
class PromiseCheck:
    """The result of one check of a grown model."""

    name: str
    ok: bool
    detail: str


def probe(vocab_size: int, length: int, seed: int, rows: int = 4) -> Tensor:
    """Return a fixed batch of random token ids with the shape (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def eval_mode(*models: GPT, full: bool = False) -> Iterator[None]:
    """Run models in eval mode without gradients.

    full: whether to compute in the precision of the weights instead of the `dtype` in the config.
    """
    before = [(model.training, model.cfg) for model in models]
    for model in models:
        model.eval()
        if full:
            model.cfg = model.cfg.model_copy(update={"dtype": "float32"})
    try:
        with torch.no_grad():
            yield
    finally:
        for model, (training, cfg) in zip(models, before, strict=True):
            model.train(training)
            model.cfg = cfg


# -- checks immediately after an operation


def logit_change(old: GPT, new: GPT, idx: Tensor, full: bool = False) -> tuple[float, float]:
    """Return the largest change in any logit, and the largest absolute logit before the change.

    The change is infinite if a new token id has a logit above -inf, because this changes all probabilities.
    """
    with eval_mode(old, new, full=full):
        before = old(idx)
        after = new(idx)
    old_ids = before.size(-1)
    new_id_logits = after[..., old_ids:]
    after = after[..., :old_ids]
    moved = (before.double() - after.double()).abs()
    moved.masked_fill_(before == after, 0)  # the difference of two logits of -inf is NaN
    largest = float(before[before > -torch.inf].abs().max())
    if bool((new_id_logits == -torch.inf).all()) and bool(moved.isfinite().all()):
        return float(moved.max()), largest
    return math.inf, largest


def check_function(promise: str, old: GPT, new: GPT, idx: Tensor) -> PromiseCheck:
    """Check that the logits did not change by more than the guarantee allows.

    "bitexact" allows no change. "exact" allows rounding errors, which are larger for larger logits. "approx"
    and "none" allow any change, but the logits must be finite.
    """
    moved, largest = logit_change(old, new, idx, full=promise == "exact")
    note = ""
    if promise == "exact":
        limit = EXACT[new.embed.weight.dtype] * max(1.0, largest)
        if moved > limit and old.cfg.routed_layers:
            # Rounding can change the order of two scores of a router, and a token then takes another path.
            moved = logit_change_in_float64(old, new, idx)
            note = "; checked in float64, because routers amplify rounding"
        ok = moved <= limit
        rule = f"exact allows at most {limit:.3g}, for logits up to {largest:.3g}"
    elif promise == "bitexact":
        ok = moved == 0
        rule = "bitexact allows only 0"
    else:
        with eval_mode(new):
            ok = bool(new(idx).logsumexp(-1).isfinite().all())
        rule = "logits must be finite"
    return PromiseCheck("function", ok, f"max |delta logits| {moved:.3g}; {rule}{note}")


def logit_change_in_float64(old: GPT, new: GPT, idx: Tensor) -> float:
    """Return the largest change in any logit, computed with float64 copies of the models."""
    with eval_mode(old, new):  # the hooks of a copy refer to the original model
        return logit_change(copy.deepcopy(old).double(), copy.deepcopy(new).double(), idx, full=True)[0]


def check_coverage(coverage: float, required: float) -> PromiseCheck:
    """Check that enough of the optimizer state was transferred."""
    detail = f"{coverage:.1%} of the optimizer's state was transferred, {required:.1%} is required"
    return PromiseCheck("coverage", coverage >= required, detail)


def check_tying(before: TrainConfig, new: GPT) -> PromiseCheck:
    """Check that a tied head still uses the embedding, and that different parameters do not share memory."""
    owners = Counter(p.untyped_storage().data_ptr() for p in new.parameters())
    shared = [name for name, p in new.named_parameters() if owners[p.untyped_storage().data_ptr()] > 1]
    is_tied = new.head is None
    ok = is_tied == before.tie_head == new.cfg.tie_head and not shared
    words = {True: "tied", False: "untied"}
    detail = f"head {words[is_tied]}, before {words[before.tie_head]}; shared: {shared or 'none'}"
    return PromiseCheck("tying", ok, detail)


def check_groups(new: nn.Module, optimizers: Optimizers) -> PromiseCheck:
    """Check that the optimizers' groups contain each trainable parameter once, and no other tensors."""
    uses: Counter[int] = Counter()
    for optimizer in optimizers.all:
        for group in optimizer.param_groups:
            uses.update(id(p) for p in group["params"])
    trained = {id(p): name for name, p in new.named_parameters() if p.requires_grad}
    problems = [f"{name} in {uses[key]} groups" for key, name in trained.items() if uses[key] != 1]
    others = uses.keys() - trained.keys()
    if others:
        problems.append(f"{len(others)} tensors that the model does not train")
    detail = ", ".join(problems[:5]) or f"{len(trained)} tensors, each in one group"
    return PromiseCheck("groups", not problems, detail)


def check_rope(old: GPT, new: GPT) -> PromiseCheck:
    """Check that the width of a head and the values of the rotary tables did not change."""
    before = old.cfg.head_width
    after = new.cfg.head_width
    attn: Any = new.blocks[0].attn
    ok = before == after == attn.width and attn.q.weight.size(0) == new.cfg.n_head * after
    if new.cfg.position == "rope":
        for name in ("cos", "sin"):
            table = new.get_buffer(name)
            right_width = table.size(-1) * 2 == new.cfg.rotated_channels
            ok = ok and torch.equal(old.get_buffer(name), table) and right_width
    return PromiseCheck("rope", ok, f"heads {before} wide before, {after} after")


def check_router_scale(old: GPT, new: GPT, idx: Tensor, tolerance: float = 0.01) -> PromiseCheck:
    """Check that the spread of the expert scores did not change in any router.

    If a model becomes n times wider but its router weights are not divided by n, the spread becomes n times
    larger. If the old model had no routers, the check only requires finite scores.
    """
    before = _score_spreads(old, idx)
    after = _score_spreads(new, idx)
    if not before:
        return PromiseCheck("router scale", all(map(math.isfinite, after)), "there was no router before")
    ok = len(before) == len(after)
    for x, y in zip(before, after, strict=False):
        ok = ok and abs(x - y) <= tolerance * x + 1e-12
    detail = f"scores spread by {_numbers(before)} before, {_numbers(after)} after"
    return PromiseCheck("router scale", ok, detail)


def _score_spreads(model: GPT, idx: Tensor) -> list[float]:
    """Return, for each router, the mean standard deviation of a token's scores over the experts."""
    layers = moe_layers(model)
    spreads: list[float] = []
    for name, x in router_inputs(model, idx).items():
        with torch.no_grad():
            scores = layers[name].scores(x)  # (N, experts)
        spreads.append(float(scores.double().std(-1).mean()))
    return spreads


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def check_layer_identity(new: GPT, layers: Sequence[int], idx: Tensor) -> PromiseCheck:
    """Check that each inserted layer returns its input unchanged, bit for bit."""
    changing: list[int] = []

    def compare(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            if not torch.equal(args[0], output[0]):
                changing.append(layer)

        return hook

    hooks = [new.blocks[layer].register_forward_hook(compare(layer)) for layer in layers]
    try:
        with eval_mode(new):
            new(idx)
    finally:
        for handle in hooks:
            handle.remove()
    detail = f"{len(layers)} inserted layers"
    if changing:
        detail = f"layers {', '.join(map(str, changing))} change their input"
    return PromiseCheck("layer identity", not changing, detail)


# -- checks some steps after an operation


def check_symmetry(moved: IndexMap, new: nn.Module) -> PromiseCheck:
    """Check that the copies from an operation have diverged."""
    with_copies = {copies.name for copies in moved.copies()}
    equal = equal_copies(moved, new)
    detail = f"copies are still equal in {len(equal)} of {len(with_copies)} tensors"
    if equal:
        detail += f": {', '.join(equal[:3])}"
    return PromiseCheck("symmetry", not equal, detail)


def equal_copies(moved: IndexMap, new: nn.Module, tolerance: float = EQUAL) -> list[str]:
    """Return the names of tensors whose copied rows are all still equal. Equal rows might never diverge.

    moved: the index map of the operation that made the copies.
    """
    tensors = dict(new.named_parameters())
    gaps: dict[str, float] = {}
    for copies in moved.copies():
        rows = _without_share(moved, tensors, copies.name)[copies.rows]
        first_rows = _without_share(moved, tensors, copies.first)[copies.first_rows]
        gap = float((rows - first_rows).norm() / first_rows.norm().clamp(min=1e-30))
        gaps[copies.name] = max(gap, gaps.get(copies.name, 0.0))
    return [name for name, gap in gaps.items() if gap <= tolerance]


def _without_share(moved: IndexMap, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Undo the scaling that an operation applied to copied weights, so that copies can be compared."""
    weight = moved.pieces[name].weight
    x = tensors[name].detach().double()
    if isinstance(weight, Tensor):
        return x / weight.to(x)
    return x / weight


def locked_routers(model: GPT, idx: Tensor) -> list[str]:
    """Return one message per router that sends all tokens to the same experts or gets no gradient."""
    problems = []
    layers = moe_layers(model)
    for name, x in router_inputs(model, idx).items():
        moe = layers[name]
        with torch.no_grad():
            used = int(moe.route(x)[0].unique().numel())
        if moe.k == 1 and moe.renormalised:
            problems.append(
                f"{name}: with one expert per token, the renormalised weight is always 1, so the router gets "
                "no gradient; use top_k=2 or softmax weights"
            )
        elif used <= moe.k < len(moe.experts):
            problems.append(f"{name}: all tokens go to the same {used} of {len(moe.experts)} experts")
    return problems


# -- routers


def moe_layers(model: GPT) -> dict[str, MoE]:
    """Return a dict that maps the name of each layer with experts to the layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def router_inputs(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """Return the input of every router for a batch of token ids."""
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return hook

    hooks = [moe.register_forward_pre_hook(record(name)) for name, moe in moe_layers(model).items()]
    try:
        with eval_mode(model):
            model(idx)
    finally:
        for handle in hooks:
            handle.remove()
    return inputs
