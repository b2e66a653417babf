"""Train several models of one config in the same run, and score the mean of their probabilities.

The members see the same batches one after another. They differ in their initial weights and their dropout
masks. Member 0 has the seeds of a run with one model, so its weights are those of that run, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.kernels import CHUNK
from mainrun.plan.plan import StepInputs
from mainrun.plan.seeds import seed_from

T = TypeVar("T")


class Ensemble(nn.Module):
    """The models of a run with `members` > 1."""

    def __init__(self, cfg: TrainConfig, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.cfg = cfg
        self.members = nn.ModuleList(members)

    @property
    def embed(self) -> Any:
        """The token embedding of the first member. Those of the other members have the same shape."""
        return self.members[0].embed

    @property
    def blocks(self) -> list[Any]:
        """The blocks of all members."""
        blocks: list[Any] = []
        for member in members_of(self):
            blocks += member.blocks
        return blocks

    def set_inputs(self, inputs: StepInputs, attention: str) -> None:
        for member in members_of(self):
            member.set_inputs(inputs, attention)

    def set_dropout(self, inputs: StepInputs, attention: str) -> None:
        for member in members_of(self):
            member.set_dropout(inputs, attention)

    def set_sharpness(self, inputs: StepInputs) -> None:
        """Do nothing, because members have no routers."""

    @torch.no_grad()
    def forward(self, idx: Tensor) -> Tensor:
        """Return the log of the mean of the members' probabilities (B, T, V), in float32.

        Only scores need this mean, because each member has a loss of its own. The logits of only one member
        exist at a time.
        """
        mean: Tensor | None = None
        for member in members_of(self):
            mean = add_probabilities(mean, member(idx))
        assert mean is not None
        return mean.sub_(math.log(len(self.members)))


def add_probabilities(log_sum: Tensor | None, logits: Tensor) -> Tensor:
    """Add the probabilities of logits (B, T, V) to a sum of probabilities, whose logarithm is given.

    log_sum: the logarithm, which is changed in place, or None if the sum is zero.
    """
    if log_sum is None:
        log_sum = torch.full_like(logits, -torch.inf, dtype=torch.float32)
    rows = max(1, CHUNK[logits.device.type] // logits.size(-1))  # the softmax needs memory for these rows
    parts = log_sum.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows)
    for total, part in zip(*parts, strict=True):
        torch.logaddexp(total, F.log_softmax(part.float(), dim=-1), out=total)
    return log_sum


def members_of(model: nn.Module) -> list[Any]:
    """Return the members of an ensemble. One model is its own only member."""
    if isinstance(model, Ensemble):
        return list(model.members)
    return [model]


def build_members(cfg: TrainConfig, make: Callable[[], nn.Module]) -> Any:
    """Return the model of a config, or the ensemble of its members, with initial weights.

    make: builds one model with weights from torch's random generator.
    """
    members = []
    for member in range(cfg.members):
        torch.manual_seed(member_seed(cfg.seed, member, "weights"))
        members.append(make())
    return assemble(cfg, members)


def assemble(cfg: TrainConfig, members: Sequence[nn.Module]) -> Any:
    """Return the model that consists of the given members."""
    if cfg.members == 1:
        return members[0]
    return Ensemble(cfg, members)


# -- random numbers


def member_seed(seed: int, member: int, *parts: object) -> int:
    """Return the seed of a member for a purpose. Member 0 has the seed of a run with one model."""
    if member == 0:
        return seed_from(seed, *parts)
    return seed_from(seed, "member", member, *parts)


def step_seeds(cfg: TrainConfig, step: int, pieces: Sequence[int]) -> list[int]:
    """Return the seeds of a step: one per member and piece of the batch, member by member."""
    seeds = []
    for member in range(cfg.members):
        seeds += [member_seed(cfg.seed, member, "step", step, piece) for piece in pieces]
    return seeds


# -- the numbers and the tensors of a step


def count_tokens(runners: Iterable[nn.Module], state: Any, world: int) -> Callable[[], None]:
    """Count the tokens that each member processes in training. Return a function that stops the counting."""
    model = state.model

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if model.training:
            state.tokens += args[0].numel() * world

    # a reference from the hook to the TrainStep would keep DDP alive after its process group has ended
    hooks = [runner.register_forward_pre_hook(count) for runner in runners]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return stop


def merge_numbers(numbers: Sequence[Tensor]) -> Tensor:
    """Return the numbers of a step for `step_row`, from those of each member.

    The loss is the mean over the members, and each gradient norm is the largest one. They are NaN if a member
    has NaN.
    """
    if len(numbers) == 1:
        return numbers[0]
    table = torch.stack(list(numbers))  # one row per member: the loss, then the gradient norms
    return torch.cat((table[:, :1].mean(0), table[:, 1:].amax(0)))


def by_member(tensors: Mapping[str, T]) -> list[dict[str, T]]:
    """Divide named tensors among the members. The keys of each dict are the names in the member."""
    parts: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        match = re.match(r"members\.\d+\.", name)
        prefix = match[0] if match else ""
        parts.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    return list(parts.values())
