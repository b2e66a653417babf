"""Start from weights: `start=hf:DIR` loads a Qwen2 checkpoint, and `start=run:DIR` loads a run.

Each tensor of the start must have a place in the model, and each tensor of the model must come from the
start. Only low-rank terms and routers may be missing, and they keep their random values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mainrun.config import TrainConfig, from_dict
from mainrun.core.parameters import is_base
from mainrun.errors import MainrunError, UsageError
from mainrun.files import inputs
from mainrun.interop import qwen2
from mainrun.interop.names import checkpoint_name
from mainrun.interop.qwen2 import Stored
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir

VOCABULARY_ROWS = ("embed.weight", "head.weight")  # these tensors have a row for each id
AVERAGE = "average/"
MODEL = "model/"
# The values of a config that change what the weights compute, although they change no name and no shape.
SAME_SHAPES = (
    *("n_head", "kv_heads", "head_width", "norm", "mlp"),
    *("position", "rope_theta", "rope_share", "key_shift"),
)


class Start(NamedTuple):
    """The weights that a model can start from."""

    tensors: dict[str, Stored]  # by our names; a tensor that we do not know keeps its own name
    cfg: TrainConfig  # a config with the fields of the model
    tokenizer: str  # the digest of the tokenizer, or "" if the start does not record it


# -- what a run uses


def check_start(cfg: TrainConfig, model: nn.Module, tokenizer: str) -> str:
    """Check that the start of a config fits its model, and return the digest of the start.

    model: the model of the config, whose parameters may be on the device "meta".
    tokenizer: the digest of the tokenizer.
    """
    start = read_start(cfg)
    check_fit(start, cfg, model)
    if start.tokenizer and start.tokenizer != tokenizer:
        raise UsageError(
            f"start={cfg.start} was trained with another tokenizer ({start.tokenizer[:12]}) than this run "
            f"({tokenizer[:12]}), so its embedding would belong to other tokens; "
            "use the corpus and the tokenizer fields of that run"
        )
    return digest_of(start.tensors)


def start_digest(cfg: TrainConfig) -> str:
    """Return the digest of the start of a config, or an empty string if the config has no start."""
    return digest_of(read_start(cfg).tensors) if cfg.start else ""


def load_start(model: nn.Module, cfg: TrainConfig) -> None:
    """Copy the weights of the start of a config into a model, one tensor at a time."""
    start = read_start(cfg)
    check_fit(start, cfg, model)
    parameters = dict(model.named_parameters())
    names: dict[Path, list[str]] = {}
    for name, stored in start.tensors.items():
        if name in parameters:
            names.setdefault(stored.path, []).append(name)
    for path, in_file in names.items():
        for name, tensor in _tensors_of(path, {start.tensors[name].name: name for name in in_file}):
            _copy(parameters[name], tensor, start.tensors[name].special_ids)


def digest_of(tensors: Mapping[str, Stored]) -> str:
    """Return a hash of the names and the bytes of all tensors."""
    digests = qwen2.sha256_each(tensors.values())
    pairs = []
    for stored in tensors.values():
        name = stored.name.removeprefix(AVERAGE).removeprefix(MODEL)
        pairs.append((name, digests[stored.path, stored.name]))
    sha256 = hashlib.sha256()
    for name, digest in sorted(pairs):
        sha256.update(f"{name} {digest}\n".encode())
    return sha256.hexdigest()


# -- loading


def _tensors_of(path: Path, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with our names. `names` maps the names in the file to our names."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name_in_file, name in names.items():
            yield name, file.get_tensor(name_in_file)


def _copy(parameter: Tensor, tensor: Tensor, special_ids: tuple[int, int, int] | None) -> None:
    """Copy a tensor into a parameter. The rows of a foreign vocabulary get our ids."""
    with torch.no_grad():
        parameter.copy_(tensor)
        if special_ids is None:
            return
        from mainrun.data.foreign import permutation

        to_file = torch.from_numpy(permutation(special_ids, len(tensor))[0])
        moved = (to_file != torch.arange(len(tensor))).nonzero().flatten()
        parameter[moved] = tensor[to_file[moved]].to(parameter.dtype)


# -- reading


def read_start(cfg: TrainConfig) -> Start:
    """Return the start of a config. Raise an error that names the start if it cannot be used."""
    kind, _, folder = cfg.start.partition(":")
    path = inputs.expanded(folder, "start")
    try:
        if kind == "hf":
            return read_checkpoint(path, cfg)
        return _read_run(path, ())
    except MainrunError as e:
        raise UsageError(f"start={inputs.shortened(cfg.start, 200)} cannot be used: {e}") from None


def read_checkpoint(folder: Path, cfg: TrainConfig) -> Start:
    """Return the tensors of a Qwen2 checkpoint. The tokenizer of `cfg` gives the order of the rows."""
    from mainrun.data.foreign import folder_of, special_ids

    config = qwen2.read_config(folder)
    tensors = qwen2.read_tensors(folder)
    ids = special_ids(folder_of(cfg.tokenizer))
    for name in VOCABULARY_ROWS:
        if name not in tensors:
            continue
        if max(ids) >= config["vocab_size"]:
            raise UsageError(
                f"the tokenizer has the id {max(ids):,}, but the checkpoint has {config['vocab_size']:,} rows"
            )
        tensors[name] = tensors[name]._replace(special_ids=ids)
    return Start(tensors, from_dict(qwen2.model_fields(config)), "")


def _read_run(folder: Path, outer: tuple[Path, ...]) -> Start:
    """Return the scored weights of a run's newest checkpoint.

    outer: the runs that start from this run. A run must not start from itself.
    """
    if folder.resolve() in outer:
        raise UsageError(f"the run {folder} starts from itself; train it again from another start")
    run = RunDir(folder)
    cfg = run.config()
    if cfg.members > 1:
        raise UsageError(f"it has members={cfg.members}; a run can start only from one model")
    file, meta = _newest_checkpoint(run, cfg)
    tensors = {}
    if cfg.base_frozen and cfg.start:
        tensors = _read_inner_start(cfg, (*outer, folder.resolve()))
    stored = qwen2.read_header(file)
    # the averages come last, because they are the weights that were scored
    for prefix in (MODEL, AVERAGE):
        for name, tensor in stored.items():
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = tensor
    growth = meta.get("growth")
    if growth:
        cfg = from_dict(growth["config"])
    return Start(tensors, cfg, str(run.config_file().get("tokenizer", "")))


def _read_inner_start(cfg: TrainConfig, outer: tuple[Path, ...]) -> dict[str, Stored]:
    """Return the weights of a run with a frozen base that the run takes from its own start."""
    kind, _, folder = cfg.start.partition(":")
    path = inputs.expanded(folder, "start")
    if kind == "run":
        return _read_run(path, outer).tensors
    return read_checkpoint(path, cfg).tensors


def _newest_checkpoint(run: RunDir, cfg: TrainConfig) -> tuple[Path, dict[str, Any]]:
    """Return the safetensors file and the meta.json of a run's newest usable checkpoint."""

    def fault(meta: dict[str, Any]) -> str:
        if meta.get("digest") != cfg.digest:
            return "it belongs to another config"
        return checkpoint.fault(meta)

    skipped: list[str] = []
    newest = checkpoint.find_newest(run.checkpoints, fault, skipped.append)
    if newest is None:
        reasons = "; ".join(skipped) or "it has none"
        raise UsageError(f"{run.path} has no usable checkpoint ({reasons}); train the run first")
    return newest


# -- checking


def check_fit(start: Start, cfg: TrainConfig, model: nn.Module) -> None:
    """Raise UsageError if the start does not fit the model. The message names every tensor that is wrong."""
    faults = find_faults(start, cfg, model)
    if not faults:
        return
    raise UsageError(
        f"start={inputs.shortened(cfg.start, 200)} does not fit the model of this config:\n  "
        + "\n  ".join(faults)
        + "\nset the model fields to those of the start"
    )


def find_faults(start: Start, cfg: TrainConfig, model: nn.Module) -> list[str]:
    """Return how the fields and the tensors of a start differ from those of a model."""
    return [*_wrong_fields(start.cfg, cfg), *_wrong_tensors(start.tensors, model)]


def _wrong_fields(theirs: TrainConfig, ours: TrainConfig) -> Iterator[str]:
    for name in SAME_SHAPES:
        their_value = getattr(theirs, name)
        our_value = getattr(ours, name)
        if their_value != our_value:
            yield f"{name} is {their_value} in the start and {our_value} in this config"


def _wrong_tensors(tensors: Mapping[str, Stored], model: nn.Module) -> Iterator[str]:
    """Yield each tensor that is missing, left over, or of another shape."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in tensors:
            if is_base(name):
                yield f"missing: {_both_names(name)}"
        elif tensors[name].shape != tuple(parameter.shape):
            theirs = tensors[name].shape
            ours = tuple(parameter.shape)
            yield f"{_both_names(name)} has the shape {theirs} in the start and {ours} in the model"
    for name in sorted(set(tensors) - set(parameters)):
        if name == "head.weight" and qwen2.is_tied_copy(tensors):
            continue
        yield f"left over: {_both_names(name)}"


def _both_names(name: str) -> str:
    """Return our name of a tensor, with the name in a checkpoint if there is one."""
    theirs = checkpoint_name(name)
    return f"{name} ({theirs})" if theirs else inputs.shown(name, 120).strip("'")
