"""mainrun.data.batches"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mainrun.config import TrainConfig
from mainrun.plan.plan import Segment

if TYPE_CHECKING:
    pass

from mainrun.data.tokenizer import EOS

# -- batches


class Batches:
    """The batch of a step as a pure function of (config, step): asked in any order, it is the same."""

    def __init__(self, cfg: TrainConfig, train: np.ndarray) -> None:
        self.cfg = cfg
        self.train = train
        self._epoch = -1
        self._stream = train

    def at(self, step: int, segment: Segment | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets [batch_size, block_size] of a step, counted from 0. segment: the phase of the run that it is in."""
        segment = segment or Segment(self.cfg)
        span = segment.span
        segment.check_fits(len(self.train))
        epoch, start = segment.place(step, len(self.train))
        stream = self._shuffled(epoch) if self.cfg.order == "shuffle_titles" else self.train
        chunk = stream[start : start + span + 1].astype(np.int64)
        shape = (segment.cfg.batch_size, self.cfg.block_size)
        return chunk[:-1].reshape(shape), chunk[1:].reshape(shape)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Train with its titles in the order of an epoch; only the last one asked for is kept."""
        if self._epoch != epoch:
            ends = np.flatnonzero(self.train == EOS) + 1
            starts = np.concatenate(([0], ends[:-1]))
            order = np.random.default_rng((self.cfg.seed, epoch)).permutation(len(ends))
            lengths = (ends - starts)[order]
            moved = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            source = np.arange(lengths.sum()) + np.repeat(starts[order] - moved, lengths)
            self._epoch, self._stream = epoch, self.train[source]
        return self._stream
