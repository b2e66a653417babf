"""Helpers for the tests of routed blocks: small random models, and a slow reference.

The reference computes a routed model row by row and token by token. It shares only the dense block with
mainrun, which processes all tokens of one row or the selected tokens of one row. tests/test_model.py compares
the dense block with another reference.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from conftest import TINY
from torch import Tensor

from mainrun.config import TrainConfig, from_dict
from mainrun.core.layers import Context
from mainrun.core.routing import Router
from mainrun.data.tokenizer import EOS
from mainrun.plan.plan import Plan, StepInputs
from mainrun.train import GPT, build

V = 23  # vocabulary
T = 11  # context length in tokens
SMALL: dict[str, Any] = TINY | {
    "block_size": T, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 12, "norm": "rmsnorm",
    "position": "rope", "mlp": "swiglu", "bias": False, "capacity": 0.3, "prior_factor": 0.5,
    "sharpness": 1.5,
}  # fmt: skip


def config(pattern: str = "DM", **changes: Any) -> TrainConfig:
    return from_dict(SMALL | {"block_pattern": pattern, "n_layer": max(2, len(pattern))} | changes)


def at(cfg: TrainConfig, **changes: Any) -> StepInputs:
    return Plan(cfg, 100_000).at(0)._replace(**changes)


def shaken(cfg: TrainConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    """Return a model with noise in every parameter, so that no student, bias or gate is zero."""
    model = build(cfg, V)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.3
    return model.to(dtype)


def some_ids(rows: int = 3, length: int = T, seed: int = 0) -> Tensor:
    """Return (rows, length) ids. About one id in six is <eos>, which separates titles."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(V, (rows, length), generator=generator)
    ends = torch.rand(rows, length, generator=generator) < 1 / 6
    return idx.masked_fill(ends, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router_of(model: GPT, layer: int = 1) -> Router:
    router = model.blocks[layer].router
    assert router is not None
    return router


# -- the reference

LOSS_LETTERS = {"prior": "ST", "student": "MST", "router": "M", "z": "M"}
STATS = ["g", "selected", "student_accuracy", "score", "S_CE", "S_CU", "D_st", "D_ch"]


class Routed(NamedTuple):
    """What one router decided for one row. All tensors have one value per token."""

    selected: list[int]
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


def count(capacity: float, tokens: int) -> int:
    return max(1, math.floor(capacity * tokens + 1e-9))


def best(score: list[float], k: int) -> list[int]:
    """Return the positions of the k highest scores. Of equal scores, the earlier one ranks first."""
    ranked = sorted(range(len(score)), key=lambda t: (-score[t], t))
    return sorted(ranked[:k])


def best_so_far(score: list[float], capacity: float) -> list[int]:
    """Return the positions whose scores are among the best up to their own position."""
    chosen = []
    for t in range(len(score)):
        ahead = [u for u in range(t) if score[u] >= score[t]]
        if len(ahead) < count(capacity, t + 1):
            chosen.append(t)
    return chosen


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross entropy per token."""
    p = sigmoid(logits)
    return -(target * p.log() + (1 - target) * (1 - p).log())


def predict(router: Any, x: Tensor) -> Tensor:
    """Return the predictor's output for one token (D,)."""
    x = x / ((x * x).mean() + 1e-6).sqrt() * router.prior_norm.weight
    a = router.prior.gate.weight @ x
    return router.prior.down.weight @ (a * sigmoid(a) * (router.prior.up.weight @ x))


def average(values: Tensor) -> Tensor:
    """Return the mean of the last 100 values (T,). The first value counts for positions before the row."""
    means = []
    for t in range(len(values)):
        window = [values[max(0, u)] for u in range(t - 99, t + 1)]
        means.append(sum(window) / 100)
    return torch.stack(means)  # type: ignore[arg-type]


def surprise(router: Any, change: Tensor, expected: Tensor, beta: float) -> dict[str, Tensor]:
    """Return the score, the gate, the statistics and the predictor's loss of each token of a row (T, D)."""
    d_st = (change**2).mean(-1)
    d_ch = ((change - expected) ** 2).mean(-1)
    o_ce = router.o_ce if router.o_ce > 1e-3 else torch.tensor(1e-3, dtype=d_st.dtype)
    m_cu = router.m_cu if router.m_cu > 0 else 0.0
    ce = d_st - d_ch + o_ce.log()
    cu = d_st - m_cu * average(d_st.detach())
    s_ce = sigmoid(beta * ce)
    s_cu = sigmoid(beta * cu)
    return {
        "score": softplus(beta * ce) + softplus(beta * cu),
        "g": s_ce + s_cu - s_ce * s_cu,
        "S_CE": s_ce,
        "S_CU": s_cu,
        "D_st": d_st,
        "D_ch": d_ch,
        "prior": ((expected - change.detach()) ** 2).mean(-1),
    }


def own_quantities(
    model: GPT, layer: int, x: Tensor, x_before: Tensor, context: Context
) -> dict[str, Tensor]:
    """Return the quantities of the router's own decision for one row (T, D)."""
    block = model.blocks[layer]
    router: Any = block.router
    letter = model.cfg.letters[layer]
    if letter == "M":
        score = torch.stack([router.score.weight[0] @ token for token in x])
        return {"score": score, "g": sigmoid(score)}
    if letter == "S":
        change = x - x_before
        seen = x_before
    else:
        y = block(x[None], context)[0][0]
        change = y - x
        seen = torch.stack([torch.zeros_like(y[0]), *y[:-1]])
    expected = torch.stack([predict(router, token) for token in seen])
    return surprise(router, change, expected, model.sharpness.item())


def student_scores(router: Any, x: Tensor) -> Tensor:
    x = x.detach()
    scores = []
    for t, token in enumerate(x):
        score = router.now.weight[0] @ token + router.bias[0]
        if t > 0:
            score = score + router.before.weight[0] @ x[t - 1]
        scores.append(score)
    return torch.stack(scores)


def student_decides(model: GPT, letter: str, topk: bool) -> bool:
    route = model.cfg.route
    if topk:
        return False
    return route == "student" or (route == "auto" and letter == "T")


def routed_block(
    model: GPT, layer: int, x: Tensor, x_before: Tensor, context: Context, topk: bool
) -> tuple[Tensor, Routed]:
    """Return the output (T, D) of a routed block for one row."""
    cfg = model.cfg
    letter = cfg.letters[layer]
    block = model.blocks[layer]
    student = student_scores(block.router, x)
    by_student = student_decides(model, letter, topk)
    own: dict[str, Tensor] = {}
    if not (letter == "T" and by_student):
        own = own_quantities(model, layer, x, x_before, context)
    ranked = (student if by_student else own["score"]).tolist()
    k = count(cfg.capacity, len(x))
    selected = best(ranked, k) if topk else best_so_far(ranked, cfg.capacity)

    out = list(x)
    y = block(x[selected][None], short_context(context, selected))[0][0]
    for place, t in enumerate(selected):
        h: Any = 1.0
        if own:
            h = own["g"][t]
            if cfg.gate == "straight" or letter == "T":
                h = h / h.detach()
        out[t] = x[t] + h * (y[place] - x[t])
    return torch.stack(out), measured(letter, own, student, selected, k)


def short_context(context: Context, selected: list[int]) -> Context:
    """Return the context of the selected tokens of one row."""
    assert context.bias is not None
    bias = context.bias[:, :, selected][:, :, :, selected]
    rope = context.rope
    if rope is not None:
        rope = (rope[0][selected], rope[1][selected])
    v_first = context.v_first
    if v_first is not None:
        v_first = v_first[:, :, selected]
    states = [None if x is None else x[:, selected] for x in (context.embedded, context.x0, context.skip)]
    return Context(bias, rope, v_first, None, *states)


def measured(letter: str, own: dict[str, Tensor], student: Tensor, selected: list[int], k: int) -> Routed:
    stats = {name: torch.zeros_like(student) for name in STATS}
    stats["selected"][selected] = 1
    if not own:
        return Routed(selected, {name: torch.zeros_like(student) for name in LOSS_LETTERS}, stats)
    target = torch.zeros_like(student)
    target[best(own["score"].tolist(), k)] = 1
    losses = {
        "prior": own.get("prior", torch.zeros_like(student)),
        "student": cross_entropy(student, target),
        "router": torch.zeros_like(student),
        "z": torch.zeros_like(student),
    }
    if letter == "M":
        losses["router"] = cross_entropy(own["score"], target)
        losses["z"] = own["score"] ** 2
    stats["student_accuracy"] = ((student >= 0) == (target == 1)).to(student.dtype)
    stats |= {name: value.detach() for name, value in own.items() if name in STATS}
    return Routed(selected, losses, stats)


def row_context(model: GPT, ids: Tensor) -> Context:
    """Return the context of one row of token ids (T,)."""
    tokens = len(ids)
    bias = torch.full((1, 1, tokens, tokens), -math.inf, dtype=model.embed.weight.dtype)
    titles = [int((ids[: t + 1] == EOS).sum()) for t in range(tokens)]
    for t in range(tokens):
        for u in range(t + 1):
            if not model.cfg.title_mask or titles[t] == titles[u]:
                bias[0, 0, t, u] = 0
    rope = None
    if model.cfg.position == "rope":
        rope = (model.cos[:tokens], model.sin[:tokens])  # type: ignore[index]
    return Context(bias, rope, None, None)


def row_logits(model: GPT, ids: Tensor, topk: bool) -> tuple[Tensor, list[Routed]]:
    """Return the logits (T, V) of one row, and the decisions of the routed layers."""
    context = row_context(model, ids)
    x = model.embed.weight[ids]
    if model.positions is not None:
        x = x + model.positions.weight[: len(ids)]
    context = context._replace(embedded=model.embed.weight[ids][None], x0=x[None])
    x_before = x
    routed = []
    outputs: list[Tensor] = []
    for layer, letter in enumerate(model.cfg.letters):
        x_in = x
        opposite = len(model.cfg.letters) - 1 - layer
        if opposite < layer:
            context = context._replace(skip=outputs[opposite][None])
        if letter == "D":
            y, v = model.blocks[layer](x[None], context)
            x = y[0]
            if layer == 0 and model.cfg.value_residual:
                context = context._replace(v_first=v)
        else:
            x, decision = routed_block(model, layer, x, x_before, context, topk)
            routed.append(decision)
        x_before = x_in
        outputs.append(x)
    logits = model.norm(x) @ model.output_weight().T
    if model.cfg.softcap:
        logits = model.cfg.softcap * torch.tanh(logits / model.cfg.softcap)
    return logits, routed


def slow_forward(model: GPT, idx: Tensor, topk: bool) -> tuple[Tensor, Tensor, Tensor, list[list[list[int]]]]:
    """Return the logits, the losses (4,), the stats (routed layers, 8) and the selected tokens by row."""
    rows = [row_logits(model, ids, topk) for ids in idx]
    logits = torch.stack([row[0] for row in rows])
    letters = [letter for letter in model.cfg.letters if letter != "D"]
    losses = []
    for name, having in LOSS_LETTERS.items():
        means = []
        for i, letter in enumerate(letters):
            if letter in having:
                means.append(torch.cat([routed[i].losses[name] for _, routed in rows]).mean())
        losses.append(sum(means) / len(means) if means else torch.zeros((), dtype=logits.dtype))
    stats = []
    for i in range(len(letters)):
        stats.append(
            torch.stack([torch.cat([routed[i].stats[name] for _, routed in rows]).mean() for name in STATS])
        )
    selected = [[routed[i].selected for i in range(len(letters))] for _, routed in rows]
    return logits, torch.stack(losses), torch.stack(stats), selected  # type: ignore[arg-type]
