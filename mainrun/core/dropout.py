"""Make dropout masks from random bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.plan.plan import StepInputs, in_256ths
from mainrun.plan.routing import selected_tokens

Site = tuple[int, float]  # the number of elements and the dropout rate of one dropout layer


def dropout_sites(cfg: TrainConfig, inputs: StepInputs, rows: int, attention: str) -> list[Site]:
    """Return the number of elements and the dropout rate of each dropout in a forward pass, in order."""
    sites = [(rows * cfg.block_size * cfg.d_model, inputs.dropout)]
    for letter, depth_rate in zip(
        cfg.letters, depth_rates(inputs.stochastic_depth, cfg.n_layer), strict=True
    ):
        tokens = cfg.block_size if letter == "D" else selected_tokens(inputs.capacity, cfg.block_size)
        branch = rows * tokens * cfg.d_model
        # Fused attention creates the dropout mask itself.
        weights = rows * cfg.n_head * tokens**2 if attention == "plain" else 0
        sites.append((weights, inputs.attn_dropout))
        sites += [(branch, inputs.resid_dropout), (rows, depth_rate)] * 2
    return [(size, rate) for size, rate in sites if size and rate]


def depth_rates(rate: float, layers: int) -> list[float]:
    """Return the rate at which stochastic depth leaves out the branches of each layer.

    The rate rises linearly with depth: layer i of n, counted from 0, has (i + 1) / n of the rate of the last
    layer.
    """
    return [in_256ths(rate * (layer + 1) / layers) for layer in range(layers)]


def random_bytes(count: int, seed: int) -> np.ndarray:
    """Return random bytes on the CPU. numpy generates random bytes ten times faster than torch on a CPU."""
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(0, 2**64, -(-count // 8), dtype=np.uint64)
    return words.view(np.uint8)[:count]


def threshold(noise: Any, sites: list[Site]) -> None:
    """Convert random bytes to dropout masks in place.

    A byte becomes 1 if its value is at least 256 times the dropout rate. Otherwise, the byte becomes 0.
    """
    compare: Any = torch.greater_equal if isinstance(noise, Tensor) else np.greater_equal
    start = 0
    for rate, sites_of_rate in groupby(sites, key=lambda site: site[1]):
        size = sum(size for size, _ in sites_of_rate)
        part = noise[start : start + size]
        compare(part, round(256 * rate), out=part)
        start += size


class Masks:
    """The dropout masks of one forward pass, in the order of `dropout_sites`.

    Each mask element takes one byte.
    """

    def __init__(self, pool: Tensor) -> None:
        self.pool = pool
        self.used = 0

    def take(self, shape: Iterable[int]) -> Tensor:
        """Return the next unused mask in the given shape."""
        shape = tuple(shape)
        start = self.used
        self.used += math.prod(shape)
        return self.pool[start : self.used].view(shape)

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Apply dropout: multiply x by the next unused mask, and scale the result by 1 / (1 - p)."""
        if not p:
            return x
        # Converting bytes to floats is six times faster than converting bools to floats. The scale is applied
        # last, because multiplying the mask by the scale would round the scale to bfloat16.
        return x * self.take(x.shape).to(x.dtype) * (1 / (1 - p))

    def drop_rows(self, x: Tensor, p: float) -> Tensor:
        """Apply stochastic depth: drop whole rows of x (B, T, D), and scale the other rows by 1 / (1 - p)."""
        if not p:
            return x
        return x * self.take((x.size(0), 1, 1)).to(x.dtype) * (1 / (1 - p))

    def drop_branch(self, y: Tensor, dropout: float, depth_rate: float) -> Tensor:
        """Apply dropout and stochastic depth to the output y (B, T, D) of a residual branch."""
        return self.drop_rows(self.drop(y, dropout), depth_rate)
