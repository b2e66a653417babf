"""Map recipes to coordinates in which hyperparameters hardly interact, and back.

The base config is the origin, and a range has the width 1. Rates are measured on a logarithmic scale. The
learning rate is measured relative to the square root of the batch size, and weight decay as the inverse
of its time constant, because the best values of these are nearly independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mainrun.config import TrainConfig
from sweeps.space import Parameter, Range, Space, active_parameters, base_value

STEPS = 128  # the number of steps of a range, so that equal recipes are recognised
DIGITS = 4  # the significant digits of an asked number
LOG_RATIO = 4  # the smallest ratio of numeric choices that are measured on a logarithmic scale
MOST_ENCODED = 16_384  # the largest number of recipes whose coordinates are kept
TEXT = 0.71  # the coordinate of a choice that is not a number
NEAR_ONE = {"momentum", "beta1", "beta2", "ema"}  # fields whose distance from 1 matters

Values = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """The coordinates of one parameter: one for a number, and one per value for other choices."""

    name: str
    parameter: Parameter
    base: Any  # the value of the base config

    @cached_property
    def texts(self) -> list[Any]:
        """The values that have a coordinate of their own, or an empty list for numbers."""
        if isinstance(self.parameter, Range):
            return []
        values = self.parameter.values
        if all(_is_number(value) for value in values):
            return []
        return [value for value in values if value != self.base]

    @property
    def width(self) -> int:
        return len(self.texts) or 1

    @cached_property
    def scale(self) -> str:
        if self.texts:
            return "text"
        if self.name in NEAR_ONE:
            return "near one"
        if isinstance(self.parameter, Range):
            return "log" if self.parameter.log else "linear"
        low, high = self.limits
        return "log" if low > 0 and high >= LOG_RATIO * low else "linear"

    @cached_property
    def limits(self) -> tuple[float, float]:
        if isinstance(self.parameter, Range):
            return self.parameter.low, self.parameter.high
        return min(self.parameter.values), max(self.parameter.values)

    def t(self, value: float) -> float:
        """Transform a number to the scale of the axis."""
        low, _ = self.limits
        if self.scale == "log":
            return math.log(value if value > 0 else low)
        if self.scale == "near one":
            return -math.log(1 - value)
        return float(value)

    @cached_property
    def span(self) -> float:
        """The width of the range on the scale of the axis."""
        low, high = self.limits
        return self.t(high) - self.t(low)

    @cached_property
    def origin(self) -> float:
        """The base's value on the scale of the axis, or the middle of the range if it is not a number."""
        low, high = self.limits
        if not _is_number(self.base):
            return (self.t(low) + self.t(high)) / 2
        return self.t(self.base)

    @cached_property
    def lattice(self) -> list[Any]:
        """All values that can be asked, in ascending order."""
        p = self.parameter
        if not isinstance(p, Range):
            return sorted(p.values) if not self.texts else list(p.values)
        if p.step is not None:
            count = int((p.high - p.low) / p.step + 1e-9) + 1
            return [min(p.low + i * p.step, p.high) for i in range(count)]
        numbers = [self._inverse(self.t(p.low) + self.span * i / STEPS) for i in range(STEPS + 1)]
        if isinstance(p.low, int) and isinstance(p.high, int):
            return sorted({round(number) for number in numbers})
        return sorted({min(max(float(f"{x:.{DIGITS}g}"), p.low), p.high) for x in numbers})

    def _inverse(self, t: float) -> float:
        if self.scale == "log":
            return math.exp(t)
        if self.scale == "near one":
            return 1 - math.exp(-t)
        return t

    @cached_property
    def _lattice_t(self) -> np.ndarray:
        return np.array([self.t(value) for value in self.lattice])

    def nearest(self, t: float) -> Any:
        """Return the value of the lattice that is closest on the scale of the axis."""
        return self.lattice[int(np.abs(self._lattice_t - t).argmin())]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Coordinates:
    """The coordinates of all parameters of a space.

    coupled: whether the learning rate and weight decay are measured relative to other parameters.
    """

    def __init__(self, space: Space, base: TrainConfig, train_tokens: int, coupled: bool = True) -> None:
        self.space = space
        self.coupled = coupled
        self.base = base
        self.axes = [
            Axis(name, parameter, base_value(name, base, train_tokens)) for name, parameter in space.items()
        ]
        # a batch determines other coordinates, and the learning rate determines that of weight decay
        self.axes.sort(key=lambda axis: {"lr": 1, "weight_decay": 2}.get(axis.name, 0))
        self.by_name = {axis.name: axis for axis in self.axes}
        starts = np.cumsum([0, *(axis.width for axis in self.axes)])
        self.slices = {axis.name: slice(*starts[i : i + 2]) for i, axis in enumerate(self.axes)}
        self.size = int(starts[-1])
        self._encoded: dict[tuple[tuple[str, Any], ...], np.ndarray] = {}

    def shift(self, name: str, value_of: Callable[[str], Any]) -> float:
        """Return what is added to the logarithm of a parameter to get its coordinate.

        `value_of` returns the value of another parameter.
        """
        shift = 0.0
        if not self.coupled:
            return shift
        if name == "lr" and self._is_log("lr"):
            if self._is_log("batch_size"):
                shift -= 0.5 * self._log_ratio("batch_size", value_of)
            if "momentum" in self.by_name and value_of("optimizer") == "sgd":
                shift += math.log((1 - self.by_name["momentum"].base) / (1 - value_of("momentum")))
        if name == "weight_decay" and self._is_log("weight_decay") and self._is_log("lr"):
            shift += self._log_ratio("lr", value_of)
            for field in ("batch_size", "block_size"):  # a larger batch means fewer steps
                if self._is_log(field):
                    shift -= self._log_ratio(field, value_of)
        return shift

    def _is_log(self, name: str) -> bool:
        axis = self.by_name.get(name)
        return axis is not None and axis.scale == "log"

    def _log_ratio(self, name: str, value_of: Callable[[str], Any]) -> float:
        axis = self.by_name[name]
        return axis.t(value_of(name)) - axis.origin

    def encode(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return the coordinates of a recipe. Parameters without a value stand at the value of the base."""
        key = tuple(values.items())
        if key not in self._encoded:
            if len(self._encoded) == MOST_ENCODED:
                self._encoded.clear()
            self._encoded[key] = self._encode(values)
        return self._encoded[key]

    def _encode(self, values: Mapping[str, Any]) -> np.ndarray:
        z = np.zeros(self.size)

        def value_of(name: str) -> Any:
            return values.get(name, getattr(self.base, name))

        for axis in self.axes:
            value = values.get(axis.name, axis.base)
            at = self.slices[axis.name]
            if axis.texts:
                z[at] = [TEXT * (value == text) for text in axis.texts]
                continue
            own = axis.t(value) if axis.name in values else axis.origin
            z[at] = (own - axis.origin + self.shift(axis.name, value_of)) / axis.span
        z.flags.writeable = False  # the array is shared
        return z

    def decode(self, z: np.ndarray) -> Values:
        """Return the recipe of the lattice that is closest to the coordinates."""
        values: Values = {}

        def value_of(name: str) -> Any:
            return values.get(name, getattr(self.base, name))

        for axis in self.axes:
            part = z[self.slices[axis.name]]
            if axis.texts:
                values[axis.name] = _text_at(axis, part)
            else:
                t = axis.origin + part[0] * axis.span - self.shift(axis.name, value_of)
                values[axis.name] = axis.nearest(t)
        active = active_parameters(self.space, values, self.base)
        return {name: values[name] for name in self.space if name in active}

    def at(self, shares: Sequence[float]) -> Values:
        """Return the recipe at a point of the unit cube, with one number per parameter of the space."""
        values: Values = {}
        for share, axis in zip(shares, self.axes, strict=True):
            values[axis.name] = axis.lattice[min(int(share * len(axis.lattice)), len(axis.lattice) - 1)]
        active = active_parameters(self.space, values, self.base)
        return {name: values[name] for name in self.space if name in active}


def _text_at(axis: Axis, part: np.ndarray) -> Any:
    """Return the choice with the largest coordinate, or the base's value if all coordinates are small."""
    assert not isinstance(axis.parameter, Range)
    largest = int(part.argmax())
    if part[largest] < TEXT / 2 and axis.base in axis.parameter.values:
        return axis.base
    return axis.texts[largest]
