#!/usr/bin/env bash
# Compare record, optimized and strong:large on 100,000 titles, in stages of less than 15 minutes on one GPU.
#
#     TITLES=FILE tools/record_gpu.sh STAGE [ARCHIVE ...]
#
# STAGE      probe      time 20 steps of each recipe
#            recipes    record, optimized (weight_decay=0.03), and strong with two vocabularies; then the better
#                       vocabulary with more R-Drop and dropout
#            decay      strong with two other weight decays, with fewer layers, and with a larger width and
#                       more R-Drop
#            confirm    record and strong on all of train, with the seeds 1 and 2
#            confirm2   the same with the seeds 3 and 1337
#            members    four members of strong
#            members8   eight members of strong without R-Drop
# ARCHIVE    results of earlier sessions, whose finished runs are not trained again
#
# TITLES     a text file with one title per line
# OUT        the folder of the results (default: runs/record-results). After each run, it gets an archive with all
#            finished runs of this session: configs, scores, logs and token scores, but no checkpoints.
# WORK       the folder of the runs themselves (default: runs/record)
# BEST       settings of strong that an earlier stage has chosen, such as "vocab_size=2000 dropout=0.25"
# VOCABS     the vocabularies of strong in the stages probe and recipes (default: "1000 2000")
# EXTRA      settings of all runs, such as "num_titles=2000 d_model=64" to try the script on a CPU
# STRONG     the preset that is called strong above, or a file (default: strong:large)
# PYTHON     the interpreter that has torch and the packages of mainrun (default: python3)
# SECONDS_MAX  start no run after this time, and stop the run in progress (default: 840). With 0, the script only
#            checks and lists the runs of the stage.
set -uo pipefail

die() { echo "record_gpu.sh: $1" >&2; exit 2; }

# -- one run

# Print the id of a run, which depends on all fields of its config.
run_id() {
    local answer
    answer=$("$python" -c 'import sys; from mainrun.plan.recipes import load
print(load(sys.argv[1], sys.argv[2:])[0].run_id)' "$@" 2>&1) || die "$1: ${answer##*Error: }"
    echo "$answer"
}

finished() { [ -f "runs/$1/summary.json" ]; }

seconds_left() { echo $((deadline - SECONDS)); }

# Train a run unless it is finished. Its id is then in `id`.
run() {
    local preset=$1 status=0
    shift
    # shellcheck disable=SC2206  # these variables contain several words
    local settings=($common "$@" ${EXTRA:-})
    id=$(run_id "$preset" "${settings[@]}") || exit 2
    if finished "$id"; then
        echo "=== $id is already finished: $preset $*"
        [[ " ${ids[*]} " == *" $id "* ]] || ids+=("$id") # EXTRA can make two runs of a stage equal
        return
    fi
    if [ "$seconds_max" = 0 ]; then
        echo "=== $id would be trained: $preset $*"
        return
    fi
    if [ "$(seconds_left)" -lt 30 ]; then
        echo "=== $id is not started, because the time is up: $preset $*"
        unfinished=1
        return
    fi
    echo "=== $id ($(seconds_left) s left): $preset $*"
    timeout --signal=INT --kill-after=60 "$(seconds_left)" "$python" -m mainrun train --preset "$preset" \
        "${settings[@]/#/--set=}" --out runs --no-store --json >/dev/null || status=$?
    if [ "$status" != 0 ]; then
        echo "=== $id is not finished (exit code $status)"
        unfinished=1
        return
    fi
    ids+=("$id")
    trained+=("runs/$id")
    tar -czf "$archive.part" --exclude=checkpoints --exclude=.lock "${trained[@]}" && mv "$archive.part" "$archive"
}

# Train a run of the preset strong.
strong() {
    # shellcheck disable=SC2086  # BEST contains several words
    run "$preset_strong" ${BEST:-} "$@"
}

# -- settings that follow from numbers

# Print the weight decay of strong whose time constant is the given number of epochs.
decay_of() {
    # shellcheck disable=SC2206
    local settings=($common ${BEST:-} ${EXTRA:-})
    "$python" -m mainrun train --preset "$preset_strong" "${settings[@]/#/--set=}" --dry-run --no-store --json |
        "$python" -c 'import json, sys; from mainrun.plan.recipes import load
lr = load(sys.argv[2], sys.argv[3:])[0].lr
steps = json.load(sys.stdin)["plan"]["steps_per_epoch"]
print(f"{1 / (lr * float(sys.argv[1]) * steps):.4g}")' "$1" "$preset_strong" "${settings[@]}"
}

# Train a run of strong whose weight decay has the given time constant in epochs.
strong_with_decay() {
    local decay
    if [ "$seconds_max" = 0 ]; then
        echo "=== a run would be trained: strong with a weight decay of $1 epochs"
        return
    fi
    if [ "$(seconds_left)" -lt 30 ]; then
        echo "=== not started, because the time is up: strong with a weight decay of $1 epochs"
        unfinished=1
        return
    fi
    decay=$(decay_of "$1") || die "strong: its steps cannot be counted"
    strong "weight_decay=$decay"
}

# Print the vocabulary of the run with the lowest score on dev.
better_vocabulary() {
    "$python" -c 'import json, pathlib, sys
def read(run, name): return json.loads(pathlib.Path("runs", run, name).read_text())
best = min(sys.argv[1:], key=lambda run: read(run, "summary.json")["scores"]["dev"]["last"]["full"])
print(read(best, "config.json")["config"]["vocab_size"])' "$@"
}

# -- the stages

probe() {
    common+=" dev_frac=0.05 max_steps=40 eval_interval=20" # the second 20 steps are timed
    run record
    run optimized weight_decay=0.03
    for size in $vocabularies; do strong "vocab_size=$size"; done
    strong n_layer=8
    strong d_model=640 n_head=10 rdrop=4
    strong members=4
    strong members=8 rdrop=0
}

recipes() {
    local runs=()
    common+=" dev_frac=0.05 eval_per_epoch=1"
    run record
    run optimized weight_decay=0.03
    for size in $vocabularies; do
        strong "vocab_size=$size"
        finished "$id" && runs+=("$id")
    done
    # shellcheck disable=SC2086
    set -- $vocabularies
    if [ "${#runs[@]}" = $# ]; then
        strong "vocab_size=$(better_vocabulary "${runs[@]}")" rdrop=4 dropout=0.25
    fi
}

decay() {
    common+=" dev_frac=0.05 eval_per_epoch=1"
    strong_with_decay 1
    strong_with_decay 10
    strong n_layer=8
    strong d_model=640 n_head=10 rdrop=4
}

confirm() {
    common+=" eval_per_epoch=1"
    for seed in "$@"; do
        run record "seed=$seed"
        strong "seed=$seed"
    done
}

members() {
    common+=" dev_frac=0.05 eval_per_epoch=1"
    strong "$@"
}

# -- the table

show() {
    "$python" -m mainrun compare "${ids[@]}" --out runs --costs
    "$python" -c 'import json, pathlib, statistics, sys
for name in sys.argv[1:]:
    run = pathlib.Path("runs", name)
    config = json.loads((run / "config.json").read_text())
    dev = json.loads((run / "summary.json").read_text())["scores"].get("dev")
    score = "full on dev {:.4f}, ".format(dev["last"]["full"]) if dev else ""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seconds = [row["seconds"] for row in rows if row["event"] == "step"]
    step = statistics.median(seconds[len(seconds) // 2 :])
    steps = config["config"]["epochs"] * config["plan"]["steps_per_epoch"]
    print(f"{name}: {score}{1e3 * step:.2f} ms per step, {steps * step:,.0f} s for {steps:,} steps of all epochs")
' "${ids[@]}"
}

# -- the script

[ $# -ge 1 ] || { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0" >&2; exit 2; }
stage=$1
shift
case $stage in
probe | recipes | decay) command=("$stage") ;;
confirm) command=(confirm 1 2) ;;
confirm2) command=(confirm 3 1337) ;;
members) command=(members members=4) ;;
members8) command=(members members=8 rdrop=0) ;;
*) die "got STAGE=$stage; use probe, recipes, decay, confirm, confirm2, members or members8" ;;
esac
[ -f "${TITLES:-}" ] || die "got TITLES=${TITLES:-}, which is not a file; give a text file with one title per line"

seconds_max=${SECONDS_MAX:-840}
[[ $seconds_max =~ ^[0-9]+$ ]] || die "got SECONDS_MAX=$seconds_max; give a number of seconds, such as 840"
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
out=${OUT:-runs/record-results} work=${WORK:-runs/record}
mkdir -p "$out" "$work/runs" || exit 2
archive=$(cd "$out" && pwd)/$stage-$(date +%Y%m%d-%H%M%S).tar.gz
for earlier; do tar -xzf "$earlier" -C "$work" || die "$earlier cannot be unpacked"; done
# the same relative path in each session, because the id of a run contains the path
ln -sf "$(realpath "$TITLES")" "$work/titles.txt"
preset_strong=${STRONG:-strong:large}
[ -f "$preset_strong" ] && preset_strong=$(realpath "$preset_strong")
cd "$work" || exit 2

deadline=$((SECONDS + seconds_max))
common="corpus=file:titles.txt num_titles=100000 shuffle=false token_scores=true checkpoint_every=1000000000"
vocabularies=${VOCABS:-1000 2000}
unfinished=0
ids=()     # the finished runs of the stage
trained=() # the folders of those that this session has trained
run_id "$preset_strong" ${BEST:-} ${EXTRA:-} >/dev/null || exit 2
"${command[@]}"
[ "${#ids[@]}" = 0 ] || show 2>&1 | tee "${archive%.tar.gz}.txt"
exit "$unfinished"
