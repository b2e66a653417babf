"""The score of a model on held-out tokens: the evaluate formula, and nothing else.

This file is the formula. Its source is hashed into every run (`evaluate_source_hash`), so that two figures are known to
come from the same code; what checks the figures lives in guards.py. Read it whole, it is short on purpose.

    official   the public task's figure: NLL over non-overlapping spans of rows*length+1 tokens, per character of the joined text.
               What is left after the last whole span is not scored; `coverage` says how much was.
    full       the figure we rank by: every token is a target exactly once, <eos> is the first context, same denominator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mainrun.data.tokenizer import EOS
from mainrun.errors import ConfigError

# Numbers in one forward's logits, and of them in the cross entropy at a time (a CPU's cache holds those): speed, never the formula
LOGITS = {"cpu": 16_000_000, "cuda": 512_000_000}
CHUNK = {"cpu": 1_000_000, "cuda": 64_000_000}


@dataclass(frozen=True)
class Score:
    loss: float  # nats per token of the full pass
    official: float
    full: float
    bits_per_byte: float  # of the full pass, over the raw titles
    coverage: float  # share of the tokens that are targets of the official score
    tokens: int  # targets of the full pass: all of them


def official_spans(n_tokens: int, geometry: tuple[int, int]) -> int:
    """Whole spans of the official score in `n_tokens`; a ConfigError when there is none. (A run asks before step 0.)"""
    rows, length = geometry
    span = rows * length + 1
    if n_tokens < span:
        raise ConfigError(
            f"validation has {n_tokens:,} tokens, shorter than one span of the official score, {rows}x{length}+1 = {span:,} tokens; "
            "set official_geometry to a smaller ROWSxTOKENS, lower batch_size or block_size, or raise num_titles or val_frac"
        )
    return n_tokens // span


def official_coverage(n_tokens: int, geometry: tuple[int, int]) -> float:
    return official_spans(n_tokens, geometry) * geometry[0] * geometry[1] / n_tokens


def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    chars: int,
    nbytes: int,
    block_size: int,
    geometry: tuple[int, int],
) -> Score:
    """Score `model` (idx [B, T] -> logits [B, T, V]) on one split. No gradient, no RNG; every module's mode is as it was."""
    n = len(tokens)
    spans = official_spans(n, geometry)
    if geometry[1] > block_size:
        raise ConfigError(
            f"official_geometry rows of {geometry[1]} tokens are longer than block_size={block_size}; make them shorter"
        )
    if chars <= 0 or nbytes <= 0:
        raise ConfigError(
            f"validation has chars={chars} and bytes={nbytes}; both must be positive: is the corpus empty?"
        )
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        # no_grad, not inference_mode: a table that a model makes lazily in here must still be usable in the next training step
        with torch.no_grad():
            official_nll = _nll(model, _official(tokens, spans, geometry))
            full_nll = _nll(model, _full(tokens, block_size))
    finally:
        for m, mode in modes:
            m.training = mode
    return Score(
        loss=full_nll / n,
        official=official_nll / chars,
        full=full_nll / chars,
        bits_per_byte=full_nll / math.log(2) / nbytes,
        coverage=official_coverage(n, geometry),
        tokens=n,
    )


Rows = tuple[np.ndarray, np.ndarray]  # inputs and targets, both [rows, length]


def _official(tokens: np.ndarray, spans: int, geometry: tuple[int, int]) -> Iterator[Rows]:
    rows, length = geometry
    cut = tokens[: spans * (rows * length + 1)].reshape(spans, rows * length + 1)
    yield cut[:, :-1].reshape(-1, length), cut[:, 1:].reshape(-1, length)


def _full(tokens: np.ndarray, block_size: int) -> Iterator[Rows]:
    """Whole blocks, then the short one at the end. A block knows nothing of the one before it but that block's last token."""
    inputs = np.concatenate([np.array([EOS], dtype=tokens.dtype), tokens[:-1]])
    whole = len(tokens) // block_size * block_size
    if whole:
        yield inputs[:whole].reshape(-1, block_size), tokens[:whole].reshape(-1, block_size)
    if whole < len(tokens):
        yield inputs[None, whole:], tokens[None, whole:]


def _nll(model: nn.Module, parts: Iterator[Rows]) -> float:
    """Summed negative log-likelihood in nats: each token's in float32, the sum in float64."""
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    width = 1  # the vocabulary's size is not known before the first forward
    for inputs, targets in parts:
        start = 0
        while start < len(inputs):
            x, y = (_to(a[start : start + width], device) for a in (inputs, targets))
            start += len(x)
            logits: Tensor = model(x)
            rows = max(1, CHUNK[device.type] // logits.shape[-1])
            for some, target in zip(logits.flatten(0, 1).split(rows), y.flatten().split(rows), strict=True):
                total += F.cross_entropy(some.float(), target, reduction="none").double().sum()
            width = max(1, LOGITS[device.type] // (inputs.shape[1] * logits.shape[-1]))
    return float(total)


def _to(a: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(a.astype(np.int64)).to(device)


def evaluate_source_hash() -> str:
    """sha256 of this file as it lies in the package: the whole formula is in it."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
