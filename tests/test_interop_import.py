"""Import of Qwen2 checkpoints, and runs that start from weights.

The checkpoints are written by `transformers`, which is also the reference for the logits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ROWS, TRAINED, edit_config, write_checkpoint
from conftest import TINY, slow_unless
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import TrainConfig, from_dict
from mainrun.core.parameters import is_base
from mainrun.data.foreign import permutation, special_ids
from mainrun.errors import ConfigError, UsageError
from mainrun.interop.names import checkpoint_name, our_name
from mainrun.interop.start import start_digest
from mainrun.plan.cost import size
from mainrun.plan.recipes import load
from mainrun.store import lineage
from mainrun.train import GPT, build
from reports.submission.prepare import FIXES

LENGTH = 2048  # the number of tokens whose logits are compared


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def imported(folder: Path, out: Path, *options: object) -> TrainConfig:
    """Import a checkpoint, and return the config of its preset."""
    result = invoke("hub", "import", folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    (cfg,) = load(str(out), ["corpus=synthetic"])
    return cfg


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied checkpoint in one float32 file. Tests must not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain checkpoint that a test may change."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


# -- the same logits as transformers


def logits_of_transformers(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


def gap(folder: Path, cfg: TrainConfig) -> float:
    """Return the largest difference between the logits of mainrun and of transformers over 2,048 tokens."""
    cfg = cfg.model_copy(update={"block_size": LENGTH, "dtype": "float32"})
    model = build(cfg, cfg.vocab_size).eval()
    ids = torch.randint(ROWS, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    to_file = torch.from_numpy(permutation(special_ids(folder), ROWS)[0])
    with torch.no_grad():
        ours = model(ids)
    theirs = logits_of_transformers(folder, to_file[ids])[..., to_file]
    assert theirs.std() > 0.1, "the logits of a checkpoint must differ from each other"
    return float((ours - theirs).abs().max())


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "as many heads of keys as heads": {"num_key_value_heads": 4},
    "one head of keys": {"num_key_value_heads": 1},
    "a width of the heads": {"head_dim": 12},
    "shards": {"shard": "20KB", "tie_word_embeddings": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


@pytest.mark.parametrize("what", slow_unless(["tied", "shards", "bfloat16"], CHECKPOINTS))
def test_the_logits_are_those_of_transformers(what: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", **CHECKPOINTS[what])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (what == "shards")
    assert gap(folder, imported(folder, tmp_path / "preset.toml")) < 1e-5


def test_both_spellings_of_theta(copy: Path, tmp_path: Path) -> None:
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 500.0}
    edit_config(copy, **both)
    cfg = imported(copy, tmp_path / "preset.toml")
    assert cfg.rope_theta == 300
    assert gap(copy, cfg) < 1e-5, "transformers 5 believes rope_parameters"
    edit_config(copy, "rope_parameters")
    cfg = imported(copy, tmp_path / "preset.toml", "--force")
    assert cfg.rope_theta == 500
    assert gap(copy, cfg) < 1e-5, "transformers 4 writes rope_theta"
    edit_config(copy, rope_scaling={"type": "default"})
    assert imported(copy, tmp_path / "preset.toml", "--force").rope_theta == 500


def test_another_theta_would_be_seen(copy: Path, tmp_path: Path) -> None:
    cfg = imported(copy, tmp_path / "preset.toml")
    edit_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(UsageError, match=r"rope_theta is 500.0 in the start and 1000000.0"):
        gap(copy, cfg)


# -- the tensors after a start


@pytest.mark.parametrize("pattern", ["D", "DM", "DS", "DT"])
def test_each_tensor_equals_its_source(plain: Path, tmp_path: Path, pattern: str) -> None:
    cfg = imported(plain, tmp_path / "preset.toml", "--pattern", pattern)
    source = load_file(plain / "model.safetensors")
    to_file = torch.from_numpy(permutation(special_ids(plain), ROWS)[0])
    random = GPT(cfg, cfg.vocab_size)
    model = build(cfg, cfg.vocab_size)
    named = 0
    for name, p in model.named_parameters():
        if not is_base(name):
            continue
        expected = source.pop(checkpoint_name(name))
        if name == "embed.weight":
            assert not torch.equal(p, expected), "the ids of the file are others"
            expected = expected[to_file]
        assert torch.equal(p, expected), name
        named += 1
    assert source == {} and named == 2 + 12 * 2
    extra = [name for name, _ in random.named_parameters() if not is_base(name)]
    assert bool(extra) == (pattern != "D")


def test_routers_are_those_of_a_run_from_random_weights(plain: Path, tmp_path: Path) -> None:
    cfg = imported(plain, tmp_path / "preset.toml", "--pattern", "DS", "--capacity", 0.25)
    assert (cfg.letters, cfg.gate, cfg.capacity) == ("DS", "straight", 0.25)
    started = dict(build(cfg, ROWS).named_parameters())
    random = dict(build(cfg.model_copy(update={"start": ""}), ROWS).named_parameters())
    for name, p in random.items():
        assert torch.equal(p, started[name]) != is_base(name), name


def test_the_ids_of_the_special_tokens(plain: Path) -> None:
    ids = special_ids(plain)
    model = build(config(plain), ROWS)
    source = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed.weight[:3], source[list(ids)])
    assert sorted(ids) == [264, 265, 266]


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Return the config of a short run that starts from a checkpoint like the plain one."""
    model = {
        "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48, "vocab_size": ROWS,
        "norm": "rmsnorm", "position": "rope", "rope_theta": 1e6, "mlp": "swiglu", "bias": False,
        "qkv_bias": True,
    }  # fmt: skip
    start = {"start": f"hf:{folder}", "tokenizer": f"hf:{folder}"}
    return from_dict(TRAINED | model | start | {"optimizer": "adamw", "lr": 1e-3} | changes)


# -- names


def test_names_are_mapped_to_both_sides(plain: Path) -> None:
    for theirs in load_file(plain / "model.safetensors"):
        assert checkpoint_name(our_name(theirs)) == theirs
    assert our_name("lm_head.weight") == "head.weight"
    strange = [
        "model.layers.0.mlp.up_proj", "model.layers.00.mlp.up_proj.weight", "norm.weight",
        "model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight", "score.weight",
    ]  # fmt: skip
    assert {our_name(name) for name in strange} == {""}


# -- the preset


def test_the_preset_has_the_fields_of_the_spec(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.toml"
    cfg = imported(plain, out)
    assert cfg.preset == "small"
    expected = {
        "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48, "vocab_size": ROWS,
        "norm": "rmsnorm", "position": "rope", "rope_theta": 1e6, "mlp": "swiglu", "bias": False,
        "qkv_bias": True, "tie_head": True, "start": f"hf:{plain}", "tokenizer": f"hf:{plain}",
        "block_size": 1024, "dtype": "bfloat16", "optimizer": "adamw", "lr": 1e-5, "beta2": 0.95,
        "weight_decay": 0.01, "schedule": "cosine", "warmup_frac": 0.01, "clip": 1.0,
        "lr_router": 1e-2, "lr_prior": 1e-3, "lr_student": 1e-3, "lr_lora": 1e-4,
        "gate": "soft", "block_pattern": "D",
    }  # fmt: skip
    assert {field: getattr(cfg, field) for field in expected} == expected
    assert str(plain) in out.read_text().split("\n")[1], "the line `about` names the folder"
    assert sorted(path.name for path in out.parent.iterdir()) == ["small.toml"], "no weights are copied"


def test_the_block_is_at_most_the_checkpoints_own(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "preset.toml"
    assert imported(copy, out, "--block-size", 2048).block_size == 2048
    edit_config(copy, max_position_embeddings=64)
    assert imported(copy, out, "--force").block_size == 64
    result = invoke("hub", "import", copy, "--out", out, "--block-size", 65)
    assert result.exit_code == 2 and "give at most 64" in result.output


def test_a_relative_folder_becomes_a_full_path(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain.parent)
    assert imported(Path(plain.name), tmp_path / "preset.toml").start == f"hf:{plain}"


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_a_relative_start_becomes_a_full_path(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(plain.parent)
    sets = [f"start={kind}:{plain.name}", f"tokenizer=hf:{plain.name}"]
    (cfg,) = load("demo:baseline", sets)
    assert (cfg.start, cfg.tokenizer) == (f"{kind}:{plain}", f"hf:{plain}")
    preset = tmp_path / "relative.toml"
    fields = f'start = "{kind}:{plain.name}"\ntokenizer = "hf:{plain.name}"\n'
    preset.write_text(f'base = "demo:baseline"\n{fields}')
    (cfg,) = load(str(preset))
    assert (cfg.start, cfg.tokenizer) == (f"{kind}:{plain}", f"hf:{plain}")
    assert load(str(preset), [f"start={kind}:~/x"])[0].start == f"{kind}:~/x"


def test_an_earlier_preset_is_replaced_and_another_file_is_kept(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "preset.toml"
    imported(plain, out)
    imported(plain, out)
    result = invoke("hub", "import", plain, "--out", out, "--block-size", 32)
    assert result.exit_code == 2 and "--force" in result.output
    assert imported(plain, out, "--block-size", 32, "--force").block_size == 32
    edited = out.read_text().replace("lr = 1e-05", "lr = 2e-05")
    out.write_text(edited)
    result = invoke("hub", "import", plain, "--out", out, "--block-size", 32)
    assert result.exit_code == 2 and "differs from the new preset" in result.output
    assert out.read_text() == edited != ""
    out.write_text("lr = 1.0\n")
    result = invoke("hub", "import", plain, "--out", out)
    assert result.exit_code == 2 and "would be overwritten" in result.output
    assert out.read_text() == "lr = 1.0\n"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--out", "preset.json"], "ends in .toml"),
        (["--out", "-x.toml"], "invalid name"),
        (["--out", "p.toml", "--capacity", "0.5"], "without --pattern"),
        (["--out", "p.toml", "--capacity", "0.5", "--pattern", "D"], "routes no block"),
        (["--out", "p.toml", "--pattern", "DQ"], "contains 'Q'"),
        (["--out", "p.toml", "--pattern", "MD"], "begin the pattern with D"),
        (["--out", "p.toml", "--pattern", "DM", "--capacity", "2"], "capacity"),
    ],
)
def test_a_wrong_option_writes_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("hub", "import", plain, *options)
    assert result.exit_code == 2, result.output
    assert word in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "params", "heads"),
    [("qwen-10m", 10_002_688, (4, 2)), ("qwen-50m", 51_709_248, (9, 3)), ("qwen-0.5b", 494_032_768, (14, 2))],
)
def test_the_presets_that_are_trained_from_scratch(name: str, params: int, heads: tuple[int, int]) -> None:
    (cfg,) = load(name)
    assert size(cfg).params == params
    assert (cfg.n_head, cfg.n_kv_head) == heads
    assert (cfg.start, cfg.head_width, cfg.block_size, cfg.rope_theta) == ("", 64, 1024, 1e6)
    assert (cfg.norm, cfg.mlp, cfg.bias, cfg.qkv_bias, cfg.tie_head) == (
        "rmsnorm", "swiglu", False, True, True,
    )  # fmt: skip
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(cfg, cfg.vocab_size).parameters()) == params


# -- damaged checkpoints


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the only file of a checkpoint."""
    path = folder / "model.safetensors"
    loaded = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(loaded)
    save_file(loaded, path)


def shards(folder: Path) -> dict[str, Any]:
    """Split the file of a checkpoint into two shards, and return the content of the index."""
    path = folder / "model.safetensors"
    loaded = load_file(path)
    names = sorted(loaded)
    places: dict[str, str] = {}
    for number in (0, 1):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = {name: loaded[name] for name in names[number::2]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    path.unlink()
    index = {"metadata": {}, "weight_map": places}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def place(folder: Path, file: str) -> None:
    """Let the index say that the embedding is in another file."""
    index = shards(folder)
    index["weight_map"]["model.embed_tokens.weight"] = file
    write_index(folder, index)


def rename(folder: Path) -> None:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        loaded["model.layers.0.mlp.upward.weight"] = loaded.pop("model.layers.0.mlp.up_proj.weight")

    tensors(folder, change)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def replace_weights(folder: Path, name: str, data: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)


def remove_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate_shard(folder: Path) -> None:
    shards(folder)
    truncate(folder / "model-00002-of-00002.safetensors", 100)


def keep_both(folder: Path) -> None:
    kept = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(kept)


def forget_tensor(folder: Path) -> None:
    index = shards(folder)
    del index["weight_map"]["model.norm.weight"]
    write_index(folder, index)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def set_shape(loaded: dict[str, torch.Tensor]) -> None:
    loaded["model.norm.weight"] = torch.ones(31)


NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
BOMB = "[" * 100_000 + "]" * 100_000
ROPE = {"rope_type": "default", "rope_theta": 1e6}
Damage = Callable[[Path], object]
# how a checkpoint is damaged, and what the message must name
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "a tensor is renamed": (
        rename, ["missing: blocks.0.mlp.up.weight", "left over: model.layers.0.mlp.upward"],
    ),
    "a tensor is missing": (lambda f: tensors(f, lambda t: t.pop(NORM)), [f"missing: norm.weight ({NORM})"]),
    "a tensor is left over": (
        lambda f: tensors(f, lambda t: t.update({"score.weight": torch.ones(2)})),
        ["left over: score.weight"],
    ),
    "a layer is left over": (
        lambda f: edit_config(f, num_hidden_layers=1), ["left over: blocks.1.attn.q.bias", "layers.1.mlp"],
    ),
    "a tensor has another shape": (lambda f: tensors(f, set_shape), [NORM, "(31,)", "(32,)"]),
    "a tensor has another type": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].double()})), [NORM, "F64"],
    ),
    "a head differs from the tied embedding": (
        lambda f: tensors(f, lambda t: t.update({"lm_head.weight": t[EMBED] + 1})), ["left over", "lm_head"],
    ),
    "an untied head is missing": (
        lambda f: edit_config(f, tie_word_embeddings=False), ["missing", "lm_head"],
    ),
    "the file is truncated": (
        lambda f: truncate(f / "model.safetensors", 1), ["model.safetensors", "complete"],
    ),
    "the file is empty": (
        lambda f: os.truncate(f / "model.safetensors", 0), ["model.safetensors", "complete"],
    ),
    "the file is text": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), ["model.safetensors"],
    ),
    "the weights are pickled": (
        lambda f: replace_weights(f, "pytorch_model.bin", b"\x80\x04."), ["pytorch_model.bin", "pickled"],
    ),
    "the weights are pickled by torch": (
        lambda f: replace_weights(f, "weights.pt", b"PK\x03\x04"), ["weights.pt", "pickled"],
    ),
    "there are no weights": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "a shard is missing": (remove_shard, ["model-00002-of-00002.safetensors", "missing"]),
    "a shard is truncated": (truncate_shard, ["model-00002-of-00002.safetensors", "complete"]),
    "the index leads out of the folder": (
        lambda f: place(f, "../plain/model.safetensors"), [EMBED, "../plain/model.safetensors"],
    ),
    "the index names a full path": (lambda f: place(f, "/etc/x.safetensors"), [EMBED, "/etc/x.safetensors"]),
    "the index names no safetensors file": (lambda f: place(f, "model.bin"), [EMBED, "model.bin"]),
    "the index names the wrong shard": (
        lambda f: place(f, "model-00002-of-00002.safetensors"), [EMBED, "model-00002-of-00002"],
    ),
    "the index lacks a tensor": (forget_tensor, [NORM, "does not say so"]),
    "the index has no map": (
        lambda f: (shards(f), write_index(f, {"metadata": {}})), ["has no weight_map", "download it again"],
    ),
    "the index is a bomb": (
        lambda f: (shards(f), (f / "model.safetensors.index.json").write_text(BOMB)),
        ["index.json", "nested"],
    ),
    "there are a file and an index": (keep_both, ["both"]),
    "another kind of model": (lambda f: edit_config(f, model_type="llama"), ["model_type", "llama"]),
    "another epsilon": (lambda f: edit_config(f, rms_norm_eps=1e-5), ["rms_norm_eps", "1e-05"]),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), ["hidden_act", "gelu"]),
    "a sliding window": (lambda f: edit_config(f, use_sliding_window=True), ["use_sliding_window"]),
    "a layer with a window": (
        lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"]), ["layer_types"],
    ),
    "scaled rotary embedding": (
        lambda f: edit_config(f, rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0}),
        ["rope_parameters.rope_type", "yarn"],
    ),
    "scaled rotary embedding, old spelling": (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"],
    ),
    "a factor without a type": (
        lambda f: edit_config(f, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
        ["partial_rotary_factor"],
    ),
    "no theta": (lambda f: edit_config(f, "rope_parameters"), ["rope_theta"]),
    "quantised weights": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "a size is missing": (lambda f: edit_config(f, "num_key_value_heads"), ["lacks num_key_value_heads"]),
    "a size is a text": (lambda f: edit_config(f, hidden_size="32"), ["hidden_size", "'32'"]),
    "a size is negative": (lambda f: edit_config(f, num_hidden_layers=-2), ["num_hidden_layers", "-2"]),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=5), ["n_head=5"]),
    "the heads are of another number": (
        lambda f: edit_config(f, num_attention_heads=8, num_key_value_heads=8), ["self_attn.k_proj.weight"],
    ),
    "tied is no truth": (lambda f: edit_config(f, tie_word_embeddings="yes"), ["tie_word_embeddings"]),
    "fewer rows than tokens": (lambda f: edit_config(f, vocab_size=200), ["vocab_size"]),
    "the config is a bomb": (lambda f: (f / "config.json").write_text(BOMB), ["config.json", "nested"]),
    "the config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json is [], but must be an object; download it again"],
    ),
    "the config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json is not valid JSON (", "); download it again"],
    ),
    "the config is missing": (
        lambda f: (f / "config.json").unlink(),
        ["copy has no config.json; give the folder of a Qwen2 checkpoint"],
    ),
    "the config is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), ["config.json", "pipe"],
    ),
    "the tokenizer is missing": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "the tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "half of the routers": (
        lambda f: (f / "routing.json").write_text("{}"),
        ["has routing.json but no routing.safetensors; copy it too, or remove routing.json"],
    ),
    "the config is a loop of links": (
        lambda f: loop(f / "config.json"), ["leads back to itself; download it again"],
    ),
    "the weights are a loop of links": (
        lambda f: loop(f / "model.safetensors"), ["leads back to itself; restore it, or download it again"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_culprit_is_named(
    copy: Path, tmp_path: Path, what: str
) -> None:
    damage, words = DAMAGES[what]
    damage(copy)
    before = sorted(tmp_path.rglob("*"))
    result = invoke("hub", "import", copy, "--out", tmp_path / "preset.toml")
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert "copy cannot be imported: " in result.output and "start=" not in result.output
    assert "give a file" not in result.output and "give another path" not in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_all_wrong_tensors_are_named_in_one_error(copy: Path) -> None:
    def change(loaded: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            del loaded[f"model.layers.{layer}.mlp.up_proj.weight"]
        loaded |= {"one": torch.ones(1), "two": torch.ones(1)}
        loaded[NORM] = torch.ones(31)
        loaded["model.layers.0.self_attn.q_proj.bias"] = torch.ones(33)

    cfg = config(copy)
    tensors(copy, change)
    with pytest.raises(UsageError) as error:
        build(cfg, ROWS)
    faults = str(error.value).split("\n")[1:-1]
    assert [fault.strip() for fault in faults] == [
        "blocks.0.attn.q.bias (model.layers.0.self_attn.q_proj.bias) has the shape (33,) in the start "
        "and (32,) in the model",
        "missing: blocks.0.mlp.up.weight (model.layers.0.mlp.up_proj.weight)",
        "missing: blocks.1.mlp.up.weight (model.layers.1.mlp.up_proj.weight)",
        "norm.weight (model.norm.weight) has the shape (31,) in the start and (32,) in the model",
        "left over: one",
        "left over: two",
    ]


def test_a_tied_file_may_contain_an_equal_head(copy: Path, tmp_path: Path) -> None:
    tensors(copy, lambda loaded: loaded.update({"lm_head.weight": loaded[EMBED].clone()}))
    cfg = imported(copy, tmp_path / "preset.toml")
    assert build(cfg, ROWS).head is None


def test_only_routers_and_low_rank_terms_may_be_missing(plain: Path) -> None:
    model = build(config(plain, attn_lora_rank=2), ROWS)
    assert {name for name, _ in model.named_parameters() if not is_base(name)} == {
        f"blocks.{layer}.attn.{part}.lora_{side}" for layer in (0, 1) for part in "qkvo" for side in "ab"
    }
    with pytest.raises(UsageError, match=r"missing: blocks.0.attn.q_norm.weight"):
        build(config(plain, qk_norm=True), ROWS)


def test_the_start_does_not_depend_on_the_order_of_the_shards(plain: Path, copy: Path) -> None:
    shards(copy)
    one = build(config(plain), ROWS)
    other = build(config(copy), ROWS)
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert start_digest(config(plain)) == start_digest(config(copy))


# -- the config


def test_a_checkpoint_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"set tokenizer=hf:DIR"):
        from_dict({"start": "hf:somewhere"})
    assert from_dict({"start": "run:somewhere"}).tokenizer == "bpe"


@pytest.mark.parametrize("start", ["hf", "hf:", "run:", "hub:x", "somewhere"])
def test_a_start_of_another_kind_is_refused(start: str) -> None:
    with pytest.raises(ConfigError, match="is not a start"):
        from_dict({"start": start})


def test_without_a_start_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mainrun.interop.start", None)
    cfg = from_dict(TINY)
    model = build(cfg, 400)
    torch.manual_seed(0)
    assert lineage.origin(cfg, {}, "tokens", {}, {})["data"] == {"tokens": "tokens"}
    assert len(list(model.parameters())) > 0


def test_the_fix_of_submit_is_an_empty_start(plain: Path) -> None:
    sets = [f"start=hf:{plain}", f"tokenizer=hf:{plain}"]
    assert load("demo:baseline", sets)[0].start
    assert load("demo:baseline", [*sets, "start="])[0].start == ""
    assert "`--set start=`" in FIXES["random_start"]
