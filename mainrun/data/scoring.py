"""Score a model on held-out tokens. This file contains only the formula of the scores.

Every run records the hash of this file, which shows whether two scores were computed by the same code. The
guards in checks/guards.py verify the scores.

Both scores are the negative log-likelihood (NLL) per character of the joined text. The official score is the
score of the public task. It uses non-overlapping spans of rows * length + 1 tokens, and ignores the tokens
after the last complete span. `coverage` is the share of tokens that are targets of the official score.

Runs are ranked by the full score. In the full score, every token is a target exactly once, and the context of
the first token is <eos>.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mainrun.data.tokenizer import EOS
from mainrun.errors import ConfigError

# LOGITS is the number of logits per forward pass, and CHUNK is the number of logits per call of the cross
# entropy. On a CPU, a chunk fits in the cache. Both numbers affect the speed but not the formula.
LOGITS = {"cpu": 16_000_000, "cuda": 512_000_000}
CHUNK = {"cpu": 1_000_000, "cuda": 64_000_000}

Batch = tuple[np.ndarray, np.ndarray]  # the inputs and the targets, both of shape (rows, length)
LossCallback = Callable[[str, Tensor], None]  # gets the name of a score and the losses of its next targets


@dataclass(frozen=True)
class Score:
    """The scores of one split."""

    loss: float  # the full score in nats per token
    official: float
    full: float
    bits_per_byte: float  # the full score in bits per byte of the raw titles
    coverage: float  # the share of tokens that are targets of the official score
    tokens: int  # the number of targets of the full score


def official_spans(n_tokens: int, geometry: tuple[int, int]) -> int:
    """Return the number of complete spans of the official score in `n_tokens` tokens.

    Raise ConfigError if there are too few tokens for one span. A run calls this function before step 0.
    """
    rows, length = geometry
    span = rows * length + 1
    if n_tokens < span:
        raise ConfigError(
            f"validation has {n_tokens:,} tokens, but one span of the official score has "
            f"{rows}x{length}+1 = {span:,} tokens; set official_geometry to a smaller ROWSxTOKENS, "
            "lower batch_size or block_size, or raise num_titles or val_frac"
        )
    return n_tokens // span


def official_coverage(n_tokens: int, geometry: tuple[int, int]) -> float:
    """Return the share of `n_tokens` tokens that are targets of the official score."""
    rows, length = geometry
    return official_spans(n_tokens, geometry) * rows * length / n_tokens


def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    on_losses: LossCallback | None = None,
    /,
    *,
    chars: int,
    nbytes: int,
    block_size: int,
    geometry: tuple[int, int],
) -> Score:
    """Score a model on the tokens of one split.

    The model maps token ids of shape (B, T) to logits of shape (B, T, V). The official and the full score are
    divided by `chars`, and bits_per_byte is divided by `nbytes`. The function computes no gradients, draws no
    random numbers, and restores the training mode of every module.

    on_losses: receives the losses of "official" and then of "full", in the order of the targets.
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
        # The code uses no_grad instead of inference_mode, because the model may keep a tensor that it creates
        # here and use the tensor in training.
        with torch.no_grad():
            official_nll = _nll(model, _official(tokens, spans, geometry), "official", on_losses)
            full_nll = _nll(model, _full(tokens, block_size), "full", on_losses)
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
    """Yield the complete blocks, and then the shorter block at the end.

    The first input of a block is the last token of the previous block.
    """
    inputs = np.concatenate([np.array([EOS], dtype=tokens.dtype), tokens[:-1]])
    complete = len(tokens) // block_size * block_size
    if complete:
        yield inputs[:complete].reshape(-1, block_size), tokens[:complete].reshape(-1, block_size)
    if complete < len(tokens):
        yield inputs[None, complete:], tokens[None, complete:]


def _nll(
    model: nn.Module, batches: Iterator[Batch], name: str = "", on_losses: LossCallback | None = None
) -> float:
    """Return the total negative log-likelihood in nats. Float32 losses are summed in float64."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    width = 1  # rows per forward pass, which is raised when the first pass has shown the vocabulary size
    for inputs, targets in batches:
        start = 0
        while start < len(inputs):
            x = _to(inputs[start : start + width], device)
            y = _to(targets[start : start + width], device)
            start += len(x)
            logits: Tensor = model(x)
            rows = max(1, CHUNK[device.type] // logits.shape[-1])
            for chunk, target in zip(logits.flatten(0, 1).split(rows), y.flatten().split(rows), strict=True):
                losses = F.cross_entropy(chunk.float(), target, reduction="none")
                total += losses.double().sum()
                if on_losses:
                    on_losses(name, losses)
            width = max(1, LOGITS[device.type] // (inputs.shape[1] * logits.shape[-1]))
    return float(total)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)


def evaluate_source_hash() -> str:
    """Return the sha256 of this file, which contains the complete formula."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
