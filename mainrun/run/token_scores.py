"""Write the log-probability of each held-out token at the end of a run, for `mainrun ensemble`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mainrun.data import scoring
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RunDir
from mainrun.store.token_scores import TokenScores, hash_tokens, write
from mainrun.train import Setup, State, set_last_inputs


def write_token_scores(setup: Setup, plan: Plan, run: RunDir, state: State) -> None:
    """Score each token of each held-out split with the weights of the last evaluation, and write a file.

    All processes of a sharded run must call this function together.
    """
    set_last_inputs(state, plan, setup.device)
    splits: dict[str, TokenScores] = {}
    with state.average.applied():
        for split in ("val", "dev"):
            if split in setup.data.splits:
                splits[split] = score_tokens(setup, setup.scored(state.model), split)
    if setup.device.leads:
        write(run, setup.cfg.digest, splits)


def score_tokens(setup: Setup, model: nn.Module, split: str) -> TokenScores:
    """Return the log-probability of each target of the full and the official score of a split."""
    data = setup.data
    tokens = data.splits[split]
    chars = data.chars[split]
    losses: dict[str, list[Tensor]] = {"full": [], "official": []}

    def keep(name: str, values: Tensor) -> None:
        losses[name].append(values.cpu())

    size = {"chars": chars, "nbytes": data.bytes[split], "block_size": setup.cfg.block_size}
    scoring.evaluate(model, tokens, keep, **size, geometry=setup.cfg.geometry)
    full = -torch.cat(losses["full"]).numpy()
    official = -torch.cat(losses["official"]).numpy()
    return TokenScores(hash_tokens(tokens), chars, full, official)
