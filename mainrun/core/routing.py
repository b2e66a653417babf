"""Routed blocks: a router selects the tokens of each row that a block processes.

A block has one of four letters. D is a dense block without a router. The other letters differ in the score
by which the router ranks the tokens of a row:

    M   Mixture-of-Depths: a learned linear score of the token.
    S   surprise pairs (SDT): how notable the change made by the preceding D block is. A change is notable if
        a small predictor foresees the change well, or if the change is larger than the recent average.
    T   temporal surprise (STT): how notable the change made by this block is. The predictor sees the output
        of the block at the previous token.

Training selects the k tokens of a row with the highest scores. This selection sees the future, because
whether a token is selected depends on later tokens. Outside of training, a token is therefore selected by a
comparison with earlier tokens only.

In shapes, B is the number of rows, T the number of tokens in a row, k the number of selected tokens, and D
the width of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has already loaded this module

from mainrun.config import TrainConfig
from mainrun.core.layers import Context, Linear, RMSNorm
from mainrun.plan.routing import LOSSES, STATS, selected_tokens

WINDOW = 100  # the number of tokens in the moving average of the surprise
SLICE = 1024  # the number of tokens whose ranks are counted at once
MIN_O_CE = 1e-3  # log(o_ce) is computed for at least this value
MIN_GATE = 1e-6
SHARE_ROWS = 64  # the number of rows from which the selected shares of an evaluation are measured


class BlockCall(Protocol):
    """A transformer block, which a router applies to some of the tokens."""

    def __call__(self, x: Tensor, context: Context, dropout: bool = True) -> tuple[Tensor, Tensor]:
        """Return the output of the block and the values of its attention."""


class RouterInfo(NamedTuple):
    """The losses and statistics of one routed block in a forward pass."""

    letter: str
    losses: Tensor  # (4,): the losses in LOSSES
    stats: Tensor  # (8,): the means of STATS over the tokens


class RoutingInfo(NamedTuple):
    """The losses and statistics of all routed blocks in one forward pass."""

    losses: Tensor  # (4,): the mean of each loss in LOSSES over the blocks that have this loss
    stats: Tensor  # (routed blocks, 8): the means of STATS over the tokens


class Route(NamedTuple):
    """The router's own decision about each token. The tensors have the shape (B, T)."""

    score: Tensor | None  # None if the student decides and the score is unknown
    gate: Tensor | None
    quantities: dict[str, Tensor]  # the surprise of S and T, and the loss of the predictor


def shift(x: Tensor) -> Tensor:
    """Return the values at the previous token, and zeros at the first token. `x` is (B, T) or (B, T, D)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def moving_average(x: Tensor) -> Tensor:
    """Return the mean of the last 100 tokens up to each token. `x` has the shape (B, T).

    Tokens before the start of the row count as copies of the first token.
    """
    before = x[:, :1].expand(-1, WINDOW - 1)
    padded = torch.cat([before, x], dim=1).unsqueeze(1)  # (B, 1, 99 + T)
    return F.avg_pool1d(padded, WINDOW, stride=1).squeeze(1)


def top_k(score: Tensor, k: int) -> Tensor:
    """Return the positions of the k highest scores of each row, in ascending order, of shape (B, k).

    Of equal scores, the earlier token ranks first. `torch.topk` breaks ties differently on different
    machines.
    """
    ranked = score.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :k].sort(dim=-1).values


def mask_of(positions: Tensor, like: Tensor) -> Tensor:
    """Return a tensor like `like`, with 1 at the positions in each row and 0 elsewhere."""
    return torch.zeros_like(like).scatter(1, positions, 1.0)


def select_causally(score: Tensor, capacity: float) -> Tensor:
    """Return a mask of the tokens that are selected without looking ahead, of shape (B, T).

    Token t is selected if fewer than k(t + 1) of the scores at 0..t rank ahead of the score of token t.
    """
    tokens = score.size(1)
    position = torch.arange(tokens, device=score.device)
    allowed = ((position + 1).double() * capacity + 1e-9).floor().clamp(min=1)
    masks = []
    for start in range(0, tokens, SLICE):
        stop = min(start + SLICE, tokens)
        own = score[:, start:stop].unsqueeze(2)  # (B, slice, 1)
        earlier = position[:stop] < position[start:stop].unsqueeze(1)  # (slice, stop)
        # an earlier token with an equal score ranks ahead
        ahead = (score[:, :stop].unsqueeze(1) >= own) & earlier
        masks.append(ahead.sum(-1) < allowed[start:stop])
    return torch.cat(masks, dim=1)


def packed(mask: Tensor, capacity: float) -> Tensor:
    """Return the positions of the selected tokens in ascending order, of shape (B, n).

    n is the largest number of selected tokens in a row. Rows with fewer selected tokens are padded with the
    positions of unselected tokens at the end.
    """
    # A fake tensor has no values. The memory estimate therefore assumes that each row selects as many tokens
    # as in training.
    if isinstance(mask, FakeTensor):
        n = selected_tokens(capacity, mask.size(1))
    else:
        n = int(mask.sum(1).max())
    return (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :n]


class Prior(nn.Module):
    """The parameters of the predictor: a SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """Selects the tokens that one block processes, and applies the block to these tokens."""

    def __init__(self, cfg: TrainConfig, letter: str) -> None:
        super().__init__()
        self.letter = letter
        self.straight = cfg.gate == "straight" or letter == "T"
        self.by_student = cfg.route == "student" or (cfg.route == "auto" and letter == "T")
        self.capacity = cfg.capacity
        width = cfg.d_model
        if letter == "M":
            self.score = nn.Linear(width, 1, bias=False)
        else:
            self.prior_norm = RMSNorm(width)
            self.prior = Prior(width, cfg.prior_width)
            self.o_ce = nn.Parameter(torch.tensor(1.025))
            self.m_cu = nn.Parameter(torch.tensor(1.1))
        self.now = nn.Linear(width, 1, bias=False)
        self.before = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))
        self.init_weights(cfg.init_std)

    def init_weights(self, std: float) -> None:
        """Set the initial weights. The student starts at zero."""
        for name, p in self.named_parameters():
            if name.startswith(("score.", "prior.")):
                nn.init.normal_(p, std=std)
        nn.init.zeros_(self.now.weight)
        nn.init.zeros_(self.before.weight)

    # -- scores

    def student(self, x: Tensor) -> Tensor:
        """Return the student's logits (B, T), which depend on this token and the previous token only."""
        x = x.detach()
        now = self.now(x).squeeze(-1)
        before = shift(self.before(x).squeeze(-1))
        return now + before + self.bias

    def own_route(self, x: Tensor, x_before: Tensor, y: Tensor | None, sharpness: Tensor) -> Route:
        """Return the router's own decision about each token.

        y: the output of the block for all tokens, which only T needs.
        """
        if self.letter == "M":
            score = self.score(x).squeeze(-1)
            return Route(score, score.sigmoid(), {})
        if self.letter == "S":
            change = x - x_before
            expected = self.prior(self.prior_norm(x_before))
        else:
            assert y is not None
            change = y - x
            expected = self.prior(self.prior_norm(shift(y)))
        score, quantities = self.surprise(change, expected, sharpness)
        quantities["prior"] = (expected - change.detach()).square().mean(-1)
        return Route(score, -torch.expm1(-score), quantities)

    def surprise(
        self, change: Tensor, expected: Tensor, sharpness: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the score (B, T) of S and T, and the quantities that the score is computed from.

        The score is softplus(b CE) + softplus(b CU) for the sharpness b. The gate 1 - exp(-score) equals
        S_CE + S_CU - S_CE S_CU with S = sigmoid(b .). Unlike the gate, the score never saturates.
        """
        d_st = change.square().mean(-1)
        d_ch = (change - expected).square().mean(-1)
        expected_change = d_st - d_ch + self.o_ce.clamp(min=MIN_O_CE).log()
        unexpected_change = d_st - self.m_cu.clamp(min=0) * moving_average(d_st.detach())
        ce = sharpness * expected_change
        cu = sharpness * unexpected_change
        quantities = {"S_CE": ce.sigmoid(), "S_CU": cu.sigmoid(), "D_st": d_st, "D_ch": d_ch}
        return F.softplus(ce) + F.softplus(cu), quantities

    # -- the block on the selected tokens

    def forward(
        self, block: BlockCall, x: Tensor, x_before: Tensor, context: Context, sharpness: Tensor, topk: bool
    ) -> tuple[Tensor, RouterInfo]:
        """Return the output of the routed block (B, T, D), and the losses and statistics of the router.

        block: the block that this router belongs to.
        x: the input of the block.
        x_before: the input of the preceding block.
        topk: whether to select the highest scores of the whole row, which looks ahead.
        """
        by_student = self.by_student and not topk
        needs_own = self.letter != "T" or not by_student
        y = None
        if self.letter == "T" and needs_own:
            y = block(x, context, dropout=False)[0]
        # scores are computed in the dtype of the weights, because in bfloat16 many scores would be equal
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.bias.dtype)
            student = self.student(wide)
            route = Route(None, None, {})
            if needs_own:
                y = None if y is None else y.to(wide.dtype)
                route = self.own_route(wide, x_before.to(wide.dtype), y, sharpness)
            ranked = student if by_student else route.score
            assert ranked is not None
            if topk:
                selected = None
                positions = top_k(ranked.detach(), selected_tokens(self.capacity, x.size(1)))
            else:
                selected = select_causally(ranked.detach(), self.capacity)
                positions = packed(selected, self.capacity)
            info = self.measure(route, student, selected)
        return self.apply_block(block, x, context, positions, selected, route.gate), info

    def apply_block(
        self,
        block: BlockCall,
        x: Tensor,
        context: Context,
        positions: Tensor,
        selected: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """Add the change that the block makes to the tokens at the positions.

        selected: a mask of the tokens that change, or None if all tokens at the positions change.
        """
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        index = (positions + rows * x.size(1)).flatten()
        tokens = x.flatten(0, 1)  # (B T, D)
        chosen = tokens.index_select(0, index).view(*positions.shape, -1)  # (B, n, D)
        change = block(chosen, context.at(positions))[0] - chosen
        if gate is not None:
            factor = gate
            if self.straight:
                factor = 1 + (gate - gate.detach()) / gate.detach().clamp(min=MIN_GATE)
            factor = factor.flatten().index_select(0, index).view(positions.shape)
            change = change * factor.unsqueeze(-1).to(change.dtype)
        if selected is not None:
            padding = ~selected.gather(1, positions)
            change = change.masked_fill(padding.unsqueeze(-1), 0)
        return tokens.index_add(0, index, change.flatten(0, 1).to(x.dtype)).view_as(x)

    def measure(self, route: Route, student: Tensor, selected: Tensor | None) -> RouterInfo:
        """Return the losses and the statistics, each as a mean over the tokens.

        The student is compared with the selection of the highest scores in a row. A quantity that the block
        does not have is 0.
        """
        zero = torch.zeros((), dtype=student.dtype, device=student.device)
        losses = dict.fromkeys(LOSSES, zero)
        stats = dict.fromkeys(STATS, zero)
        if route.score is not None:
            best = top_k(route.score.detach(), selected_tokens(self.capacity, student.size(1)))
            target = mask_of(best, student)
            losses["student"] = F.binary_cross_entropy_with_logits(student, target)
            if self.letter == "M":
                losses["router"] = F.binary_cross_entropy_with_logits(route.score, target)
                losses["z"] = route.score.square().mean()
            else:
                losses["prior"] = route.quantities["prior"].mean()
            agrees = (student >= 0) == (target > 0)
            stats["student_accuracy"] = agrees.to(student.dtype).mean()
            stats["score"] = route.score.mean()
            selected = target if selected is None else selected
        if route.gate is not None:
            stats["g"] = route.gate.mean()
        for name in stats.keys() & route.quantities.keys():
            stats[name] = route.quantities[name].mean()
        if selected is not None:
            stats["selected"] = selected.to(student.dtype).mean()
        return RouterInfo(
            self.letter, torch.stack(list(losses.values())), torch.stack(list(stats.values())).detach()
        )


# -- the routers of a model


def combine(infos: list[RouterInfo], like: Tensor) -> RoutingInfo:
    """Combine the losses and statistics of a model's routers. `like` is a tensor on the model's device."""
    if not infos:
        return RoutingInfo(like.new_zeros(len(LOSSES)), like.new_zeros(0, len(STATS)))
    totals = torch.stack([info.losses for info in infos]).sum(0)
    shares = [1 / max(1, sum(info.letter in letters for info in infos)) for letters in LOSSES.values()]
    losses = torch.stack([total * share for total, share in zip(totals, shares, strict=True)])
    return RoutingInfo(losses, torch.stack([info.stats for info in infos]))


def numbers_of(plain: Tensor, info: RoutingInfo | None) -> Tensor:
    """Return the cross entropy, the losses and the statistics of a batch in one vector."""
    if info is None:
        return plain.view(1)
    return torch.cat((plain.view(1), info.losses.detach(), info.stats.flatten()))


def count_numbers(layers: tuple[int, ...]) -> int:
    """Return the length of the vector that `numbers_of` returns."""
    if not layers:
        return 1
    return 1 + len(LOSSES) + len(STATS) * len(layers)


def routing_fields(numbers: list[float], layers: tuple[int, ...]) -> dict[str, Any]:
    """Return the fields of a step's row that contain the losses and statistics of the routers."""
    routers = []
    for i, layer in enumerate(layers):
        start = len(LOSSES) + i * len(STATS)
        stats = numbers[start : start + len(STATS)]
        routers.append({"layer": layer, **dict(zip(STATS, stats, strict=True))})
    return {"aux": dict(zip(LOSSES, numbers[: len(LOSSES)], strict=True)), "routers": routers}


@torch.no_grad()
def selected_shares(model: Any, tokens: np.ndarray, cfg: TrainConfig, logits: int) -> list[dict[str, Any]]:
    """Return the share of tokens that each router selects when the model scores the first rows of a split.

    logits: the largest number of logits in a forward pass, unless a single row has more logits.
    """
    length = min(cfg.block_size, len(tokens))
    rows = min(SHARE_ROWS, len(tokens) // length)
    idx = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)
    idx = idx.to(model.embed.weight.device)
    width = max(1, logits // (length * model.embed.num_embeddings))
    total = torch.zeros(len(cfg.routed_layers), dtype=torch.float64)
    training = model.training
    model.eval()
    for batch in idx.split(width):
        _, info = model(batch, routing_info=True)
        total += len(batch) * info.stats[:, STATS.index("selected")].double().cpu()
    model.train(training)
    shares = (total / rows).tolist()
    return [
        {"layer": layer, "selected": share} for layer, share in zip(cfg.routed_layers, shares, strict=True)
    ]
