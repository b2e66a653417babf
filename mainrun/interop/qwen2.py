"""Read the config and the tensor headers of a Qwen2 checkpoint. This module does not import torch.

A checkpoint is a folder with a config.json and safetensors files. Everything that mainrun cannot express is
refused, and the error names the file, the key or the tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.core.hardware import cache_dir
from mainrun.errors import UsageError
from mainrun.files import inputs
from mainrun.files.hashing import sha256_json
from mainrun.interop.names import our_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROUTING = "routing.safetensors"  # the routers of an exported run, by the names of mainrun
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("F32", "BF16", "F16")
AGAIN = "download it again"
CHUNK = 16_000_000  # the number of bytes to hash at a time

# the keys of config.json that give the size of the model, and the fields of TrainConfig that they set
SIZES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
}
# the keys of config.json that can have only one value
FIXED = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
QUANTIZED = ("quantization_config", "compression_config")


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    name: str  # the name in the file
    dtype: str  # such as "BF16"
    shape: tuple[int, ...]
    special_ids: tuple[int, int, int] | None = None  # set if the rows have the order of a foreign vocabulary


# -- config.json


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json, after checking that mainrun can express the model."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the folder of a Qwen2 checkpoint")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise UsageError(f"{folder} has no config.json; give the folder of a Qwen2 checkpoint")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UsageError(f"{path} is {inputs.shown(config, 60)}, but must be an object; {AGAIN}")
    faults = [*_wrong_values(config), *_wrong_sizes(config), *_wrong_attention(config), *_wrong_rope(config)]
    if faults:
        raise UsageError(
            f"{path} does not describe a Qwen2 model that mainrun can run: {'; '.join(faults)}; "
            "give a checkpoint like those of Qwen2.5"
        )
    return config


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        text = inputs.read_text(path)
    except inputs.BadInput as e:
        raise UsageError(f"{path} {_without_fix(str(e))}; {AGAIN}") from None
    try:
        return inputs.parse_json(text)
    except inputs.BadInput as e:
        raise UsageError(f"{path} is not valid JSON ({_without_fix(str(e))}); {AGAIN}") from None


def _without_fix(reason: str) -> str:
    """Return the reason of a BadInput without its advice, which does not suit a file of a checkpoint."""
    return reason.partition(";")[0]


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of TrainConfig that describe the model of a checkpoint."""
    fields: dict[str, Any] = {field: config[key] for key, field in SIZES.items()}
    if config.get("head_dim") is not None:
        fields["head_dim"] = config["head_dim"]
    return fields | {
        "norm": "rmsnorm",
        "position": "rope",
        "rope_theta": _theta(config),
        "mlp": "swiglu",
        "bias": False,
        "qkv_bias": True,
        "tie_head": config["tie_word_embeddings"],
    }


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values that a Qwen2 model cannot have."""
    for key, allowed in FIXED.items():
        if key not in config:
            yield f"it lacks {key}"
        elif isinstance(config[key], bool) or config[key] != allowed:
            yield f"{key} is {inputs.shown(config[key], 60)}, but must be {allowed!r}"
    for key in QUANTIZED:
        if config.get(key) is not None:
            yield f"it has {key}, but the weights must not be quantised"
    if type(config.get("tie_word_embeddings")) is not bool:
        yield "tie_word_embeddings must be true or false"


def _wrong_sizes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes that are missing or are not positive whole numbers."""
    required = [*SIZES, "max_position_embeddings"]
    if config.get("head_dim") is not None:
        required.append("head_dim")
    for key in required:
        if key not in config:
            yield f"it lacks {key}"
        elif type(config[key]) is not int or config[key] < 1:
            yield f"{key} is {inputs.shown(config[key], 60)}, but must be a positive whole number"


def _wrong_attention(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons why the attention is not plain causal attention."""
    if config.get("use_sliding_window", False) is not False:
        yield "use_sliding_window must be false"
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        yield 'each of layer_types must be "full_attention"'


def _wrong_rope(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons why the rotary embedding is not the plain one."""
    for key in ("rope_parameters", "rope_scaling"):
        table = config.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            yield f"{key} is {inputs.shown(table, 60)}, but must be an object"
            continue
        for kind in ("rope_type", "type"):
            if table.get(kind, "default") != "default":
                yield f"{key}.{kind} is {inputs.shown(table[kind], 60)}, but must be 'default'"
        others = sorted(set(table) - {"rope_theta", "rope_type", "type"})
        if others:
            yield f"{key} has {inputs.shown(others[0], 60)}, which mainrun does not support"
    theta = _theta(config)
    if theta is None:
        yield "it lacks rope_theta"
    elif type(theta) not in (int, float) or not theta > 1:
        yield f"rope_theta is {inputs.shown(theta, 60)}, but must be a number above 1"


def _theta(config: Mapping[str, Any]) -> Any:
    """Return the base of the rotary wavelengths.

    Version 5 of transformers writes and reads rope_parameters.rope_theta. Version 4 writes rope_theta.
    """
    parameters = config.get("rope_parameters")
    theta = None
    if isinstance(parameters, dict):
        theta = parameters.get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    if type(theta) is int:
        return float(theta)
    return theta


# -- the tensors


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by the names of mainrun.

    A tensor that mainrun does not know keeps the name that it has in the file.
    """
    tensors = {}
    for name, stored in _read_files(folder).items():
        tensors[our_name(name) or name] = stored
    if os.path.lexists(folder / ROUTING):
        tensors |= read_header(folder / ROUTING)
    for stored in tensors.values():
        if stored.dtype not in DTYPES:
            raise UsageError(
                f"{stored.path}: the tensor {inputs.shown(stored.name, 120)} has the type {stored.dtype}, "
                "but must be bfloat16, float16 or float32; convert the checkpoint"
            )
    return tensors


def _read_files(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by their names in the files."""
    single = folder / SINGLE
    index = folder / INDEX
    if os.path.lexists(index):
        if os.path.lexists(single):
            raise UsageError(f"{folder} contains both {SINGLE} and {INDEX}; remove the outdated one")
        return _read_shards(index)
    if os.path.lexists(single):
        return read_header(single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise UsageError(
            f"{folder / pickled[0]} contains pickled weights, which mainrun never loads; "
            "save the model as safetensors"
        )
    raise UsageError(f"{folder} has no {SINGLE} and no {INDEX}; give the folder of a checkpoint")


def _read_shards(index: Path) -> dict[str, Stored]:
    """Return the tensors of all shards that an index names."""
    tensors: dict[str, Stored] = {}
    for file, names in _shards(index).items():
        path = index.parent / file
        if not path.exists():
            raise UsageError(f"{index} names the shard {file}, which is missing; download it again")
        header = read_header(path)
        for name in sorted(names - set(header)):
            raise UsageError(f"{index} says that {file} contains {inputs.shown(name, 120)}, but it does not")
        for name in sorted(set(header) - names):
            raise UsageError(f"{path} contains {inputs.shown(name, 120)}, but {index.name} does not say so")
        tensors |= header
    return tensors


def _shards(index: Path) -> dict[str, set[str]]:
    """Return the tensor names of each shard, after checking the file names in an index."""
    data = read_json(index)
    names_by_file = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names_by_file, dict) or not names_by_file:
        raise UsageError(f"{index} has no weight_map, which gives the shard of each tensor; {AGAIN}")
    shards: dict[str, set[str]] = {}
    for name, file in names_by_file.items():
        # a name with a folder could lead outside the checkpoint
        is_name = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file
        if not is_name or not file.endswith(".safetensors"):
            raise UsageError(
                f"{index} says that {inputs.shown(name, 120)} is in {inputs.shown(file, 120)}, "
                "but a shard must be a safetensors file in the same folder"
            )
        shards.setdefault(file, set()).add(name)
    return shards


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by their names in the file."""
    from safetensors import SafetensorError, safe_open

    why = inputs.not_a_file(path)
    if why:
        raise UsageError(f"{path} {_without_fix(why)}; restore it, or {AGAIN}")
    tensors = {}
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  the file is no dict
                part = file.get_slice(name)
                tensors[name] = Stored(path, name, str(part.get_dtype()), tuple(part.get_shape()))
    except (SafetensorError, OSError) as e:
        raise UsageError(
            f"{path} is not a complete safetensors file ({inputs.shown(str(e), 120)}); download it again"
        ) from None
    return tensors


def is_tied_copy(tensors: Mapping[str, Stored]) -> bool:
    """Return whether the head of a checkpoint is equal to its embedding, as in a model that ties them."""
    head = tensors["head.weight"]
    embed = tensors.get("embed.weight")
    if embed is None or (head.dtype, head.shape) != (embed.dtype, embed.shape):
        return False
    digests = sha256_each([head, embed])
    return digests[head.path, head.name] == digests[embed.path, embed.name]


# -- digests


def sha256_each(tensors: Iterable[Stored]) -> dict[tuple[Path, str], str]:
    """Return the SHA-256 of the bytes of each tensor, by the path of the file and the name in the file.

    The digests are cached by the path, the size and the modification time of the file.
    """
    names: dict[Path, set[str]] = {}
    for stored in tensors:
        names.setdefault(stored.path, set()).add(stored.name)
    digests = {}
    for path, wanted in names.items():
        of_file = _sha256_of_file(path, wanted)
        for name in wanted:
            digests[path, name] = of_file[name]
    return digests


def _sha256_of_file(path: Path, names: set[str]) -> dict[str, str]:
    real = path.resolve()
    stat = real.stat()
    key = sha256_json([str(real), stat.st_size, stat.st_mtime_ns])
    cache_file = cache_dir() / "digests" / f"{key}.json"
    digests = _read_digests(cache_file)
    missing = sorted(names - set(digests))
    if missing:
        digests |= _hash_tensors(path, missing)
        _write_digests(cache_file, digests)
    return digests


def _hash_tensors(path: Path, names: list[str]) -> dict[str, str]:
    """Hash the bytes of tensors in a safetensors file, whose header was checked by `read_header`."""
    digests = {}
    with inputs.open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in names:
            first, end = header[name]["data_offsets"]
            file.seek(8 + length + first)
            digest = hashlib.sha256()
            rest = end - first
            while rest:
                data = file.read(min(CHUNK, rest))
                if not data:
                    raise UsageError(f"{path} became shorter while it was read; download it again")
                digest.update(data)
                rest -= len(data)
            digests[name] = digest.hexdigest()
    return digests


def _read_digests(cache_file: Path) -> dict[str, str]:
    """Return the digests that were cached for a file, or an empty dict."""
    try:
        digests = json.loads(cache_file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        return {}
    return digests


def _write_digests(cache_file: Path, digests: dict[str, str]) -> None:
    """Write the digests of a file atomically. A cache that cannot be written costs only time."""
    with suppress(OSError):
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(digests, f)
            os.replace(temporary, cache_file)
        finally:
            with suppress(FileNotFoundError):  # a renamed file cannot be removed
                os.unlink(temporary)
