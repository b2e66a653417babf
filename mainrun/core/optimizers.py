"""The optimizers of a model, with their parameter groups, learning rates and state tensors."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig
from mainrun.core.members import by_member
from mainrun.core.parameters import is_low_rank
from mainrun.core.sharding import trained_tensors
from mainrun.plan.optimizers import OPTIMIZERS
from mainrun.plan.plan import StepInputs

Group = dict[str, Any]


class ParamSchedule(NamedTuple):
    """The factors for a parameter's learning rate, weight decay and eps, and the parameter's warm-up.

    Parameters that a growth operation adds can have a separate warm-up.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    since: int = 0  # the step at which the parameter was added
    rewarm: int = 0  # the number of warm-up steps after the step `since`

    def rate(self, step: int) -> float:
        """Return the factor by which the parameter's learning rate is multiplied at a step."""
        if not self.rewarm:
            return self.lr
        return self.lr * min(1.0, (step - self.since + 1) / self.rewarm)


def skip_dynamo_import() -> None:
    """Prevent torch from importing torch._dynamo when an optimizer is created. The import takes a second.

    The wrapper that excludes the method add_param_group from torch.compile imports torch._dynamo. This
    wrapper is not needed, because mainrun creates no optimizer inside compiled code. The wrapper skips the
    import if the attribute `__dynamo_disable` already contains the function to call.
    """
    plain: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    if not hasattr(plain, "__dynamo_disable"):
        plain.__dynamo_disable = plain


skip_dynamo_import()

DEFAULT_SCHEDULE = ParamSchedule()
NO_SCHEDULES: Mapping[str, ParamSchedule] = MappingProxyType({})


class Muon(torch.optim.Optimizer):
    """The Muon optimizer, which orthogonalizes the momentum of each matrix.

    All singular values of an orthogonalized update are about 1. The update is then scaled so that its RMS
    equals the RMS of a typical AdamW update. Learning rates for Muon therefore have the same scale as
    learning rates for AdamW. Unlike torch's own Muon, this class orthogonalizes all matrices of the same
    shape in one batch.
    """

    def __init__(self, groups: list[Group], momentum: float, cautious: bool = False) -> None:
        super().__init__(groups, {"lr": 1.0, "weight_decay": 0.0})
        self.momentum = momentum
        self.cautious = cautious

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self._step_batch(params, group["lr"], group["weight_decay"])

    def _step_batch(self, params: list[Tensor], lr: Any, weight_decay: float) -> None:
        """Update a batch of parameters that all have the same shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        moments = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(moments, grads, 1 - self.momentum)
        directions = grads
        if self.momentum:  # use Nesterov momentum
            directions = list(torch._foreach_lerp(grads, moments, self.momentum))
        scale = -lr * 0.2 * math.sqrt(max(params[0].shape))
        updates = (orthogonal(torch.stack(directions)).to(params[0].dtype) * scale).unbind()
        if self.cautious:
            for p, update in zip(params, updates, strict=True):
                decay_cautiously(p, update, lr * weight_decay)
        else:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates)


def orthogonal(batch: Tensor) -> Tensor:
    """Orthogonalize a batch of matrices: all singular values of the returned matrices are about 1.

    The function runs five quintic Newton-Schulz steps in bfloat16. `batch` has the shape (N, rows, columns).
    """
    x = batch.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class CautiousAdamW(torch.optim.AdamW):
    """AdamW that decays a weight only where the update moves the weight towards zero."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.decay()
        rates = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0  # torch's AdamW would decay all weights
        inspect.unwrap(torch.optim.AdamW.step)(self)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["weight_decay"] = rate

    @torch.no_grad()
    def decay(self) -> None:
        """Decay the weights before the update, whose sign depends only on the new momentum."""
        for group in self.param_groups:
            beta1, _ = group["betas"]
            for p in group["params"]:
                if not group["weight_decay"] or p.grad is None:
                    continue
                momentum = p.grad
                if self.state[p]:
                    momentum = torch.lerp(self.state[p]["exp_avg"], p.grad, 1 - beta1)
                decay_cautiously(p, -momentum, group["lr"] * group["weight_decay"])


def decay_cautiously(p: Tensor, update: Tensor, amount: float | Tensor) -> None:
    """Multiply the elements of p that the update moves towards zero by 1 - `amount`."""
    shrinks = p * update < 0
    p.copy_(torch.where(shrinks, p * (1 - amount), p))


def make_sgd(groups: list[Group], cfg: TrainConfig) -> torch.optim.Optimizer:
    nesterov = cfg.momentum > 0
    return torch.optim.SGD(groups, lr=1.0, momentum=cfg.momentum, nesterov=nesterov, fused=True)


def make_adamw(groups: list[Group], cfg: TrainConfig) -> torch.optim.Optimizer:
    kind = CautiousAdamW if cfg.cautious_decay else torch.optim.AdamW
    return kind(groups, lr=1.0, betas=(cfg.beta1, cfg.beta2), fused=True)


def make_muon(groups: list[Group], cfg: TrainConfig) -> torch.optim.Optimizer:
    return Muon(groups, cfg.momentum, cfg.cautious_decay)


MAKERS: dict[str, Callable[[list[Group], TrainConfig], torch.optim.Optimizer]] = {
    "sgd": make_sgd,
    "adamw": make_adamw,
    "muon": make_muon,
}


def router_rate(name: str) -> str:
    """Return the field of StepInputs with the learning rate of a router's parameter, or "" for others."""
    match = re.match(r"blocks\.\d+\.router\.(\w+)", name)
    if not match:
        return ""
    if match[1].startswith("prior"):
        return "lr_prior"
    if match[1] in ("now", "before", "bias"):
        return "lr_student"
    return "lr_router"


def special_rate(cfg: TrainConfig, name: str) -> str:
    """Return the field of StepInputs with the separate learning rate of a parameter, or "" if it has none."""
    if is_low_rank(name):
        return "lr_lora" if cfg.lr_lora else ""
    return router_rate(name)


class Optimizers:
    """All optimizers of a model.

    All parameters in a group have the same learning rate, weight decay and schedule. The name of a state
    tensor contains the name of its parameter.
    """

    def __init__(
        self, cfg: TrainConfig, model: nn.Module, schedules: Mapping[str, ParamSchedule] = NO_SCHEDULES
    ) -> None:
        trained = {name: p for name, p in trained_tensors(model).items() if p.requires_grad}
        self.names: dict[Tensor, str] = {p: name for name, p in trained.items()}
        self.schedules = dict(schedules)
        # each member has optimizers of its own, so that no result depends on the other members
        self.all: list[torch.optim.Optimizer] = []
        for part in by_member(trained):
            self.all += self._make(cfg, part)
        self.groups: list[Group] = []
        for optimizer in self.all:
            self.groups += optimizer.param_groups

    def _make(self, cfg: TrainConfig, trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices: list[Tensor] = []  # the weight matrices inside blocks
        tables: list[Tensor] = []  # the embeddings, the head and the routers
        vectors: list[Tensor] = []  # the gains and biases
        for name, p in trained.items():
            # The sum of a router's gradient over the experts is always zero, apart from rounding errors. Muon
            # would amplify the rounding errors, so routers are not in `matrices`.
            in_block = name.startswith("blocks.") and ".router." not in name
            if p.ndim < 2:
                vectors.append(p)
            elif in_block:
                matrices.append(p)
            else:
                tables.append(p)
        inner = self._grouped(cfg, matrices, "lr", decay="weight_decay")
        outer = self._grouped(cfg, tables, "lr_aux", decay="weight_decay_aux")
        outer += self._grouped(cfg, vectors, "lr_aux", decay="")
        others = OPTIMIZERS[cfg.optimizer].others
        if not others:
            return [MAKERS[cfg.optimizer](inner + outer, cfg)]
        optimizers = [MAKERS[cfg.optimizer](inner, cfg)] if inner else []
        if outer:  # with `base_frozen`, all trained parameters may be matrices inside blocks
            optimizers.append(MAKERS[others](outer, cfg))
        return optimizers

    def _grouped(self, cfg: TrainConfig, params: Iterable[Tensor], rate: str, decay: str) -> list[Group]:
        """Return one parameter group for each learning rate and schedule.

        rate, decay: the fields of StepInputs with the learning rate and the weight decay; "" for no decay.
        Routers and low-rank terms may have separate learning rates. A run without growth operations has one
        schedule.
        """
        by_kind: dict[tuple[str, ParamSchedule], list[Tensor]] = {}
        for p in params:
            name = self.names[p]
            kind = (special_rate(cfg, name) or rate, self.schedules.get(name, DEFAULT_SCHEDULE))
            by_kind.setdefault(kind, []).append(p)
        groups = []
        for (kind_rate, schedule), of_kind in by_kind.items():
            eps = cfg.eps * schedule.eps
            group = {"params": of_kind, "rate": kind_rate, "decay": decay, "schedule": schedule, "eps": eps}
            groups.append(group)
        return groups

    def set_rates(self, inputs: StepInputs, step: int) -> None:
        """Set the learning rate and the weight decay of every parameter group for a step."""
        for group in self.groups:
            rate = getattr(inputs, group["rate"])
            schedule = group["schedule"]
            if schedule != DEFAULT_SCHEDULE:
                rate *= schedule.rate(step)
            group["lr"] = self._rate_value(group, rate)
            group["weight_decay"] = 0.0
            if group["decay"]:
                group["weight_decay"] = getattr(inputs, group["decay"]) * schedule.weight_decay

    @staticmethod
    def _rate_value(group: Group, rate: float) -> float | Tensor:
        """Return the learning rate as a number on a CPU and as a tensor on a GPU.

        A recorded CUDA graph can read a new learning rate only from a tensor.
        """
        if not group["params"][0].is_cuda:
            return rate
        if isinstance(group["lr"], Tensor):
            return group["lr"].fill_(rate)
        return torch.tensor(rate, device="cuda")

    def apply(self) -> None:
        """Update the parameters from their gradients."""
        for group in self.groups:
            on_gpu = group["params"][0].is_cuda
            group["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
        for optimizer in self.all:
            # The wrapper that torch adds to `step` would import torch._dynamo. The code below has the same
            # effect as the wrapper, but does not import torch._dynamo.
            step = inspect.unwrap(type(optimizer).step)
            with torch.no_grad(), torch.profiler.record_function("Optimizer.step"):
                step(optimizer)

    def step(self, inputs: StepInputs, step: int = 0) -> None:
        self.set_rates(inputs, step)
        self.apply()

    def state(self) -> dict[str, Tensor]:
        """Return the state tensors of all optimizers by name. A name has the form optimizer/PARAMETER/KEY."""
        tensors = {}
        for optimizer in self.all:
            for p, entries in optimizer.state.items():
                for key, value in entries.items():
                    if value is not None:
                        tensors[f"optimizer/{self.names[p]}/{key}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor], copy: bool = True) -> None:
        """Load the state tensors of all optimizers.

        By default, the tensors are copied, because they may be memory-mapped from a file.
        """
        owners: dict[str, tuple[torch.optim.Optimizer, Tensor]] = {}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                owners |= {self.names[p]: (optimizer, p) for p in group["params"]}
        for full_name, value in tensors.items():
            _, name, key = full_name.split("/")
            optimizer, p = owners[name]
            # Fused optimizer kernels need all state tensors on the parameter's device, including the step
            # count.
            optimizer.state[p][key] = value.to(p.device, copy=copy)
        if tensors and self.all[0].defaults.get("nesterov"):
            # Fused SGD needs momentum buffers either for all parameters or for none. New parameters therefore
            # start with a momentum buffer of zeros.
            for name in self.names.values():
                optimizer, p = owners[name]
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
