"""Where each number of a grown model comes from, and the state of the optimisers that goes with it. By names, never by place.

The gradient of a copied weight is a known share of the source's: with it m and the momentum scale, and v with its square. What is new has
no past: a tensor that is new as a whole restarts its own step. Inside a tensor that goes on there is one step for all, and at a large
one a second moment of zero would make a first update of 3.2 rates (beta2 0.999); so a new element begins with the tensor's mean v.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mainrun.core.optimizers import DEFAULT_SCHEDULE, ParamSchedule

if TYPE_CHECKING:
    from mainrun.plan.ops import Op

MODES = ("auto", "keep", "scale", "reset", "asymmetric")
Factor = float | Tensor  # one for all, or what broadcasts to the tensor


def along(index: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor that broadcasts along one dimension of others."""
    return index.view([-1 if d == dim else 1 for d in range(ndim)])


@dataclass(frozen=True)
class Piece:
    """How one tensor of the new model comes about: elements of a source times `weight`, and `plus`."""

    source: str | None  # a tensor of the old model; None: there is none
    index: tuple[
        Tensor | None, ...
    ] = ()  # for each dimension the source's index of each of mine, -1: new; None: as they stand
    weight: Factor = 1.0
    grad: Factor | None = 1.0  # its gradient over the source's; None: the state starts anew all the same
    plus: Tensor | None = None  # random new elements, noise, what was merged

    def take(self, source: Tensor) -> Tensor:
        """Mine of the source's elements, zero where they are new."""
        for dim, index in enumerate(self.index):
            if index is not None:
                index = index.to(source.device)
                source = source.index_select(dim, index.clamp(min=0)).masked_fill_(
                    along(index < 0, dim, source.ndim), 0
                )
        return source

    def value(self, old: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The tensor itself, in the type and on the device of the new parameter."""
        found = (
            torch.zeros_like(like)
            if self.source is None
            else scaled(self.take(old[self.source].detach()), self.weight)
        )
        return found if self.plus is None else found + self.plus.to(found)

    def known(self, shape: torch.Size) -> Tensor:
        """Which elements come from the source."""
        found = torch.full(shape, self.source is not None)
        for dim, index in enumerate(self.index):
            if index is not None:
                found &= along(index.cpu() >= 0, dim, len(shape))
        return found


def scaled(x: Tensor, factor: Factor) -> Tensor:
    return (
        x
        if isinstance(factor, float) and factor == 1
        else x * (factor.to(x) if isinstance(factor, Tensor) else factor)
    )


@dataclass(frozen=True)
class IndexMap:
    """A piece for each tensor of the new model that trains, and the shapes there were."""

    pieces: dict[str, Piece]
    old: dict[str, torch.Size]
    new: dict[str, torch.Size]
    truncated: dict[str, float] = field(
        default_factory=dict
    )  # of a rank that was cut: the share of the term's norm that is lost

    def copies(self) -> Iterator[tuple[str, Tensor, str, Tensor]]:
        """Rows inside blocks that began as one: (tensor, rows, the tensor with the first of each, its rows)."""
        first: dict[tuple[str, int], tuple[str, int]] = {}
        for name, piece in self.pieces.items():
            if piece.source is None or not name.startswith("blocks.") or len(self.new[name]) != 2:
                continue
            rows = (
                piece.index[0]
                if piece.index and piece.index[0] is not None
                else torch.arange(self.new[name][0])
            )
            one = (
                piece.source if ".experts." in name else name
            )  # a layer that is stacked twice is no copy of itself: it sees other inputs
            found: dict[str, list[tuple[int, int]]] = {}
            for row, source in enumerate(rows.tolist()):
                if source >= 0:
                    owner, begun = first.setdefault((one, source), (name, row))
                    if (owner, begun) != (name, row):
                        found.setdefault(owner, []).append((row, begun))
            for owner, pairs in found.items():
                mine, theirs = torch.tensor(pairs).unbind(1)
                yield name, mine, owner, theirs


class Rate(NamedTuple):
    """By what a parameter's rate, weight decay and AdamW's eps are multiplied for a wide run to follow the narrow one."""

    lr: float
    weight_decay: float
    eps: float


def rates(moved: IndexMap) -> dict[str, Rate]:
    """A weight that became 1/n of its source must move by 1/n and lose as much as it did; eps is compared with its gradient."""
    found = {}
    for name, piece in moved.pieces.items():
        if isinstance(piece.weight, float) and isinstance(piece.grad, float):
            found[name] = Rate(piece.weight, 1 / piece.weight, piece.grad)
    return found


def param_schedules(
    before: Mapping[str, ParamSchedule], moved: IndexMap, op: Op, step: int
) -> dict[str, ParamSchedule]:
    """Of the parameters that do not learn as all do. New are those without a past, and a layer's second copy."""
    found, wide, seen = {}, rates(moved) if op.lr.width_rule == "adam_1_over_n" else {}, set[str]()
    for name, piece in moved.pieces.items():
        mark = before.get(piece.source or "", DEFAULT_SCHEDULE)
        new = (
            piece.grad is None or piece.source is None or (op.name == "stack_layers" and piece.source in seen)
        )
        seen.add(piece.source or "")
        if new:
            mark = ParamSchedule(
                op.lr.new_params_peak, since=step if op.lr.rewarm_iters else 0, rewarm=op.lr.rewarm_iters
            )
        elif name in wide:
            by = wide[name]
            mark = mark._replace(
                lr=mark.lr * by.lr, weight_decay=mark.weight_decay * by.weight_decay, eps=mark.eps * by.eps
            )
        if mark != DEFAULT_SCHEDULE:
            found[name] = mark
    return found


def transfer(
    state: Mapping[str, Tensor],
    moved: IndexMap,
    mode: str = "auto",
    min_coverage: float = 0.0,
    dry: bool = False,
) -> tuple[dict[str, Tensor], float]:
    """train.Optimizers.state() of the model before, as that of the model after; and the share of its elements that kept theirs.

    scale: by the gradients' factors. auto: the same, for every op. keep: as they are. reset: nothing. asymmetric: as scale, but only the
    first of several copies keeps its momentum, so that they part. A run without any state yet keeps all of it. dry: the share alone.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not allowed; use {', '.join(MODES)}")
    held = by_parameter(state, moved.old)
    found: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    kept = 0
    for name, shape in moved.new.items():
        piece = moved.pieces[name]
        if mode == "reset" or piece.source not in held or piece.grad is None:
            continue
        mine, known = dict(held[piece.source]), piece.known(shape)
        goes_on = known
        if mode == "asymmetric":
            used = seen.setdefault(piece.source, torch.zeros(moved.old[piece.source], dtype=torch.bool))
            goes_on = known & _firsts(piece, shape) & ~piece.take(used)
            used |= _used(piece, used.shape)
        factor = 1.0 if mode == "keep" else piece.grad
        for key in mine.keys() - ({"step"} if not dry else {"step", "exp_avg", "momentum_buffer"}):
            by = factor if key != "exp_avg_sq" else factor * factor
            mine[key] = scaled(piece.take(mine[key]), by)
        if not known.all() and "exp_avg_sq" in mine:
            there = known.to(mine["exp_avg_sq"].device)
            typical = mine["exp_avg_sq"][there].mean() if known.any() else 0.0
            if not typical > 0:
                continue  # nothing was learnt yet: it restarts as a whole
            mine["exp_avg_sq"] = mine["exp_avg_sq"].where(there, typical)
        kept += int(goes_on.sum())
        if dry:
            continue
        for key in mine.keys() & {"exp_avg", "momentum_buffer"}:
            mine[key] = mine[key].masked_fill(~goes_on.to(mine[key].device), 0)
        found |= {f"optimizer/{name}/{key}": value.clone() for key, value in mine.items()}
    total = sum(shape.numel() for shape in moved.new.values())
    coverage = kept / total if state and total else 1.0
    if mode != "reset" and coverage < min_coverage:
        raise ValueError(
            f"{coverage:.1%} of the optimiser's state went over, min_coverage={min_coverage:g} asks for more; lower it"
        )
    return found, coverage


def by_parameter(state: Mapping[str, Tensor], old: Mapping[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    """State that fits no parameter is refused: dropped in silence, it would be missed by nobody."""
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, value in state.items():
        kind, _, rest = str(full_name).partition("/")
        name, _, key = rest.rpartition("/")
        if (
            kind != "optimizer"
            or name not in old
            or key not in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")
        ):
            allowed = "optimizer/<parameter>/ and exp_avg, exp_avg_sq, step or momentum_buffer"
            raise ValueError(
                f"state {full_name!r} belongs to no parameter of the model before the op; give it as {allowed}"
            )
        if key != "step" and value.shape != old[name]:
            raise ValueError(
                f"state {full_name!r} has shape {tuple(value.shape)}; its parameter has {tuple(old[name])}"
            )
        found.setdefault(name, {})[key] = value
    return found


def _firsts(piece: Piece, shape: torch.Size) -> Tensor:
    """Which elements are the first in this tensor to come from theirs."""
    found = torch.ones(shape, dtype=torch.bool)
    for dim, index in enumerate(piece.index):
        if index is not None and len(index):
            place = torch.arange(len(index))
            first = torch.full((int(index.max()) + 2,), len(index)).scatter_reduce(
                0, index + 1, place, "amin"
            )
            found &= along(first[index + 1] == place, dim, len(shape))
    return found


def _used(piece: Piece, shape: torch.Size) -> Tensor:
    """Which elements of the source are taken."""
    found = torch.ones(shape, dtype=torch.bool)
    for dim, index in enumerate(piece.index):
        if index is not None:
            there = torch.zeros(shape[dim], dtype=torch.bool)
            there[index[index >= 0]] = True
            found &= along(there, dim, len(shape))
    return found
