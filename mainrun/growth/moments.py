"""Map the elements of a grown model to elements of the old model, and transfer the optimizer state.

The gradient of a copied weight is the gradient of the source weight times a known factor. The momentum is
multiplied by the same factor, and the second moment is multiplied by the square of the factor. The function
`state_powers` in mainrun/plan/optimizers.py returns the exponent of the factor for each state tensor.

A completely new tensor starts with an empty optimizer state. A tensor with some new elements keeps its step
count. At a large step count, a second moment of zero would make the first update of a new element too large.
With beta2 = 0.999, this update would be 3.2 times the learning rate. The second moment of a new element
therefore starts at the mean over the old elements of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mainrun.core.optimizers import DEFAULT_SCHEDULE, ParamSchedule
from mainrun.plan.ops import Op
from mainrun.plan.optimizers import state_powers

MODES = ("auto", "keep", "scale", "reset", "asymmetric")
STEP = "step"  # the step count of an optimizer state, which is copied but never scaled
Factor = float | Tensor  # a factor: a number, or a tensor that can be broadcast


def along(index: Tensor, dim: int, ndim: int) -> Tensor:
    """Reshape a vector to `ndim` dimensions, so that it broadcasts along dimension `dim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return index.view(shape)


def scaled(x: Tensor, factor: Factor) -> Tensor:
    """Return x * factor, or x itself if the factor is 1."""
    if isinstance(factor, Tensor):
        return x * factor.to(x)
    if factor == 1:
        return x
    return x * factor


def power_of(factor: Factor, power: int) -> Factor:
    """Compute a power by repeated multiplication, because the operator `**` may round differently."""
    result: Factor = 1.0
    for _ in range(power):
        result = result * factor
    return result


@dataclass(frozen=True)
class Piece:
    """The formula for a tensor of the new model: source[index] * weight + plus."""

    source: str | None  # the name of a tensor in the old model, or None if all elements are new
    # Each tensor maps the new indices of one dimension to source indices. The index -1 marks a new element.
    # A dimension whose entry is None or missing is copied unchanged.
    index: tuple[Tensor | None, ...] = ()
    weight: Factor = 1.0
    grad: Factor | None = 1.0  # the new gradient divided by the source gradient, or None for an empty state
    plus: Tensor | None = None  # values to add, for example noise or random new elements

    def take(self, source: Tensor) -> Tensor:
        """Return the elements of a source tensor at their new positions. New elements are zero."""
        for dim, index in enumerate(self.index):
            if index is None:
                continue
            index = index.to(source.device)
            is_new = along(index < 0, dim, source.ndim)
            source = source.index_select(dim, index.clamp(min=0)).masked_fill_(is_new, 0)
        return source

    def value(self, old: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the new tensor. A tensor without a source has the dtype and device of `like`."""
        if self.source is None:
            value = torch.zeros_like(like)
        else:
            value = scaled(self.take(old[self.source].detach()), self.weight)
        if self.plus is None:
            return value
        return value + self.plus.to(value)

    def known(self, shape: torch.Size) -> Tensor:
        """Return a mask of the elements that come from the source."""
        mask = torch.full(shape, self.source is not None)
        for dim, index in enumerate(self.index):
            if index is not None:
                mask &= along(index.cpu() >= 0, dim, len(shape))
        return mask


class Copies(NamedTuple):
    """Rows of the tensor `name` that started as copies.

    Row rows[i] started as a copy of row first_rows[i] in the tensor `first`.
    """

    name: str
    rows: Tensor
    first: str
    first_rows: Tensor


@dataclass(frozen=True)
class IndexMap:
    """The pieces of all trainable tensors in a new model, and the tensor shapes of both models."""

    pieces: dict[str, Piece]
    old: dict[str, torch.Size]
    new: dict[str, torch.Size]
    # Maps the name of each module to the share of the norm that its low-rank term lost by truncation.
    truncated: dict[str, float] = field(default_factory=dict)

    def copies(self) -> Iterator[Copies]:
        """Yield the copied rows of all matrices inside blocks, grouped by the tensor with the first copy."""
        first: dict[tuple[str, int], tuple[str, int]] = {}  # maps a source row to the first copy of the row
        for name, piece in self.pieces.items():
            if piece.source is None or not name.startswith("blocks.") or len(self.new[name]) != 2:
                continue
            source = name
            if ".experts." in name:
                # Only copies in experts are compared across tensors. Stacked copies of a layer get different
                # inputs, so they diverge anyway.
                source = piece.source
            pairs: dict[str, list[tuple[int, int]]] = {}
            for row, source_row in enumerate(self._source_rows(name)):
                if source_row < 0:
                    continue
                owner, first_row = first.setdefault((source, source_row), (name, row))
                if (owner, first_row) != (name, row):
                    pairs.setdefault(owner, []).append((row, first_row))
            for owner, row_pairs in pairs.items():
                rows, first_rows = torch.tensor(row_pairs).unbind(1)
                yield Copies(name, rows, owner, first_rows)

    def _source_rows(self, name: str) -> list[int]:
        """Return the source row of each row in a tensor."""
        index = self.pieces[name].index
        if not index or index[0] is None:
            return list(range(self.new[name][0]))
        rows: list[int] = index[0].tolist()
        return rows


# -- learning rates


class WidthFactors(NamedTuple):
    """Factors for the learning rate, the weight decay and the eps of a parameter in a wider model."""

    lr: float
    weight_decay: float
    eps: float


def width_factors(moved: IndexMap) -> dict[str, WidthFactors]:
    """Return the width factors of each parameter whose elements were scaled by a single number.

    If a weight was divided by n, the learning rate is divided by n. The weight decay is multiplied by n, so
    that the relative decay per step does not change. AdamW adds eps to the root mean square of the gradients,
    so eps is scaled like the gradient.
    """
    factors = {}
    for name, piece in moved.pieces.items():
        if isinstance(piece.weight, float) and isinstance(piece.grad, float):
            factors[name] = WidthFactors(piece.weight, 1 / piece.weight, piece.grad)
    return factors


def param_schedules(
    before: Mapping[str, ParamSchedule], moved: IndexMap, op: Op, step: int
) -> dict[str, ParamSchedule]:
    """Return the parameter schedules after an operation, without schedules that equal the default.

    A parameter counts as new if it starts with an empty optimizer state or is in a second copy of a layer.
    """
    by_width: dict[str, WidthFactors] = {}
    if op.lr.width_rule == "adam_1_over_n":
        by_width = width_factors(moved)
    schedules: dict[str, ParamSchedule] = {}
    seen: set[str] = set()
    for name, piece in moved.pieces.items():
        second_copy = op.name == "stack_layers" and piece.source in seen
        if piece.source is None or piece.grad is None or second_copy:
            schedule = _new_schedule(op, step)
        else:
            schedule = before.get(piece.source, DEFAULT_SCHEDULE)
            if name in by_width:
                schedule = _widened(schedule, by_width[name])
        if piece.source is not None:
            seen.add(piece.source)
        if schedule != DEFAULT_SCHEDULE:
            schedules[name] = schedule
    return schedules


def _new_schedule(op: Op, step: int) -> ParamSchedule:
    """Return the schedule of a new parameter."""
    if not op.lr.rewarm_iters:
        return ParamSchedule(op.lr.new_params_peak)
    return ParamSchedule(op.lr.new_params_peak, since=step, rewarm=op.lr.rewarm_iters)


def _widened(schedule: ParamSchedule, by: WidthFactors) -> ParamSchedule:
    return schedule._replace(
        lr=schedule.lr * by.lr,
        weight_decay=schedule.weight_decay * by.weight_decay,
        eps=schedule.eps * by.eps,
    )


# -- optimizer state

StateTensors = dict[str, Tensor]  # the optimizer state of one parameter


def transfer(
    state: Mapping[str, Tensor],
    moved: IndexMap,
    mode: str = "auto",
    min_coverage: float = 0.0,
    dry: bool = False,
) -> tuple[dict[str, Tensor], float]:
    """Return the optimizer state of the new model, and the share of elements whose old state was kept.

    state: `Optimizers.state()` of the old model. If the state is empty, the share is 1.
    mode: "scale" and "auto" scale the state like the gradients. "keep" copies the state without scaling.
        "reset" drops the state. "asymmetric" scales the state, but only the first copy keeps its momentum.
        The other copies then diverge from the first copy.
    min_coverage: the minimum share. A smaller share raises ValueError, except in the mode "reset".
    dry: whether to compute only the share and return no tensors.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not allowed; use {', '.join(MODES)}")
    powers = state_powers()
    old_state = by_parameter(state, moved.old)
    new_state: dict[str, Tensor] = {}
    used: dict[str, Tensor] = {}  # masks of the source elements whose momentum was already copied
    kept = 0
    for name, shape in moved.new.items():
        piece = moved.pieces[name]
        if mode == "reset" or piece.source not in old_state or piece.grad is None:
            continue
        known = piece.known(shape)
        keeps_momentum = known
        if mode == "asymmetric":
            source_used = used.setdefault(
                piece.source, torch.zeros(moved.old[piece.source], dtype=torch.bool)
            )
            keeps_momentum = known & _first_uses(piece, shape) & ~piece.take(source_used)
            source_used |= _used_elements(piece, source_used.shape)
        factor = 1.0 if mode == "keep" else piece.grad
        tensors = _scaled_state(old_state[piece.source], piece, factor, powers, dry)
        if not _fill_new_elements(tensors, powers, known):
            continue
        kept += int(keeps_momentum.sum())
        if dry:
            continue
        _clear_momentum(tensors, powers, ~keeps_momentum)
        for key, value in tensors.items():
            new_state[f"optimizer/{name}/{key}"] = value.clone()
    total = sum(shape.numel() for shape in moved.new.values())
    coverage = kept / total if state and total else 1.0
    if mode != "reset" and coverage < min_coverage:
        got = f"{coverage:.1%} of the optimizer's state was transferred"
        raise ValueError(f"{got}, but min_coverage={min_coverage:g} requires more; lower min_coverage")
    return new_state, coverage


def _scaled_state(
    tensors: StateTensors, piece: Piece, factor: Factor, powers: dict[str, int], dry: bool
) -> StateTensors:
    """Return the optimizer state of a parameter, moved to the new positions and scaled.

    A dry run returns the momentum unchanged.
    """
    result = dict(tensors)
    for key, value in tensors.items():
        if key == STEP or (dry and powers[key] == 1):
            continue
        result[key] = scaled(piece.take(value), power_of(factor, powers[key]))
    return result


def _fill_new_elements(tensors: StateTensors, powers: dict[str, int], known: Tensor) -> bool:
    """Set the second moments of new elements to the mean second moment of the known elements.

    Return False if this mean is zero. The parameter then starts with an empty state.
    """
    if known.all():
        return True
    for key, value in tensors.items():
        if key == STEP or powers[key] == 1:
            continue
        mask = known.to(value.device)
        mean = value[mask].mean() if known.any() else 0.0
        if not mean > 0:
            return False
        tensors[key] = value.where(mask, mean)
    return True


def _clear_momentum(tensors: StateTensors, powers: dict[str, int], mask: Tensor) -> None:
    """Set the momentum of the masked elements to zero."""
    for key, value in tensors.items():
        if key != STEP and powers[key] == 1:
            tensors[key] = value.masked_fill(mask.to(value.device), 0)


def by_parameter(state: Mapping[str, Tensor], old: Mapping[str, torch.Size]) -> dict[str, StateTensors]:
    """Group state tensors by parameter. Raise ValueError if a tensor fits no parameter."""
    keys = sorted({*state_powers(), STEP})
    grouped: dict[str, StateTensors] = {}
    for full_name, value in state.items():
        kind, _, rest = str(full_name).partition("/")
        name, _, key = rest.rpartition("/")
        if kind != "optimizer" or name not in old or key not in keys:
            got = f"state {full_name!r} belongs to no parameter of the model before the operation"
            raise ValueError(
                f"{got}; name it optimizer/<parameter>/<key>, where <key> is one of {', '.join(keys)}"
            )
        if key != STEP and value.shape != old[name]:
            got = f"state {full_name!r} has shape {tuple(value.shape)}"
            raise ValueError(f"{got}, but its parameter has shape {tuple(old[name])}")
        grouped.setdefault(name, {})[key] = value
    return grouped


def _first_uses(piece: Piece, shape: torch.Size) -> Tensor:
    """Return a mask of the elements that are the first copy of their source element within a tensor."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, index in enumerate(piece.index):
        if index is None or not len(index):
            continue
        position = torch.arange(len(index))
        slots = torch.full((int(index.max()) + 2,), len(index))  # slot 0 is for new elements
        first = slots.scatter_reduce(0, index + 1, position, "amin")
        mask &= along(first[index + 1] == position, dim, len(shape))
    return mask


def _used_elements(piece: Piece, shape: torch.Size) -> Tensor:
    """Return a mask of the source elements that a piece copies."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, index in enumerate(piece.index):
        if index is not None:
            is_used = torch.zeros(shape[dim], dtype=torch.bool)
            is_used[index[index >= 0]] = True
            mask &= along(is_used, dim, len(shape))
    return mask
