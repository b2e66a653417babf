"""Select the training batch of each step."""

from __future__ import annotations

import numpy as np

from mainrun.config import TrainConfig
from mainrun.data.tokenizer import EOS
from mainrun.plan.plan import Segment


class Batches:
    """The training batches of a run.

    A batch depends only on the config, the tokens and the step, so the batches can be read in any order.
    """

    def __init__(self, cfg: TrainConfig, train: np.ndarray) -> None:
        self.cfg = cfg
        self.train = train
        self._epoch = -1  # the epoch for which `_stream` is shuffled
        self._stream = train

    def at(self, step: int, segment: Segment | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and the targets of a step. Both arrays have the shape (batch_size, block_size).

        Steps are counted from 0. `segment` is the segment of the plan that contains the step. By default, the
        whole run is a single segment.
        """
        segment = segment or Segment(self.cfg)
        span = segment.span
        segment.check_fits(len(self.train))
        epoch, start = segment.place(step, len(self.train))
        stream = self._shuffled(epoch) if self.cfg.order == "shuffle_titles" else self.train
        chunk = stream[start : start + span + 1].astype(np.int64)
        shape = (segment.cfg.batch_size, self.cfg.block_size)
        return chunk[:-1].reshape(shape), chunk[1:].reshape(shape)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Return the training tokens, with the titles shuffled for an epoch. Only one epoch is cached."""
        if self._epoch != epoch:
            ends = np.flatnonzero(self.train == EOS) + 1
            starts = np.concatenate(([0], ends[:-1]))
            order = np.random.default_rng((self.cfg.seed, epoch)).permutation(len(ends))
            lengths = (ends - starts)[order]
            new_starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            source = np.arange(lengths.sum()) + np.repeat(starts[order] - new_starts, lengths)
            self._stream = self.train[source]
            self._epoch = epoch
        return self._stream
