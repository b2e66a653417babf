"""Compares `evaluate` with the formula, computed token by token, and tests its side effects."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mainrun.data import scoring
from mainrun.data.scoring import evaluate, official_coverage, official_spans
from mainrun.errors import ConfigError

EOS = 1  # the task defines this id, so the test does not import it from the code
VOCAB = 23


class Attention(nn.Module):
    """One causal layer with learned positions and dropout, like a small GPT."""

    def __init__(self, vocab: int = VOCAB, block_size: int = 16, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(block_size, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.3)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.embed(idx) + self.positions.weight[: idx.shape[1]])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (x + F.scaled_dot_product_attention(q, k, v, is_causal=True)) @ self.embed.weight.T


@pytest.fixture(scope="module")
def model() -> Attention:
    torch.manual_seed(0)
    return Attention()


def stream(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, n).astype(np.uint16)


def token_nll(model: nn.Module, context: list[int], target: int) -> float:
    """Return the NLL of one token from a separate forward pass over its context."""
    with torch.no_grad():
        logits = model(torch.tensor([context]))[0, -1].double()
    return float(logits.logsumexp(0) - logits[target])


def naive_full(model: nn.Module, tokens: list[int], block_size: int) -> float:
    total, inputs = 0.0, [EOS, *tokens[:-1]]
    for i, target in enumerate(tokens):
        start = i // block_size * block_size
        total += token_nll(model, inputs[start : i + 1], target)
    return total


def naive_official(model: nn.Module, tokens: list[int], rows: int, length: int) -> tuple[float, int]:
    """Compute the official score with the loop of the public task."""
    total, targets, span, pointer = 0.0, 0, rows * length + 1, 0
    while pointer + span <= len(tokens):
        part = tokens[pointer : pointer + span]
        x, y = part[:-1], part[1:]
        for row in range(rows):
            for i in range(length):
                total += token_nll(model, x[row * length : row * length + i + 1], y[row * length + i])
                targets += 1
        pointer += span
    return total, targets


@settings(max_examples=25)
@given(
    n=st.integers(2, 90),
    block_size=st.integers(1, 16),
    rows=st.integers(1, 4),
    length=st.integers(1, 16),
    seed=st.integers(0, 9),
)
def test_both_scores_match_the_formula(
    model: Attention, n: int, block_size: int, rows: int, length: int, seed: int
) -> None:
    length = min(length, block_size)
    tokens = stream(n, seed)
    if n < rows * length + 1:
        with pytest.raises(ConfigError, match="but one span of the official score has"):
            evaluate(model, tokens, chars=100, nbytes=50, block_size=block_size, geometry=(rows, length))
        return
    score = evaluate(model, tokens, chars=100, nbytes=50, block_size=block_size, geometry=(rows, length))
    model.eval()
    official, targets = naive_official(model, tokens.tolist(), rows, length)
    full = naive_full(model, tokens.tolist(), block_size)
    model.train()
    assert score.full == pytest.approx(full / 100, rel=1e-5)
    assert score.loss == pytest.approx(full / n, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(full / math.log(2) / 50, rel=1e-5)
    assert score.official == pytest.approx(official / 100, rel=1e-5)
    assert score.coverage == targets / n == official_coverage(n, (rows, length))
    assert score.tokens == n


class ById(nn.Module):
    """A model whose loss depends on the target's id, so that the sum shows which targets were counted."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.table = nn.Parameter(-torch.arange(vocab).float())

    def forward(self, idx: Tensor) -> Tensor:
        return self.table.expand(*idx.shape, self.vocab)


@settings(max_examples=examples(60))
@given(n=st.integers(3, 400), block_size=st.integers(2, 64))
def test_every_token_is_a_target_exactly_once(n: int, block_size: int) -> None:
    tokens = np.random.default_rng(n).permutation(np.arange(2, n + 2)).astype(np.uint16)
    model = ById(n + 2)
    score = evaluate(model, tokens, chars=1, nbytes=1, block_size=block_size, geometry=(1, 2))
    log_z = float(model.table.detach().double().logsumexp(0))
    assert score.loss * n == pytest.approx(float(tokens.astype(np.int64).sum()) + n * log_z, rel=1e-6)
    seen = [t for x, y in scoring._full(tokens, block_size) for t in y.flatten().tolist()]
    given_ = [t for x, y in scoring._full(tokens, block_size) for t in x.flatten().tolist()]
    assert seen == tokens.tolist()
    assert given_ == [EOS, *tokens[:-1].tolist()]
    assert all(x.shape[1] <= block_size for x, _ in scoring._full(tokens, block_size))


@pytest.mark.parametrize("logits", [1, 500, 3_000, 10**9])
def test_the_full_score_does_not_depend_on_the_batch_width(
    model: Attention, monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    want = evaluate(model, stream(200), chars=700, nbytes=600, block_size=16, geometry=(2, 8))
    monkeypatch.setitem(scoring.LOGITS, "cpu", logits)
    got = evaluate(model, stream(200), chars=700, nbytes=600, block_size=16, geometry=(2, 8))
    assert got.full == pytest.approx(want.full, rel=1e-6)
    assert got.official == pytest.approx(want.official, rel=1e-6)


def test_batches_are_as_wide_as_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.LOGITS, "cpu", 100 * 8 * 5)
    shapes: list[tuple[int, ...]] = []

    class Shapes(ById):
        def forward(self, idx: Tensor) -> Tensor:
            shapes.append(tuple(idx.shape))
            return super().forward(idx)

    evaluate(Shapes(100), stream(161), chars=1, nbytes=1, block_size=8, geometry=(4, 8))
    assert max(b * t * 100 for b, t in shapes) == 4000
    assert len(shapes) <= 2 * (1 + math.ceil(20 / 5)) + 1


def test_the_full_score_does_not_depend_on_the_official_geometry(model: Attention) -> None:
    scores = [
        evaluate(model, stream(150), chars=9, nbytes=9, block_size=16, geometry=g)
        for g in ((1, 16), (8, 16), (3, 5))
    ]
    assert len({s.full for s in scores}) == len({s.loss for s in scores}) == 1
    assert len({s.coverage for s in scores}) == 2


def test_the_mode_of_every_module_is_restored(model: Attention) -> None:
    model.train()
    model.drop.eval()  # only this module is in eval mode before the evaluation
    evaluate(model, stream(60), chars=1, nbytes=1, block_size=16, geometry=(1, 16))
    assert model.training
    assert model.qkv.training
    assert not model.drop.training
    model.train()


def test_modes_are_restored_after_an_error() -> None:
    class Broken(Attention):
        def forward(self, idx: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, stream(60), chars=1, nbytes=1, block_size=16, geometry=(1, 16))
    assert all(m.training for m in model.modules())


def test_evaluate_uses_no_dropout_gradient_or_random_state(model: Attention) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    weights = copy.deepcopy(model.state_dict())
    scores = {
        evaluate(model, stream(60), chars=1, nbytes=1, block_size=16, geometry=(1, 16)) for _ in range(3)
    }
    assert len(scores) == 1, "dropout was on"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_no_autograd_graph_is_built() -> None:
    class Watcher(Attention):
        graphs = 0

        def forward(self, idx: Tensor) -> Tensor:
            logits = super().forward(idx)
            self.graphs += logits.requires_grad
            return logits

    model = Watcher()
    evaluate(model, stream(60), chars=1, nbytes=1, block_size=16, geometry=(1, 16))
    assert model.graphs == 0


def test_a_tensor_created_while_scoring_can_be_used_in_training() -> None:
    class Lazy(Attention):
        scale: Tensor | None = None

        def forward(self, idx: Tensor) -> Tensor:
            self.scale = torch.ones(12) if self.scale is None else self.scale
            return (self.embed(idx) * self.scale) @ self.embed.weight.T

    model = Lazy()
    evaluate(model, stream(60), chars=1, nbytes=1, block_size=16, geometry=(1, 16))
    model(torch.ones(1, 4, dtype=torch.int64)).sum().backward()


def test_bfloat16_autocast() -> None:
    class Half(Attention):
        def forward(self, idx: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(idx)

    torch.manual_seed(0)
    half = Half()
    full = Attention()
    full.load_state_dict(half.state_dict())
    assert half.eval()(torch.ones(1, 4, dtype=torch.int64)).dtype == torch.bfloat16
    got, want = (
        evaluate(m, stream(300), chars=900, nbytes=900, block_size=16, geometry=(4, 16)) for m in (half, full)
    )
    assert got.full == pytest.approx(want.full, rel=2e-2)
    assert got.full != want.full
    # The softmax is computed in float32, because bfloat16 would give only three digits.
    logits = half.eval()(torch.tensor([[EOS, 5]])).detach().double()
    one = evaluate(half, np.array([5, 9], dtype=np.uint16), chars=1, nbytes=1, block_size=2, geometry=(1, 1))
    by_hand = sum(float(logits[0, i].logsumexp(0) - logits[0, i, t]) for i, t in enumerate((5, 9)))
    assert one.full == pytest.approx(by_hand, rel=1e-6)


def test_the_sum_is_float64() -> None:
    """A float32 sum of many equal losses would be wrong in the sixth digit."""
    table = nn.Embedding.from_pretrained(torch.tensor([[0.1, 0.0, 0.2]] * 3))
    tokens = np.full(3_000_000, 2, dtype=np.uint16)
    score = evaluate(table, tokens, chars=len(tokens), nbytes=1, block_size=1000, geometry=(1, 1000))
    one = float(F.cross_entropy(table.weight[:1], torch.tensor([2])))
    assert score.full == pytest.approx(one, rel=1e-12)


def test_memory_mapped_tokens_give_the_same_score(model: Attention, tmp_path: Path) -> None:
    np.save(tmp_path / "val.npy", stream(100))
    mapped = np.load(tmp_path / "val.npy", mmap_mode="r")
    args = {"chars": 5, "nbytes": 5, "block_size": 16, "geometry": (2, 16)}
    assert evaluate(model, mapped, **args) == evaluate(model, stream(100), **args)


def test_bad_arguments_are_refused_with_a_fix(model: Attention) -> None:
    with pytest.raises(ConfigError, match=r"32 tokens, but one span.*2x16\+1 = 33.*official_geometry"):
        evaluate(model, stream(32), chars=1, nbytes=1, block_size=16, geometry=(2, 16))
    assert official_spans(33, (2, 16)) == 1
    assert official_spans(65, (2, 16)) == 1  # one span has 33 tokens, so two spans need 66 tokens
    assert official_spans(66, (2, 16)) == 2
    with pytest.raises(ConfigError, match="longer than block_size=8"):
        evaluate(model, stream(100), chars=1, nbytes=1, block_size=8, geometry=(2, 16))
    with pytest.raises(ConfigError, match="chars=0"):
        evaluate(model, stream(100), chars=0, nbytes=1, block_size=16, geometry=(2, 16))


def test_the_source_hash_covers_the_complete_file() -> None:
    assert scoring.evaluate_source_hash() == hashlib.sha256(Path(scoring.__file__).read_bytes()).hexdigest()


# -- edge cases


@pytest.mark.parametrize(
    ("tokens", "geometry", "spans"),
    [
        (2, (1, 1), 1), (3, (1, 1), 1), (4, (1, 1), 2), (7, (2, 3), 1), (13, (2, 3), 1), (14, (2, 3), 2),
        (21, (3, 2), 3),
        (2_000_000, (64, 128), 244),
    ],
)  # fmt: skip
def test_official_spans_and_coverage(tokens: int, geometry: tuple[int, int], spans: int) -> None:
    assert official_spans(tokens, geometry) == spans
    assert official_coverage(tokens, geometry) == spans * geometry[0] * geometry[1] / tokens


@pytest.mark.parametrize(("tokens", "geometry"), [(0, (1, 1)), (1, (1, 1)), (6, (2, 3)), (1_024, (32, 32))])
def test_a_split_shorter_than_a_span_is_refused(tokens: int, geometry: tuple[int, int]) -> None:
    rows, length = geometry
    for refused in (official_spans, official_coverage):
        with pytest.raises(ConfigError) as error:
            refused(tokens, geometry)
        message = str(error.value)
        assert (
            f"{tokens:,} tokens" in message and f"{rows}x{length}+1 = {rows * length + 1:,} tokens" in message
        )
        assert all(
            fix in message
            for fix in ("official_geometry", "batch_size", "block_size", "num_titles", "val_frac")
        )


@pytest.mark.parametrize(("chars", "nbytes"), [(0, 5), (-1, 5), (5, 0), (5, -1), (0, 0)])
def test_the_denominators_must_be_positive(model: Attention, chars: int, nbytes: int) -> None:
    with pytest.raises(ConfigError) as error:
        evaluate(model, stream(20), chars=chars, nbytes=nbytes, block_size=16, geometry=(1, 16))
    assert f"chars={chars} and bytes={nbytes}" in str(error.value)
    assert model.training, "the model is unchanged"


@pytest.mark.parametrize(("length", "is_allowed"), [(7, True), (8, True), (9, False)])
def test_official_rows_must_fit_into_a_block(model: Attention, length: int, is_allowed: bool) -> None:
    def score() -> scoring.Score:
        return evaluate(model, stream(40), chars=1, nbytes=1, block_size=8, geometry=(1, length))

    if is_allowed:
        assert score().tokens == 40
        return
    with pytest.raises(ConfigError, match="rows of 9 tokens are longer than block_size=8"):
        score()


def test_a_model_without_parameters_can_be_scored() -> None:
    class Uniform(nn.Module):
        def forward(self, idx: Tensor) -> Tensor:
            assert idx.dtype == torch.int64 and idx.device.type == "cpu"
            return torch.zeros(*idx.shape, 10)

    score = evaluate(Uniform(), stream(30) % 10, chars=60, nbytes=15, block_size=4, geometry=(2, 3))
    assert score.loss == pytest.approx(math.log(10), rel=1e-6)
    assert score.full == pytest.approx(math.log(10) / 2, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(2 * math.log2(10), rel=1e-6)
    assert score.official == pytest.approx(24 * math.log(10) / 60, rel=1e-6)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 15, 16, 17])
def test_inputs_and_targets_of_the_full_score(count: int) -> None:
    """All complete blocks form one batch, and any remaining tokens form another batch."""
    tokens = np.arange(2, count + 2, dtype=np.uint16)
    parts = list(scoring._full(tokens, 8))
    whole, rest = divmod(count, 8)
    assert [x.shape for x, _ in parts] == [(whole, 8)] * (whole > 0) + [(1, rest)] * (rest > 0)
    assert [x.shape for x, _ in parts] == [y.shape for _, y in parts]
    assert all(x.dtype == np.uint16 for x, _ in parts)


def test_inputs_and_targets_of_the_official_score() -> None:
    [(x, y)] = scoring._official(np.arange(17), 2, (2, 3))
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert y.tolist() == [[1, 2, 3], [4, 5, 6], [8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize(
    ("chunk", "rows"), [(1, 1), (VOCAB, 1), (5 * VOCAB - 1, 4), (5 * VOCAB, 5), (10**6, 64)]
)
def test_the_cross_entropy_is_computed_in_chunks_of_rows(
    model: Attention, monkeypatch: pytest.MonkeyPatch, chunk: int, rows: int
) -> None:
    seen: list[int] = []
    real = F.cross_entropy

    def counting(logits: Tensor, target: Tensor, **options: str) -> Tensor:
        assert logits.dtype == torch.float32
        seen.append(len(logits))
        return real(logits, target, **options)

    want = evaluate(model, stream(65), chars=1, nbytes=1, block_size=16, geometry=(4, 16))
    monkeypatch.setitem(scoring.CHUNK, "cpu", chunk)
    monkeypatch.setattr(scoring.F, "cross_entropy", counting)
    assert evaluate(
        model, stream(65), chars=1, nbytes=1, block_size=16, geometry=(4, 16)
    ).full == pytest.approx(want.full, rel=1e-6)
    assert max(seen) == min(rows, 48) and sum(seen) == 64 + 65


@pytest.mark.parametrize(
    ("logits", "shapes"),
    [
        (1, [1] * 20),
        (100 * 8 - 1, [1] * 20),
        (100 * 8 * 2, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]),
        (100 * 8 * 7 + 799, [1, 7, 7, 5]),
    ],
)
def test_the_first_batch_has_one_row_and_later_batches_fill_the_limit(
    monkeypatch: pytest.MonkeyPatch, logits: int, shapes: list[int]
) -> None:
    seen: list[int] = []

    class Rows(ById):
        def forward(self, idx: Tensor) -> Tensor:
            seen.append(len(idx))
            return super().forward(idx)

    monkeypatch.setitem(scoring.LOGITS, "cpu", logits)
    with torch.no_grad():
        scoring._nll(
            Rows(100), iter([(np.zeros((20, 8), dtype=np.uint16), np.ones((20, 8), dtype=np.uint16))])
        )
    assert seen == shapes


def test_chunk_sizes_are_pinned() -> None:
    """The chunk sizes affect the speed and the order of the final sum.

    Measure the speed before you change the chunk sizes.
    """
    assert scoring.LOGITS == {"cpu": 16_000_000, "cuda": 512_000_000}
    assert scoring.CHUNK == {"cpu": 1_000_000, "cuda": 64_000_000}


def test_a_score_is_frozen(model: Attention) -> None:
    score = evaluate(model, stream(20), chars=1, nbytes=1, block_size=16, geometry=(1, 16))
    with pytest.raises(FrozenInstanceError):
        score.full = 0.0


def test_losses_are_summed_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device | None] = []
    real = torch.zeros

    def recording(*shape: Any, device: torch.device | None = None, **options: Any) -> Tensor:
        devices.append(device)
        return real(*shape, device=device, **options)

    model, parts = ById(9), [(np.ones((2, 3), dtype=np.uint16),) * 2]
    monkeypatch.setattr(torch, "zeros", recording)
    with torch.no_grad():
        scoring._nll(model, iter(parts))
    assert devices == [torch.device("cpu")]
