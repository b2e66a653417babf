"""`mainrun hub export`: the exported model is the scored model, for transformers and for peft.

The tests load each export with the real libraries and compare the logits with those of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import BASE_SIZE, QWEN, config, from_base, make_base, some_ids, trained
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from mainrun.cli import app
from mainrun.config import from_dict
from mainrun.data.corpus import load_corpus
from mainrun.data.foreign import permutation
from mainrun.errors import DiskFull, RunError, UsageError
from mainrun.interop import export as exporting
from mainrun.interop import qwen2_export
from mainrun.interop.adapter import Term, adapter_config
from mainrun.interop.bases import Base, find_base
from mainrun.interop.card import without_folders
from mainrun.interop.export import export_run
from mainrun.interop.names import checkpoint_name
from mainrun.interop.routing_files import FIELDS, read_routing_fields
from mainrun.interop.source import inexpressible
from mainrun.plan.plan import Plan
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import build
from mainrun.ui.sample import load_model

Trained = Callable[..., RunDir]
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def run_with(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a function that trains a run with these changes, once for the whole module."""
    out = tmp_path_factory.mktemp("runs")
    runs: dict[str, RunDir] = {}

    def get(**changes: Any) -> RunDir:
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            runs[key] = trained(out, **changes)
        return runs[key]

    return get


@pytest.fixture(scope="module")
def exported(run_with: Trained, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function that exports a run with these changes, once for the whole module."""
    out = tmp_path_factory.mktemp("exports")
    folders: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in folders:
            folders[key] = out / f"export-{len(folders)}"
            export_run(run_with(**changes), folders[key])
        return folders[key]

    return get


def transformers_logits(folder: Path, idx: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model.eval()(idx).logits


def our_logits(run: RunDir, idx: Tensor) -> Tensor:
    model, _ = load_model(run)
    with torch.no_grad():
        return model(idx)


# -- transformers agrees

GQA: dict[str, Any] = {"n_kv_head": 1, "ema": 0.5}
UNTIED: dict[str, Any] = {"tie_head": False}
LORA: dict[str, Any] = {"attn_lora_rank": 2, "embed_lora_rank": 3}
WIDE: dict[str, Any] = {"head_dim": 24, "n_head": 3, "tokenizer": "unigram"}
ROUTED: dict[str, Any] = {"block_pattern": "DM", "n_layer": 4, "capacity": 0.25, "gate": "straight"}


@pytest.mark.parametrize("changes", [GQA, UNTIED, LORA, WIDE], ids=["gqa-tied-ema", "untied", "lora", "wide"])
def test_transformers_gives_the_logits_of_the_run(
    run_with: Trained, exported: Exported, changes: dict[str, Any]
) -> None:
    idx = some_ids(400)
    ours = our_logits(run_with(**changes), idx)
    assert (transformers_logits(exported(**changes), idx) - ours).abs().max() <= 1e-5
    assert ours.std() > 0.05, "the logits of an untrained model would agree by chance"


def test_the_averages_are_exported(run_with: Trained, exported: Exported) -> None:
    run = run_with(**GQA)
    newest = max((run.path / "checkpoints").iterdir())
    state = load_file(newest / "state.safetensors")
    weights = load_file(exported(**GQA) / "model.safetensors")
    name = "blocks.0.attn.q.weight"
    assert torch.equal(weights[checkpoint_name(name)], state[f"average/{name}"])
    assert not torch.equal(state[f"average/{name}"], state[f"model/{name}"])


def test_only_an_untied_checkpoint_has_a_head(exported: Exported) -> None:
    assert "lm_head.weight" not in load_file(exported(**GQA) / "model.safetensors")
    untied = load_file(exported(**UNTIED) / "model.safetensors")
    assert not torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])
    for changes, tied in ((GQA, True), (UNTIED, False)):
        table = json.loads((exported(**changes) / "config.json").read_text())
        assert table["tie_word_embeddings"] is tied


def test_low_rank_terms_are_merged(run_with: Trained, exported: Exported) -> None:
    model, _ = load_model(run_with(**LORA))
    weights = load_file(exported(**LORA) / "model.safetensors")
    assert not [name for name in weights if "lora" in name]
    embed: Any = model.embed
    assert embed.lora_b.abs().max() > 0
    assert torch.equal(weights["model.embed_tokens.weight"], embed.effective_weight())


@pytest.mark.parametrize("removed", ["rope_theta", "rope_parameters"])
def test_transformers_reads_both_spellings_of_theta(
    run_with: Trained, exported: Exported, tmp_path: Path, removed: str
) -> None:
    folder = copy_of(exported(**GQA), tmp_path / "copy")
    table = json.loads((folder / "config.json").read_text())
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == 1000.0
    assert table["torch_dtype"] == table["dtype"] == "float32"
    del table[removed]
    (folder / "config.json").write_text(json.dumps(table))
    idx = some_ids(400)
    assert (transformers_logits(folder, idx) - our_logits(run_with(**GQA), idx)).abs().max() <= 1e-5


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_bfloat16_rounds_each_weight_once(run_with: Trained, exported: Exported, tmp_path: Path) -> None:
    export_run(run_with(**UNTIED), tmp_path / "x", dtype="bfloat16")
    exact = load_file(exported(**UNTIED) / "model.safetensors")
    rounded = load_file(tmp_path / "x" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16 and torch.equal(rounded[name], tensor.bfloat16())
    table = json.loads((tmp_path / "x" / "config.json").read_text())
    assert table["torch_dtype"] == table["dtype"] == "bfloat16"
    assert "rounded to bfloat16" in (tmp_path / "x" / "README.md").read_text()


def test_large_models_are_written_in_shards(
    run_with: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qwen2_export.SHARD == "5GB"
    monkeypatch.setattr(qwen2_export, "SHARD", "60KB")
    export_run(run_with(**UNTIED), tmp_path / "x")
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    idx = some_ids(400)
    ours = our_logits(run_with(**UNTIED), idx)
    assert (transformers_logits(tmp_path / "x", idx) - ours).abs().max() <= 1e-5


# -- tokenizers


@pytest.mark.parametrize("changes", [GQA, WIDE], ids=["bpe", "unigram"])
def test_auto_tokenizer_gives_the_ids_of_the_run(
    run_with: Trained, exported: Exported, changes: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    run = run_with(**changes)
    library = AutoTokenizer.from_pretrained(exported(**changes))
    _, tokenizer = load_model(run)
    corpus = load_corpus(run.config())
    for title in (*corpus.train[:200], *corpus.val, "  two  spaces ", ""):
        ids = library(title).input_ids
        assert ids == tokenizer.encode([title]).tolist()[:-1], title
        assert library.decode(ids) == title
    assert (library.pad_token_id, library.eos_token_id, library.bos_token_id) == (0, 1, 1)
    assert library.unk_token_id == 2


def test_bpe_text_contains_no_special_tokens(exported: Exported) -> None:
    from transformers import AutoTokenizer

    assert 1 not in AutoTokenizer.from_pretrained(exported(**GQA))("a <eos> b").input_ids


def test_a_unigram_tokenizer_is_the_model_of_sentencepiece(run_with: Trained, exported: Exported) -> None:
    from sentencepiece import SentencePieceProcessor

    _, tokenizer = load_model(run_with(**WIDE))
    assert not (exported(**WIDE) / "tokenizer.json").exists()
    library = SentencePieceProcessor(model_file=str(exported(**WIDE) / "tokenizer.model"))
    assert library.encode("Show HN: a thing") == tokenizer.encode(["Show HN: a thing"]).tolist()[:-1]


# -- routed runs


def test_a_routed_run_exports_its_dense_backbone(run_with: Trained, exported: Exported) -> None:
    run = run_with(**ROUTED)
    model, _ = load_model(run)
    dense = build(model.cfg.model_copy(update={"block_pattern": "D"}), 400).eval()
    # the dense model has no routers; everything else must fit
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".router." in name for name in unexpected)
    idx = some_ids(400)
    with torch.no_grad():
        expected = dense(idx)
        routed = model(idx)
    logits = transformers_logits(exported(**ROUTED), idx)
    assert (logits - expected).abs().max() <= 1e-5
    assert (logits - routed).abs().max() > 1e-3
    readme = " ".join((exported(**ROUTED) / "README.md").read_text().split())
    assert "transformers` runs the model dense" in readme and "`DMDM`" in readme


@pytest.mark.parametrize("pattern", ["DM", "DS", "DT"])
def test_the_routers_are_beside_the_backbone(run_with: Trained, exported: Exported, pattern: str) -> None:
    changes = ROUTED | {"block_pattern": pattern}
    model, _ = load_model(run_with(**changes))
    tensors = load_file(exported(**changes) / "routing.safetensors")
    expected = {name: p for name, p in model.named_parameters() if ".router." in name}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    cfg = model.cfg
    # the scores of S and T belong to the sharpness of the last step; M has none
    sharpness = cfg.sharpness if pattern == "DM" else cfg.sharpness_end
    assert read_routing_fields(exported(**changes)) == {
        "block_pattern": cfg.letters,
        "capacity": 0.25,
        "gate": "straight",
        "route": "auto",
        "prior_factor": cfg.prior_factor,
        "sharpness": sharpness,
        "sharpness_end": cfg.sharpness_end,
    }


def test_routers_stay_in_float32(run_with: Trained, exported: Exported, tmp_path: Path) -> None:
    export_run(run_with(**ROUTED), tmp_path / "x", dtype="bfloat16")
    name = "routing.safetensors"
    assert (tmp_path / "x" / name).read_bytes() == (exported(**ROUTED) / name).read_bytes()


def test_dense_exports_have_no_routing_files(exported: Exported) -> None:
    assert read_routing_fields(exported(**GQA)) == {}
    assert not [file for file in exported(**GQA).iterdir() if "routing" in file.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format=2), "has format 2"),
        (lambda table: table.pop("gate"), "wrong: gate"),
        (lambda table: table.update(other=1), "wrong: other"),
        (lambda table: table.update(capacity="0.5"), "capacity='0.5', which must be a float"),
        (lambda table: table.update(capacity=True), "capacity=True"),
    ],
)
def test_a_wrong_routing_json_is_refused(
    exported: Exported, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = copy_of(exported(**ROUTED), tmp_path / "x")
    table = json.loads((folder / "routing.json").read_text())
    change(table)
    (folder / "routing.json").write_text(json.dumps(table))
    with pytest.raises(UsageError, match=message):
        read_routing_fields(folder)


def test_damaged_routing_files_are_refused(exported: Exported, tmp_path: Path) -> None:
    folder = copy_of(exported(**ROUTED), tmp_path / "x")
    (folder / "routing.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_routing_fields(folder)
    (folder / "routing.json").unlink()
    with pytest.raises(UsageError, match=r"has routing\.safetensors but no routing\.json; copy it too"):
        read_routing_fields(folder)
    assert set(FIELDS) <= set(type(config()).model_fields)


# -- in, out, in


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("bases")
    return {"tied": make_base(out / "tied"), "untied": make_base(out / "untied", tied=False)}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_checkpoint_goes_in_and_out_without_a_change(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    base = bases[kind]
    # with a learning rate this small, no weight changes
    run = trained(tmp_path / "runs", **from_base(base, tie_head=kind == "tied", lr=1e-30, max_steps=1))
    export_run(run, tmp_path / "x")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "x" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    table = json.loads((tmp_path / "x" / "config.json").read_text())
    vocabulary = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    assert table["eos_token_id"] == vocabulary[0]["id"] and table["vocab_size"] == BASE_SIZE


def test_an_export_goes_in_again(bases: dict[str, Path], tmp_path: Path) -> None:
    first = trained(tmp_path / "runs", **from_base(bases["untied"], tie_head=False))
    export_run(first, tmp_path / "x")
    assert not torch.equal(
        load_file(tmp_path / "x" / "model.safetensors")["lm_head.weight"],
        load_file(bases["untied"] / "model.safetensors")["lm_head.weight"],
    )
    second = trained(tmp_path / "runs", **from_base(tmp_path / "x", tie_head=False, lr=1e-30, max_steps=1))
    idx = some_ids(BASE_SIZE)
    assert torch.equal(our_logits(second, idx), our_logits(first, idx))
    export_run(second, tmp_path / "y")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "y" / name).read_bytes() == (tmp_path / "x" / name).read_bytes(), name


def test_a_foreign_vocabulary_keeps_its_order(bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = trained(tmp_path / "runs", **from_base(bases["tied"]))
    export_run(run, tmp_path / "x")
    model, tokenizer = load_model(run)
    library = AutoTokenizer.from_pretrained(tmp_path / "x")
    titles = ["Show HN: a thing", "naïve 日本", " tabs\tand  blanks "]
    for title in titles:
        ids = library(title).input_ids
        ours = torch.tensor([tokenizer.encode([title]).tolist()[:-1]])
        theirs = transformers_logits(tmp_path / "x", torch.tensor([ids]))
        with torch.no_grad():
            expected = model(ours)
        order = torch.from_numpy(permutation(tokenizer.special_ids, BASE_SIZE)[1])
        assert (theirs - expected[..., order]).abs().max() <= 1e-5
        assert library.decode(ids) == title
    assert library.eos_token == "<|endoftext|>"


def test_routers_go_in_again(bases: dict[str, Path], tmp_path: Path) -> None:
    routed = {"block_pattern": "DS", "n_layer": 2, "gate": "straight", "capacity": 0.25}
    first = trained(tmp_path / "runs", **from_base(bases["tied"], **routed))
    export_run(first, tmp_path / "x")
    done = mainrun("hub", "import", tmp_path / "x", "--out", tmp_path / "again.toml")
    assert done.exit_code == 0, done.stderr
    fields = tomllib.loads((tmp_path / "again.toml").read_text())
    del fields["about"]
    cfg = from_dict(QWEN | fields | {"dtype": "float32"})
    model = build(cfg, BASE_SIZE).eval()
    model.set_inputs(Plan(cfg, 10_000).at(0), "plain")
    idx = some_ids(BASE_SIZE)
    with torch.no_grad():
        assert torch.equal(model(idx), our_logits(first, idx))


# -- adapters


FROZEN: dict[str, Any] = {"base_frozen": True, "attn_lora_rank": 2, "mlp_lora_rank": 3, "lora_alpha": 16.0}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_peft_gives_the_logits_of_the_run(
    run_with: Trained, bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = run_with(**from_base(bases[kind], tie_head=kind == "tied", **FROZEN))
    export_run(run, tmp_path / "x", adapter=True)
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    table = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert table["base_model_name_or_path"] == str(bases[kind])
    assert {name: table[name] for name in ("r", "rank_pattern", "lora_alpha", "alpha_pattern")} == {
        "r": 2,
        "rank_pattern": {"gate_proj": 3, "up_proj": 3, "down_proj": 3},
        "lora_alpha": 16.0,
        "alpha_pattern": {},
    }
    base = AutoModelForCausalLM.from_pretrained(table["base_model_name_or_path"])
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected)")  # peft only warns about such keys
        adapted = PeftModel.from_pretrained(base, tmp_path / "x").eval()
    model, tokenizer = load_model(run)
    to_file, from_file = map(torch.from_numpy, permutation(tokenizer.special_ids, BASE_SIZE))
    idx = some_ids(BASE_SIZE)
    with torch.no_grad():
        expected = model(idx)[..., from_file]
        logits = adapted(to_file[idx]).logits
        with adapted.disable_adapter():
            plain = adapted(to_file[idx]).logits
    assert (logits - expected).abs().max() <= 1e-5
    assert (plain - expected).abs().max() > 1e-3
    reloaded = load_file(bases[kind] / "model.safetensors")
    for name, tensor in reloaded.items():
        assert torch.equal(tensor, before[name])


def test_peft_names(run_with: Trained, bases: dict[str, Path], tmp_path: Path) -> None:
    run = run_with(**from_base(bases["tied"], **FROZEN))
    export_run(run, tmp_path / "x", adapter=True, dtype="bfloat16")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    a = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    assert a.shape == (3, 48) and b.shape == (32, 3) and a.dtype == torch.bfloat16
    assert not torch.equal(b, torch.zeros_like(b))


def test_a_routed_adapter_keeps_its_routers(
    run_with: Trained, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = run_with(**from_base(bases["tied"], block_pattern="DM", **FROZEN))
    export_run(run, tmp_path / "x", adapter=True)
    assert read_routing_fields(tmp_path / "x")["block_pattern"] == "DM"
    assert "transformers` runs the model dense" in (tmp_path / "x" / "README.md").read_text()


def refused_adapter(run: RunDir, folder: Path) -> str:
    with pytest.raises(UsageError) as error:
        export_run(run, folder, adapter=True)
    assert not folder.exists()
    return str(error.value)


def test_runs_that_are_no_adapter_are_refused(
    run_with: Trained, bases: dict[str, Path], tmp_path: Path
) -> None:
    message = refused_adapter(run_with(**GQA), tmp_path / "x")
    assert "has no low-rank terms" in message and "start=(empty) is no checkpoint" in message
    embed = from_base(bases["tied"], embed_lora_rank=2, **FROZEN)
    assert "embed_lora_rank is set, but peft" in refused_adapter(run_with(**embed), tmp_path / "x")
    trains_base = from_base(bases["tied"], attn_lora_rank=2)
    message = refused_adapter(run_with(**trains_base), tmp_path / "x")
    assert "the run also changed model.embed_tokens.weight" in message and "base_frozen=true" in message


def test_an_adapter_needs_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = copy_of(bases["tied"], tmp_path / "base")
    run = trained(tmp_path / "runs", **from_base(base, **FROZEN))
    (base / "model.safetensors").write_bytes((bases["untied"] / "model.safetensors").read_bytes())
    assert "start" in refused_adapter(run, tmp_path / "x")


def test_terms_of_different_ranks_and_scales_have_patterns() -> None:
    def term(name: str, rank: int, alpha: float) -> Term:
        return Term(name, torch.zeros(rank, 4), torch.zeros(4, rank), alpha)

    layers = "model.layers"
    terms = [
        term(f"{layers}.0.self_attn.q_proj", 2, 8.0), term(f"{layers}.1.self_attn.q_proj", 4, 8.0),
        term(f"{layers}.0.mlp.up_proj", 2, 4.0), term(f"{layers}.1.mlp.up_proj", 2, 4.0),
        term(f"{layers}.0.mlp.down_proj", 2, 8.0),
    ]  # fmt: skip
    table = adapter_config(terms, Base("x", None), 2)
    assert (table["r"], table["lora_alpha"]) == (2, 8.0)
    assert table["rank_pattern"] == {
        r"model\.layers\.0\.self_attn\.q_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 4,
    }  # fmt: skip
    assert table["alpha_pattern"] == {"up_proj": 4.0}
    assert table["target_modules"] == [term.name for term in terms], "one layer has no term on down_proj"


def test_a_base_from_the_hub_has_its_name_there() -> None:
    commit = "a" * 40
    folder = Path(f"/cache/models--Qwen--Qwen2.5-0.5B/snapshots/{commit}")
    assert find_base(folder, published=True) == Base("Qwen/Qwen2.5-0.5B", commit)
    local = Path("/models/base")
    assert find_base(local, published=False) == Base(str(local), None)
    assert find_base(local, published=True) == Base("base", None)
    cfg = config(start=f"hf:{folder}", tokenizer=f"hf:{folder}", corpus=f"file:{local}")
    text = without_folders(f"{cfg.start} {cfg.corpus}", cfg)
    assert text == f"hf:Qwen/Qwen2.5-0.5B@{commit} file:base"


# -- the start of the run


def change_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def commands_on(run: RunDir, folder: Path) -> dict[str, list[object]]:
    """Return the command lines that load the model of a run."""
    questions = folder / "questions.jsonl"
    questions.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    return {
        "export": ["hub", "export", run.path, folder / "x"],
        "adapter": ["hub", "export", run.path, folder / "y", "--adapter"],
        "eval": ["eval", run.path, "--choices", questions],
        "sample": ["sample", run.path, "--prompt", "a"],
    }


def test_a_changed_or_missing_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = copy_of(bases["tied"], tmp_path / "base")
    run = trained(tmp_path / "runs", **from_base(base, **FROZEN))
    change_a_bit(base / "model.safetensors")
    for name, command in commands_on(run, tmp_path).items():
        done = mainrun(*command)
        assert done.exit_code == 2, name
        assert f"the weights of start=hf:{base} have changed since {run.path} began" in done.stderr, name
        assert "restore them" in done.stderr, name
    base.rename(tmp_path / "moved")
    for name, command in commands_on(run, tmp_path).items():
        done = mainrun(*command)
        assert done.exit_code == 2, name
        assert f"{run.path} has a frozen base" in done.stderr and str(base) in done.stderr, name
        assert "restore the start" in done.stderr, name
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize("changes", [{}, {"attn_lora_rank": 2}], ids=["plain", "lora"])
def test_a_run_without_a_frozen_base_needs_no_start(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = copy_of(bases["tied"], tmp_path / "base")
    run = trained(tmp_path / "runs", **from_base(base, **changes))
    export_run(run, tmp_path / "before")
    base.rename(tmp_path / "moved")
    commands = commands_on(run, tmp_path)
    del commands["adapter"]
    for name, command in commands.items():
        done = mainrun(*command)
        assert done.exit_code == 0, (name, done.stderr)
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes(), file.name


def test_only_paths_are_shortened() -> None:
    dataset = f"hub:owner/data@{'a' * 40}#text"
    assert without_folders(dataset, config(corpus=dataset)) == dataset
    for kind, name in (("file", "a.csv#title"), ("mix", "a.toml")):
        cfg = config(corpus=f"{kind}:/secret/{name}")
        assert without_folders(cfg.corpus, cfg) == f"{kind}:{name}"
    cfg = config(start="run:/secret/runs/a-run")
    assert without_folders(cfg.start, cfg) == "run:a-run"


# -- refusals

WRONG: dict[str, Any] = {
    "norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "qkv_bias": False,
    "qk_norm": True, "attn_gate": True, "layer_scale": 0.5, "value_residual": True, "title_mask": True,
    "softcap": 30.0, "experts": 2, "unused_ids": 3, "value_shortcut": True, "x0_shortcut": True, "unet": True,
    "case": "marked",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_field_that_qwen2_cannot_express_is_named(name: str) -> None:
    (reason,) = inexpressible(config(**{name: WRONG[name]}))
    assert reason.startswith(f"{name}={str(WRONG[name]).lower().removesuffix('.0')} (must be ")


def test_partly_rotated_heads_are_named() -> None:
    reasons = ["rope_share=0.5 (must be 1)", "key_shift=true (must be false)"]
    assert inexpressible(config(rope_share=0.5, key_shift=True)) == reasons


def test_biases_of_q_k_and_v_follow_bias() -> None:
    reasons = inexpressible(config(qkv_bias=None))
    assert reasons == ["qkv_bias=false (must be true)"]
    assert inexpressible(config()) == []


def test_all_reasons_are_given_at_once(run_with: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        export_run(run_with(**WRONG), tmp_path / "x")
    for name in WRONG:
        assert f" {name}=" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_model_that_grew_is_exported(run_with: Trained, tmp_path: Path) -> None:
    growth = {"ops": [{"name": "stack_layers", "value": [0, 0, 1, 1], "trigger": {"step": 2}}]}
    run = run_with(max_steps=0, growth=growth)
    export_run(run, tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["num_hidden_layers"] == 4
    idx = some_ids(400)
    assert (transformers_logits(tmp_path / "x", idx) - our_logits(run, idx)).abs().max() <= 1e-5


def test_the_reasons_against_each_checkpoint_are_given(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs")
    places = list((run.path / "checkpoints").iterdir())
    for place in places:
        (place / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError) as error:
        export_run(run, tmp_path / "x")
    for place in places:
        assert f"checkpoint {place} is skipped: state.safetensors is " in str(error.value)
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(RunError, match=r"no usable checkpoint \(it has none\)"):
        export_run(run, tmp_path / "x")


# -- the folder


def test_a_folder_with_files_is_refused(run_with: Trained, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        export_run(run_with(**GQA), tmp_path / "x")
    with pytest.raises(UsageError, match="is not a folder"):
        export_run(run_with(**GQA), tmp_path / "x" / "mine")
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "mine"]


def test_an_empty_folder_is_used(run_with: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir(mode=0o750)
    before = folder.stat()
    export_run(run_with(**GQA), folder)
    after = folder.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode), "it is the same folder"
    assert (folder / "config.json").is_file() and [folder] == list(tmp_path.iterdir())


def test_an_error_while_files_are_moved_leaves_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    move = shutil.move

    def move_some(file: Path, target: Path) -> None:
        if file.name == "config.json":
            raise OSError(5, "Input/output error")
        move(file, target)

    def export_two_files() -> None:
        with exporting.new_folder(folder) as temp:
            (temp / "config.json").write_text("{}")
            (temp / "model.safetensors").write_text("x")

    monkeypatch.setattr(shutil, "move", move_some)
    with pytest.raises(RunError, match="Input/output error"):
        export_two_files()
    assert list(tmp_path.rglob("*")) == [folder]


def test_the_folders_of_killed_exports_are_removed_after_a_day(tmp_path: Path) -> None:
    old = tmp_path / ".mainrun-export-old"
    young = tmp_path / ".mainrun-export-young"
    mine = tmp_path / "mine"
    for folder in (old, young, mine):
        folder.mkdir()
        (folder / "model.safetensors").write_text("x")
    yesterday = time.time() - 86_500
    for folder in (old, mine):
        os.utime(folder, (yesterday, yesterday))
    with exporting.new_folder(tmp_path / "x") as temp:
        (temp / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, "mine", "x"}


def test_an_export_that_fails_leaves_nothing(
    run_with: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qwen2_export, "write_routing", full)
    with pytest.raises(DiskFull, match=r"no space left .*; free some space and run the same command again$"):
        export_run(run_with(**GQA), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_files_of_another_process_are_not_overwritten(tmp_path: Path) -> None:
    def export_late() -> None:
        with exporting.new_folder(tmp_path / "x") as temp:
            (temp / "config.json").write_text("{}")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "theirs").write_text("keep")

    with pytest.raises(UsageError, match="is not empty"):
        export_late()
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "theirs"]


def test_the_same_run_gives_the_same_bytes(run_with: Trained, exported: Exported, tmp_path: Path) -> None:
    export_run(run_with(**ROUTED), tmp_path / "x")
    for file in exported(**ROUTED).iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes(), file.name


# -- README.md


def test_the_readme_has_scores_coverage_guards_and_fingerprints(
    run_with: Trained, exported: Exported
) -> None:
    run = run_with(**GQA)
    readme = (exported(**GQA) / "README.md").read_text()
    summary = run.summary()
    assert summary is not None
    last = summary["scores"]["val"]["last"]
    row = f"| val | {last['full']:.6f} | {last['official']:.6f} | {last['loss']:.6f} |"
    assert row in readme and f"| {last['coverage']:.6f} | {last['tokens']} |" in readme
    assert summary["guards"]
    for guard in summary["guards"]:
        assert f"| {guard['name']} | {guard['status']} | " in readme
    fingerprints = [*summary["fingerprints"].values(), summary["tokenizer"], summary["weights"]]
    for fingerprint in [*fingerprints, run.config().digest]:
        assert fingerprint in readme


def test_the_readme_names_no_folder(tmp_path: Path) -> None:
    titles = tmp_path / "secret-folder" / "titles.txt"
    titles.parent.mkdir()
    titles.write_text("\n".join(f"Title {i} about {i * i} things" for i in range(400)))
    run = trained(tmp_path / "runs", corpus=f"file:{titles}", vocab_size=300)
    export_run(run, tmp_path / "x")
    for file in (tmp_path / "x").iterdir():
        assert b"secret-folder" not in file.read_bytes(), file.name
    assert "| corpus | file:titles.txt |" in (tmp_path / "x" / "README.md").read_text()


def changed_weights(run: RunDir) -> None:
    """Change one weight of the newest checkpoint, which stays valid."""
    folder = max((run.path / "checkpoints").iterdir())
    tensors = load_file(folder / "state.safetensors")
    tensors["model/norm.weight"] += 1
    meta = json.loads((folder / "meta.json").read_text())
    del meta["meta_sha256"], meta["state_sha256"]
    checkpoint.save(folder.parent, meta["step"], tensors, meta)


def test_the_scores_of_other_weights_are_not_shown(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", checkpoint_every=1, eval_interval=1)
    changed_weights(run)
    export_run(run, tmp_path / "x")
    readme = (tmp_path / "x" / "README.md").read_text()
    summary = run.summary()
    assert summary is not None and summary["weights"] not in readme
    reason = "because these weights differ from those that were scored."
    assert f"There are no scores for the weights of step 4, {reason}" in readme
    assert f"The guards have not checked these weights, {reason}" in readme
    assert "| val |" not in readme and "not finished" not in readme
    # an older checkpoint
    shutil.rmtree(max((run.path / "checkpoints").iterdir()))
    export_run(run, tmp_path / "y")
    readme = (tmp_path / "y" / "README.md").read_text()
    assert f"There are no scores for the weights of step 3, {reason}" in readme and "| val |" not in readme


def test_the_readme_of_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", eval_interval=1)
    (run.path / "summary.json").unlink()
    export_run(run, tmp_path / "x")
    readme = (tmp_path / "x" / "README.md").read_text()
    reason = "because the run is not finished."
    assert f"There are no scores for the weights of step 4, {reason}" in readme and "| val |" not in readme
    assert f"The guards have not checked these weights, {reason}" in readme


# -- the command


def mainrun(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_exports_a_run(run_with: Trained, exported: Exported, tmp_path: Path) -> None:
    run = run_with(**GQA)
    done = subprocess.run(
        [sys.executable, "-m", "mainrun", "hub", "export", run.path.name[:-2], tmp_path / "x", "--out", "."],
        capture_output=True, text=True, cwd=run.path.parent, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'x'}\n"), done.stderr
    for file in exported(**GQA).iterdir():
        assert (tmp_path / "x" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bad_input_ends_with_one_line(run_with: Trained, tmp_path: Path) -> None:
    run = run_with(**GQA)
    (tmp_path / "mine").write_text("keep")
    for arguments in (
        [run.path, tmp_path],
        [tmp_path / "none", tmp_path / "x"],
        [run.path, tmp_path / "x", "--dtype", "int8"],
        [run.path, tmp_path / "x", "--adapter"],
    ):
        done = mainrun("hub", "export", *arguments)
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert not (tmp_path / "x").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        export_run(RunDir(tmp_path), tmp_path / "x")
