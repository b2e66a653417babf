"""Mix the predictions of an n-gram model of the train tokens into the scores of a run.

The n-gram model is an interpolated Kneser-Ney model with one discount. It is counted once, from the tokens of
train only, and the training of the neural model does not use it. A context never reaches beyond the <eos>
before its title.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.core.kernels import CHUNK
from mainrun.data.tokenizer import EOS

DISCOUNT = 0.7  # is subtracted from every count, and leaves probability for shorter contexts


class Level(NamedTuple):
    """All contexts of one length that occur in train, each with the tokens that follow it.

    The contexts are numbered. The tokens that follow context i are entries[i] to entries[i + 1] - 1 of
    `tokens` and `probabilities`.
    """

    codes: Tensor  # of each context, in ascending order: shorter context * vocabulary + the token before it
    entries: Tensor
    tokens: Tensor
    probabilities: Tensor
    backoff: Tensor  # of each context, the probability that the next shorter context distributes


class NGram(nn.Module):
    """An n-gram model, which predicts each token from at most `order` - 1 tokens before it.

    tokens: the token stream of train.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.levels = [
            Level(*(torch.from_numpy(array) for array in arrays))
            for arrays in count_levels(tokens.astype(np.int64), vocab_size, order)
        ]

    @property
    def entries(self) -> int:
        """The number of pairs of a context and a next token in the model."""
        return sum(len(level.tokens) for level in self.levels)

    def forward(self, idx: Tensor) -> Tensor:
        """Return the probability of each next token: (B, T) -> (B, T, V), in float32.

        The context of a token consists of tokens of its row only.
        """
        shape = (*idx.shape, self.vocab_size)
        probabilities = torch.full(shape, 1 / self.vocab_size, device=idx.device).flatten(0, 1)
        rows = torch.arange(len(probabilities), device=idx.device)  # the positions whose context is known
        contexts = torch.zeros_like(rows)
        for length, level in enumerate(self._levels_on(idx.device)):
            if length:
                rows, contexts = extend(rows, contexts, tokens_before(idx, length), level, self.vocab_size)
            add_level(probabilities, rows, contexts, level)
        return probabilities.view(shape)

    def _levels_on(self, device: torch.device) -> list[Level]:
        if self.levels[0].codes.device != device:
            self.levels = [Level(*(tensor.to(device) for tensor in level)) for level in self.levels]
        return self.levels


def extend(
    rows: Tensor, contexts: Tensor, before: Tensor, level: Level, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Make the contexts one token longer. Keep only the rows whose longer context occurs in train.

    before: for each position, the next token of its context, or -1 if the context cannot be longer.
    """
    token = before[rows]
    code = contexts * vocab_size + token
    longer = torch.searchsorted(level.codes, code).clamp(max=len(level.codes) - 1)
    occurs = (token >= 0) & (level.codes[longer] == code)
    return rows[occurs], longer[occurs]


def add_level(probabilities: Tensor, rows: Tensor, contexts: Tensor, level: Level) -> None:
    """Replace the probabilities of rows by those of their longer contexts."""
    probabilities[rows] *= level.backoff[contexts, None]
    first = level.entries[contexts]
    count = level.entries[contexts + 1] - first
    row = rows.repeat_interleave(count)
    within = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count).repeat_interleave(count)
    entry = first.repeat_interleave(count) + within
    probabilities[row, level.tokens[entry]] += level.probabilities[entry]


def tokens_before(idx: Tensor, length: int) -> Tensor:
    """Return the token that makes a context of each position `length` tokens long: (B, T) -> (B T).

    It is -1 if it is not in the row. Contexts that begin with <eos> need no check, because the model has no
    longer ones.
    """
    before = torch.full_like(idx, -1)
    positions = idx.shape[1] - length + 1  # whose contexts are in the row
    if positions > 0:
        before[:, length - 1 :] = idx[:, :positions]
    return before.flatten()


# -- counting


def count_levels(tokens: np.ndarray, vocab_size: int, order: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the arrays of each `Level`, beginning with the empty context."""
    inputs = np.concatenate([[EOS], tokens[:-1]])
    codes = [np.zeros(1, np.int64)]
    contexts = [np.zeros(len(inputs), np.int64)]  # for each length and position, the context or -1
    for length in range(1, order):
        code = _longer_codes(inputs, contexts[-1], length, vocab_size)
        known = np.unique(code[code >= 0])
        if len(known) == 0:
            break  # no title is this long
        codes.append(known)
        contexts.append(np.where(code >= 0, np.searchsorted(known, code), -1))
    contexts.append(np.full(len(inputs), -1))  # no context is longer
    for length in range(len(codes)):
        pairs, counts = _count_pairs(contexts[length], contexts[length + 1], tokens, vocab_size)
        yield codes[length], *_estimate(pairs, counts, len(codes[length]), vocab_size)


def _longer_codes(inputs: np.ndarray, contexts: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """Return the code of the context of each position that is one token longer, or -1 if there is none."""
    codes = np.full(len(inputs), -1)
    before = inputs[: len(inputs) - length + 1]
    codes[length - 1 :] = contexts[length - 1 :] * vocab_size + before
    ended = contexts < 0
    if length > 1:
        ended[length - 1 :] |= inputs[1 : len(inputs) - length + 2] == EOS
    ended[: length - 1] = True
    return np.where(ended, -1, codes)


def _count_pairs(
    contexts: np.ndarray, longer: np.ndarray, tokens: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of a context and a next token, in ascending order, and the count of each pair.

    As in Kneser-Ney smoothing, a pair counts once for each longer context in which it occurs. Contexts that
    are never longer count as often as they occur.
    """
    pairs = contexts * vocab_size + tokens
    counted = longer < 0
    _, first = np.unique(np.where(counted, -1, longer * vocab_size + tokens), return_index=True)
    counted[first] = True
    counted &= contexts >= 0
    return np.unique(pairs[counted], return_counts=True)


def _estimate(
    pairs: np.ndarray, counts: np.ndarray, n_contexts: int, vocab_size: int
) -> tuple[np.ndarray, ...]:
    """Return the arrays entries, tokens, probabilities and backoff of a `Level`."""
    context, token = np.divmod(pairs, vocab_size)
    totals = np.bincount(context, weights=counts, minlength=n_contexts)
    distinct = np.bincount(context, minlength=n_contexts)
    entries = np.concatenate([[0], np.cumsum(distinct)])
    probabilities = (counts - DISCOUNT) / totals[context]
    backoff = DISCOUNT * distinct / totals
    return entries, token, probabilities.astype(np.float32), backoff.astype(np.float32)


# -- mixing


class Mixture(nn.Module):
    """A model whose predictions are mixed with those of an n-gram model, for scores only.

    weight: the share of the n-gram model.
    """

    def __init__(self, model: nn.Module, ngram: NGram, weight: float) -> None:
        super().__init__()
        self.model = model
        self.ngram = ngram
        self.weight = weight

    @torch.no_grad()
    def forward(self, idx: Tensor) -> Tensor:
        """Return the log of the weighted mean of the two probabilities: (B, T) -> (B, T, V), in float32."""
        logits = self.model(idx)
        mixed = self.ngram(idx).mul_(self.weight)
        rows = max(1, CHUNK[logits.device.type] // logits.size(-1))  # the softmax needs memory for these rows
        parts = mixed.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows)
        for total, part in zip(*parts, strict=True):
            total.add_(F.softmax(part.float(), dim=-1), alpha=1 - self.weight).log_()
        return mixed


def neural_part(model: nn.Module) -> Any:
    """Return the neural model of a mixture, or the model itself if it is not a mixture."""
    return model.model if isinstance(model, Mixture) else model
