"""Divide a model, its gradients and its optimizer state among the processes of a run (FSDP2).

Each process holds a part of every parameter: some of its rows. A block gathers the rows of the other
processes before it computes, and frees them afterwards. The optimizer and the weight average work on the
parts only, as if the parts were the parameters of a smaller model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mainrun.errors import RunError


class Shards:
    """The parts of a sharded model's parameters that this process holds.

    `parts` maps the name of each parameter to the part. A part shares its memory with the sharded model.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.model_class = type(model)
        reshape_scalars(model)
        shard_modules(model, device)
        self.sharded: dict[str, Any] = dict(model.named_parameters())  # the DTensors of the model
        self.parts: dict[str, nn.Parameter] = {}
        for name, p in self.sharded.items():
            self.parts[name] = nn.Parameter(p.detach().to_local(), requires_grad=p.requires_grad)

    # -- gradients

    def take_gradients(self) -> list[Tensor]:
        """Give each part its gradient, and return the gradients."""
        grads = []
        for name, part in self.parts.items():
            grad = self.sharded[name].grad
            if grad is not None:
                part.grad = grad.to_local()
                grads.append(part.grad)
        return grads

    def clip_gradients(self, limit: float) -> Tensor:
        """Clip the gradients like `clip_grad_norm_`, and return their norm over the whole model."""
        grads = self.take_gradients()
        squares = nn.utils.get_total_norm(grads).square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1))
        return norm

    # -- whole tensors

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor that belongs to a part of a parameter, its average or its moments.

        All processes must call this method together.
        """
        from torch.distributed.tensor import DTensor

        p = self.sharded[name]
        tensor = DTensor.from_local(
            part.detach(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return tensor.full_tensor().view(self.shapes[name])

    def whole_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a state in the leader's main memory. Other processes get none.

        All processes must call this method together.
        """
        result = {}
        for full_name, tensor in tensors.items():
            name = self.parameter_of(full_name)
            if name:
                tensor = self.whole(name, tensor)
            if self.rank == 0:
                result[full_name] = tensor.detach().cpu()
        return result

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the whole tensor of each parameter, in the order of the names.

        All processes must consume the iterator together.
        """
        for name in sorted(self.parts):
            yield name, self.whole(name, self.parts[name])

    def parts_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's parts of the whole tensors of a state."""
        result = {}
        for full_name, tensor in tensors.items():
            name = self.parameter_of(full_name)
            if name:
                tensor = self.part_of(name, tensor)
            result[full_name] = tensor
        return result

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of a whole tensor that belongs to a parameter."""
        shape = self.shapes[name]
        if whole.shape != shape:
            raise RunError(
                f"{name} has the shape {tuple(whole.shape)} in the saved state and {tuple(shape)} in "
                "the model; restore the state that was saved"
            )
        p = self.sharded[name]
        rows = -(-p.shape[0] // self.world)  # the last processes may hold fewer rows, or none
        return whole.view(p.shape)[self.rank * rows : (self.rank + 1) * rows]

    def parameter_of(self, full_name: str) -> str:
        """Return the parameter whose shape a tensor of a state has, or "" for the count of a step.

        full_name: model/PARAMETER, average/PARAMETER or optimizer/PARAMETER/KEY.
        """
        _, name, *key = full_name.split("/")
        if key == ["step"] or name not in self.sharded:
            return ""
        return name


def shard(model: Any, device: torch.device) -> Any:
    """Divide a model among all processes. Each process keeps its part on the device."""
    model.shards = Shards(model, device)
    return model


def shards_of(model: nn.Module) -> Shards | None:
    """Return the parts of a model that this process holds, or None if it holds the whole model."""
    return getattr(model, "shards", None)


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that the optimizer updates, by name: the parameters, or this process's parts."""
    shards = shards_of(model)
    if shards:
        return shards.parts
    return dict(model.named_parameters())


def whole_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors of a model's state, from the tensors that this process holds."""
    shards = shards_of(model)
    if shards:
        return shards.whole_tensors(tensors)
    return tensors


def parts_of(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that this process holds, from the whole tensors of a model's state."""
    shards = shards_of(model)
    if shards:
        return shards.parts_of(tensors)
    return tensors


def clear_gradients(model: nn.Module) -> None:
    """Free the gradients of a model."""
    model.zero_grad(set_to_none=True)
    for tensor in trained_tensors(model).values():
        tensor.grad = None


def layer_gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the gradients that this process holds, each with the name of its parameter."""
    shards = shards_of(model)
    if shards:
        shards.take_gradients()
    return [(name, p.grad) for name, p in trained_tensors(model).items() if p.grad is not None]


def norms_of_whole(model: nn.Module, norms: Tensor) -> Tensor:
    """Return the norms over the whole model, from the norms of the parts that the processes hold."""
    if not shards_of(model):
        return norms
    squares = norms.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Clip the gradients of a model. Return their norm before the clipping."""
    shards = shards_of(model)
    if shards:
        return shards.clip_gradients(limit)
    return nn.utils.clip_grad_norm_(model.parameters(), limit)


def exact_copy(model: Any) -> Any:
    """Return a float64 copy of a sharded model. The copy is sharded too."""
    copy_ = model.shards.model_class(model.cfg, model.embed.num_embeddings - model.cfg.unused_ids).double()
    shard(copy_, model.embed.weight.device)
    for name, part in copy_.shards.parts.items():
        part.data.copy_(model.shards.parts[name])
    for copied, block in zip(copy_.blocks, model.blocks, strict=True):
        copied.attn.fused = block.attn.fused
    if model.cfg.routed_layers:
        copy_.sharpness.copy_(model.sharpness)
    return copy_


def reshape_scalars(model: nn.Module) -> None:
    """Change parameters of shape () to shape (1,), because FSDP2 cannot divide a single number."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(module, name, nn.Parameter(p.detach().view(1), requires_grad=p.requires_grad))


def shard_modules(model: Any, device: torch.device) -> None:
    """Apply `fully_shard` to each router, to each block and then to the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The values that a block returns are a view, but no code changes them in place.
    warnings.filterwarnings("ignore", ".* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        # The model calls the router instead of the block, so a router gathers its parameters itself.
        if block.router is not None:
            fully_shard(block.router, mesh=mesh, reshard_after_forward=True)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # By default, FSDP2 would keep the parameters outside of the blocks gathered after scoring.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
