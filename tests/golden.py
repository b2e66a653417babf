"""Record the exact results of small runs of every kind. test_golden.py fails if a result changes by one bit.

    python tests/golden.py              # record all cases on this kind of machine
    python tests/golden.py --add        # record new cases only; then run --check
    python tests/golden.py --check      # train all cases again and list those that differ

A record is valid for one machine class and one set of library versions, because the exact results depend on
the processor and the version of torch. Record results only from a commit that is known to be correct, and
never to make a failing test pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

FILE = Path(__file__).parent / "data" / "golden.jsonl"
SIZE: dict[str, Any] = {
    "num_titles": 300,
    "vocab_size": 400,
    "block_size": 16,
    "batch_size": 8,
    "epochs": 1,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 32,
    "threads": 1,
    "device": "cpu",
    "compile": "off",
    "eval_per_epoch": 2,
    "dev_frac": 0.1,
    "official_geometry": "8x16",
}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}
MUON: dict[str, Any] = {"optimizer": "muon", "lr": 0.02, "lr_aux": 0.01, "weight_decay": 0.1}
MODERN: dict[str, Any] = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
    "attn_gate": True,
    "layer_scale": 0.3,
    "value_residual": True,
    "tie_head": False,
    "softcap": 8.0,
    "n_kv_head": 1,
    "title_mask": True,
    "init_depth_scaled": True,
}
WITHOUT_GATES: dict[str, Any] = {
    "attn_gate": False,
    "layer_scale": 0.0,
    "value_residual": False,
    "case": "kept",
}
GROWN_AT_HALF: dict[str, Any] = {
    "growth": {
        "version": 2,
        "ops": [
            {
                "name": "stack_layers",
                "value": [0, 0, 1, 1],
                "init": "identity",
                "trigger": {"budget_frac": 0.5},
            }
        ],
    }
}
SHORTCUTS: dict[str, Any] = {
    "value_shortcut": True,
    "x0_shortcut": True,
    "unet": True,
    "rope_share": 0.5,
    "key_shift": True,
}


def grow(name: str, value: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "trigger": {"step": 7}} | more


def growing(*ops: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return ADAMW | fields | {"growth": {"version": 2, "ops": list(ops)}}


# Each case has a preset and changed fields. The fast suite trains only the cases in FAST.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "preset baseline": ("baseline", {}),
    "preset ablation:vocabulary": ("ablation:vocabulary", {}),
    "preset optimized": ("optimized", {}),
    "preset grown": ("grown", {}),
    "preset demo:baseline": ("demo:baseline", {}),
    "preset demo:optimized": ("demo:optimized", {}),
    "preset demo-grown": ("demo-grown", {}),
    "preset demo:optimized without gates and marked capitals": ("demo:optimized", WITHOUT_GATES),
    "preset demo-grown without gates and marked capitals": ("demo-grown", WITHOUT_GATES | GROWN_AT_HALF),
    "preset staged-demo": ("staged-demo", {"n_layer": 12, "num_titles": 210}),
    "sgd with momentum": ("baseline", {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": ("baseline", ADAMW),
    "adamw, modern blocks": ("baseline", ADAMW | MODERN),
    "adamw, bfloat16": ("baseline", ADAMW | {"dtype": "bfloat16"}),
    "muon": ("baseline", MUON),
    "muon, modern blocks, bfloat16": ("baseline", MUON | MODERN | {"dtype": "bfloat16"}),
    "relu2, untied, plain attention": (
        "baseline",
        ADAMW | {"mlp": "relu2", "tie_head": False, "attention": "plain"},
    ),
    "attention by sdpa": ("baseline", ADAMW | {"attention": "sdpa", "attn_dropout": 0.0, "dropout": 0.1}),
    "no dropout": ("baseline", ADAMW | {"dropout": 0.0}),
    "dropout of attention alone": ("baseline", ADAMW | {"dropout": 0.0, "attn_dropout": 0.2}),
    "dropout of the residual alone": ("baseline", ADAMW | {"dropout": 0.0, "resid_dropout": 0.2}),
    "rdrop": ("baseline", ADAMW | {"rdrop": 0.5, "dropout": 0.1, "label_smoothing": 0.1}),
    "stochastic depth and rdrop, bfloat16": (
        "baseline",
        MUON | {"dropout": 0.0, "stochastic_depth": 0.3, "rdrop": 0.5, "dtype": "bfloat16"},
    ),
    "cautious decay, he initialisation": (
        "baseline",
        ADAMW | {"cautious_decay": True, "init": "kaiming", "init_depth_scaled": True},
    ),
    "cautious decay, two weight decays, muon": (
        "baseline",
        MUON | {"cautious_decay": True, "weight_decay_aux": 0.5, "wd_schedule": "linear"},
    ),
    "ema": ("baseline", ADAMW | {"ema": 0.9}),
    "swa": ("baseline", ADAMW | {"swa": 0.4}),
    "mixture with an n-gram model": ("baseline", ADAMW | {"ngram": 4}),
    "experts": ("baseline", ADAMW | {"experts": 3, "top_k": 2}),
    "experts, muon, softmax router": (
        "baseline",
        MUON | {"experts": 2, "top_k": 1, "router_weights": "softmax"},
    ),
    "members": ("baseline", MUON | {"members": 2, "dropout": 0.1, "rdrop": 0.5, "grad_accum": 2, "ema": 0.9}),
    "low rank": ("baseline", ADAMW | {"attn_lora_rank": 2, "embed_lora_rank": 2, "lora_alpha": 2.0}),
    "frozen layer": ("baseline", ADAMW | {"attn_lora_rank": 2, "frozen": [0]}),
    "accumulation": ("baseline", ADAMW | {"grad_accum": 4, "dropout": 0.1}),
    "wsd with warm-up": (
        "baseline",
        ADAMW
        | {
            "schedule": "wsd",
            "warmup_iters": 4,
            "decay_frac": 0.4,
            "decay_shape": "sqrt",
            "min_lr_frac": 0.1,
            "wd_schedule": "cosine",
        },
    ),
    "shuffled titles": ("baseline", ADAMW | {"order": "shuffle_titles", "epochs": 2}),
    "unigram tokenizer": (
        "baseline",
        ADAMW | {"tokenizer": "unigram", "tokenizer_fit": "train+val", "vocab_size": 380},
    ),
    "capitals as signs": (
        "baseline",
        ADAMW | {"tokenizer": "unigram", "case": "marked", "vocab_size": 380},
    ),
    "mix": ("baseline", ADAMW | {"corpus": "mix:mix.toml"}),
    "grow training values": (
        "baseline",
        growing(
            grow("set_lr", 0.005),
            grow("set_batch_size", 16, trigger={"step": 9}),
            grow("set_grad_accum", 2, trigger={"step": 11}),
            grow("set_weight_decay", 0.0, trigger={"step": 12}),
            grow("set_dropout", 0.1, trigger={"step": 13}),
            grow("reset_lr_schedule", trigger={"step": 15}),
        ),
    ),
    "grow stack_layers": ("baseline", growing(grow("stack_layers", [0, 0, 1], init="identity"))),
    "grow stack_layers, muon and ema": (
        "baseline",
        growing(grow("stack_layers", [0, 1, 1])) | MUON | {"ema": 0.9},
    ),
    "grow stack_layers, stochastic depth": (
        "baseline",
        growing(grow("stack_layers", [0, 0, 1]), stochastic_depth=0.2),
    ),
    "grow widen_mlp": ("baseline", growing(grow("widen_mlp", 160))),
    "grow widen_model": ("baseline", growing(grow("widen_model", {"factor": 2}))),
    "grow add_heads": ("baseline", growing(grow("add_heads", 4), head_dim=16)),
    "grow upcycle_moe": ("baseline", growing(grow("upcycle_moe", {"experts": 3, "top_k": 2}))),
    "grow adapters and merge them": (
        "baseline",
        growing(
            grow("set_attn_lora_rank", 4),
            grow("set_embedding_lora_rank", 4, trigger={"step": 9}),
            grow("merge_lora_weights", trigger={"step": 15}),
        ),
    ),
    "grow adapters of a frozen base": (
        "baseline",
        growing(
            grow("set_mlp_lora_rank", 4),
            attn_lora_rank=2,
            mlp_lora_rank=2,
            base_frozen=True,
            lr_lora=0.01,
            ema=0.9,
        ),
    ),
    "grow freeze_layer and unfreeze_layer": (
        "baseline",
        growing(grow("freeze_layer", [0]), grow("unfreeze_layer", [0], trigger={"step": 12})),
    ),
    "grow resize_vocabulary": ("baseline", growing(grow("resize_vocabulary", 420))),
    "grow when the loss says so": (
        "baseline",
        growing(
            grow("stack_layers", [0, 0, 1], init="identity", trigger={"loss_below": 100.0}),
            grow("widen_mlp", 160, trigger={"wait_iters": 5}),
        ),
    ),
    "routed by Mixture-of-Depths": ("baseline", ADAMW | {"block_pattern": "DM", "dropout": 0.1}),
    "routed by surprise pairs": ("ablation:vocabulary", {"block_pattern": "DS", "capacity": 0.25}),
    "routed by temporal surprise": ("ablation:vocabulary", {"block_pattern": "DT", "gate": "straight"}),
    "grow set_capacity": ("baseline", growing(grow("set_capacity", 0.25), block_pattern="DM")),
    "shortcuts": ("baseline", MUON | MODERN | SHORTCUTS | {"n_layer": 4, "dropout": 0.1}),
    "routed with shortcuts": (
        "baseline",
        ADAMW | {"position": "rope", "block_pattern": "DMDT"} | SHORTCUTS | {"n_layer": 4, "dropout": 0.1},
    ),
    "compiled, muon": ("baseline", MUON | {"compile": "on", "n_layer": 1, "dropout": 0.1}),
    "compiled, bfloat16": (
        "baseline",
        ADAMW | {"compile": "on", "n_layer": 1, "dtype": "bfloat16", "dropout": 0.1},
    ),
    "two processes": ("baseline", ADAMW | {"dropout": 0.1}),
}
FAST = (
    "preset baseline",
    "preset optimized",
    "preset grown",
    "preset demo-grown",
    "adamw",
    "adamw, modern blocks",
    "muon, modern blocks, bfloat16",
    "relu2, untied, plain attention",
    "attention by sdpa",
    "no dropout",
    "rdrop",
    "stochastic depth and rdrop, bfloat16",
    "cautious decay, two weight decays, muon",
    "ema",
    "swa",
    "mixture with an n-gram model",
    "experts",
    "members",
    "accumulation",
    "wsd with warm-up",
    "capitals as signs",
    "mix",
    "low rank",
    "frozen layer",
    "shortcuts",
    "routed by surprise pairs",
    "grow stack_layers",
    "grow widen_model",
    "grow upcycle_moe",
    "grow when the loss says so",
)


def arguments(name: str, out: Path) -> list[str]:
    preset, fields = CASES[name]
    sets = [part for key, value in (SIZE | fields).items() for part in ("--set", f"{key}={_to_toml(value)}")]
    return ["train", "--preset", preset, *sets, "--no-store", "--quiet", "--out", str(out)]


def _to_toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_mix(folder: Path) -> None:
    (folder / "mine.txt").write_text(
        "".join(f"a title of mine number {i} about kernel {i * i % 97}\n" for i in range(120))
    )
    (folder / "mix.toml").write_text(
        '[[source]]\npath = "mine.txt"\nratio = 1\nweight = 2\n[[source]]\ncorpus = "synthetic"\nratio = 2\n'
    )


def train(name: str, folder: Path) -> dict[str, Any]:
    """Train a case in the folder and return the losses, scores and other numbers to record."""
    write_mix(folder)
    out = folder / "runs"
    if name.startswith("two processes"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "mainrun",
        ]
        done = subprocess.run(
            [*command, *arguments(name, out)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    else:
        from mainrun.cli import app

        with contextlib.chdir(folder), contextlib.suppress(SystemExit):  # a failed run leaves no summary
            app(arguments(name, out))
    (run,) = (path.parent for path in out.glob("*/summary.json"))
    return numbers(run)


def numbers(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    scores = [
        [row["step"], row["split"], row["full"], row["official"]] for row in rows if row["event"] == "eval"
    ]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "loss": [row["loss"] for row in steps],
        "grad_norm": [row["grad_norm"] for row in steps],
        "scores": scores,
        "params": summary["params"],
        "tokenizer": summary["tokenizer"],
        "weights": summary["weights"],
    }


def machine_class() -> dict[str, Any]:
    """Return the processor and the library versions of this machine, which affect the exact results."""
    from importlib.metadata import version

    from mainrun.config import from_dict
    from mainrun.core.device import Device

    facts = Device(from_dict(SIZE | {"compile": "on"})).machine_class
    kept = {
        name: facts[name]
        for name in ("device", "instructions", "torch", "compiler", "limits")
        if name in facts
    }
    return kept | {name: version(name) for name in ("numpy", "tokenizers")}


def lines() -> list[dict[str, Any]]:
    """Return the lines of the record, one per case and machine class."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def record_for(machine: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded numbers of each case on a machine class."""
    return {line["case"]: line["numbers"] for line in lines() if line["machine"] == machine}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/golden.py",
        description="Record the results of small runs on this machine class, or check them.",
    )
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing one")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="train only the cases whose names contain TEXT"
    )
    parser.add_argument("--add", action="store_true", help="record only the cases that have no record yet")
    options = parser.parse_args()
    machine = machine_class()
    known = record_for(machine)
    names = [name for name in CASES if options.only in name]
    if options.add:
        names = [name for name in names if name not in known]
    with tempfile.TemporaryDirectory() as place:
        cases: dict[str, Any] = {}
        for i, name in enumerate(names):
            folder = Path(place) / str(i)
            folder.mkdir()
            cases[name] = train(name, folder)
            print(f"{name}: {cases[name]['weights'][:12]}", flush=True)
    if options.check or (options.only and not options.add):
        differ = [name for name, values in cases.items() if known.get(name) != values]
        print(f"{len(differ)} of {len(cases)} cases differ" + "".join(f"\n    {name}" for name in differ))
        return bool(differ)
    kept = [
        line for line in lines() if line["machine"] != machine or (options.add and line["case"] not in cases)
    ]
    new = [{"machine": machine, "case": name, "numbers": values} for name, values in cases.items()]
    FILE.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *new]))
    print(f"{len(cases)} cases are in {FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
