"""The score of a model on held-out tokens: the formula of `evaluate` and nothing else.

Every run records the hash of this file (`evaluate_source_hash`), which shows whether two scores come from the
same code. checks/guards.py checks the scores.

    official   the score of the public task: negative log-likelihood (NLL) per character of the joined text,
               over non-overlapping spans of rows*length+1 tokens. The tokens after the last complete span
               are not scored; `coverage` is the share of tokens that are.
    full       the score that runs are ranked by: NLL per character, where every token is a target exactly
               once and <eos> is the first context.
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

# Logits per forward pass, and logits per call of the cross entropy. On a CPU, a chunk fits in the cache.
# Both change the speed but not the formula.
LOGITS = {"cpu": 16_000_000, "cuda": 512_000_000}
CHUNK = {"cpu": 1_000_000, "cuda": 64_000_000}

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, both (rows, length)


@dataclass(frozen=True)
class Score:
    """The scores of one split."""

    loss: float  # nats per token, from the full score
    official: float
    full: float
    bits_per_byte: float  # from the full score, per byte of the raw titles
    coverage: float  # share of the tokens that are targets of the official score
    tokens: int  # number of targets of the full score


def official_spans(n_tokens: int, geometry: tuple[int, int]) -> int:
    """Return the number of complete spans of the official score in `n_tokens`.

    Raise ConfigError if there are none. A run checks this before step 0.
    """
    rows, length = geometry
    span = rows * length + 1
    if n_tokens < span:
        raise ConfigError(
            f"validation has {n_tokens:,} tokens, shorter than one span of the official score, "
            f"{rows}x{length}+1 = {span:,} tokens; set official_geometry to a smaller ROWSxTOKENS, "
            "lower batch_size or block_size, or raise num_titles or val_frac"
        )
    return n_tokens // span


def official_coverage(n_tokens: int, geometry: tuple[int, int]) -> float:
    """Return the share of `n_tokens` that the official score covers."""
    rows, length = geometry
    return official_spans(n_tokens, geometry) * rows * length / n_tokens


def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    chars: int,
    nbytes: int,
    block_size: int,
    geometry: tuple[int, int],
) -> Score:
    """Score a model, which maps token ids (B, T) to logits (B, T, V), on the tokens of one split.

    The scores are divided by `chars` and `nbytes`. No gradient is computed, no random number is drawn, and
    the training mode of every module is restored.
    """
    n = len(tokens)
    spans = official_spans(n, geometry)
    if geometry[1] > block_size:
        raise ConfigError(
            f"official_geometry: rows of {geometry[1]} tokens are longer than block_size={block_size}; "
            "make the rows shorter"
        )
    if chars <= 0 or nbytes <= 0:
        raise ConfigError(
            f"validation has chars={chars} and bytes={nbytes}; both must be positive, so check the corpus"
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a tensor that the model creates here and keeps must be usable in training.
        with torch.no_grad():
            official_nll = _nll(model, _official(tokens, spans, geometry))
            full_nll = _nll(model, _full(tokens, block_size))
    finally:
        for module, mode in modes:
            module.training = mode
    return Score(
        loss=full_nll / n,
        official=official_nll / chars,
        full=full_nll / chars,
        bits_per_byte=full_nll / math.log(2) / nbytes,
        coverage=official_coverage(n, geometry),
        tokens=n,
    )


def _official(tokens: np.ndarray, spans: int, geometry: tuple[int, int]) -> Iterator[Batch]:
    rows, length = geometry
    table = tokens[: spans * (rows * length + 1)].reshape(spans, rows * length + 1)
    yield table[:, :-1].reshape(-1, length), table[:, 1:].reshape(-1, length)


def _full(tokens: np.ndarray, block_size: int) -> Iterator[Batch]:
    """Yield the complete blocks, then the shorter block at the end.

    The first input of a block is the last token of the previous block.
    """
    inputs = np.concatenate([np.array([EOS], dtype=tokens.dtype), tokens[:-1]])
    complete = len(tokens) // block_size * block_size
    if complete:
        yield inputs[:complete].reshape(-1, block_size), tokens[:complete].reshape(-1, block_size)
    if complete < len(tokens):
        yield inputs[None, complete:], tokens[None, complete:]


def _nll(model: nn.Module, batches: Iterator[Batch]) -> float:
    """Return the summed negative log-likelihood in nats. Losses are float32 and their sum is float64."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    width = 1  # rows per forward pass; the vocabulary size is unknown before the first one
    for inputs, targets in batches:
        start = 0
        while start < len(inputs):
            x = _to(inputs[start : start + width], device)
            y = _to(targets[start : start + width], device)
            start += len(x)
            logits: Tensor = model(x)
            rows = max(1, CHUNK[device.type] // logits.shape[-1])
            for chunk, target in zip(logits.flatten(0, 1).split(rows), y.flatten().split(rows), strict=True):
                total += F.cross_entropy(chunk.float(), target, reduction="none").double().sum()
            width = max(1, LOGITS[device.type] // (inputs.shape[1] * logits.shape[-1]))
    return float(total)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)


def evaluate_source_hash() -> str:
    """Return the sha256 of this file, which contains the complete formula."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
