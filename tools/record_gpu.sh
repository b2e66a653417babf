#!/usr/bin/env bash
# Measure the recipes of docs/log/recipe.md on 100,000 titles with one GPU, in stages of less than 15 minutes.
#
#     tools/record_gpu.sh STAGE TITLES [FOLDER]
#
# STAGE    probe | recipes | decay | confirm | confirm2 | members | members8 (see the end of this file)
# TITLES   a text file with one title per line
# FOLDER   the folder of the runs and results (default: record)
#
# The script stops after SECONDS_MAX (default 840) seconds and saves the run that is in progress. The same command
# then continues where the script stopped. After each run, FOLDER/results.tar.gz contains the configs, scores, logs
# and token scores of all runs so far, without their weights. MAINRUN names the program (default: mainrun), and
# EXTRA contains more options for every run, such as "--set num_titles=2000" to try the script on a CPU.
set -uo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] && [ $# -le 3 ] || usage
stage=$1 titles=$2 folder=${3:-record}
[ -f "$titles" ] || { echo "record_gpu.sh: got TITLES=$titles, which is not a file; give a text file with one title per line" >&2; exit 2; }

mainrun=${MAINRUN:-mainrun}
deadline=$((SECONDS + ${SECONDS_MAX:-840}))
mkdir -p "$folder/runs" || exit 2
unfinished=0

# Train one run, unless the time is up. Keep the results of an interrupted run too.
run() {
    local preset=$1 left=$((deadline - SECONDS)) status=0
    shift
    local sets=()
    for pair; do sets+=(--set "$pair"); done
    if [ "$left" -lt 30 ]; then
        echo "not started, because the time is up: $preset $*"
        unfinished=1
        return
    fi
    echo "=== $preset $* ($left s left)"
    # shellcheck disable=SC2086  # EXTRA contains several words
    timeout --signal=INT --kill-after=60 "$left" "$mainrun" train --preset "$preset" --out "$folder/runs" \
        --set "corpus=file:$titles" --set shuffle=false --set eval_per_epoch=1 --set token_scores=true \
        "${sets[@]}" ${EXTRA:-} || status=$?
    [ "$status" = 0 ] || unfinished=1
    [ "$status" = 0 ] || echo "=== $preset $*: exit status $status"
    keep
}

# Pack everything but the weights and the optimizer state.
keep() {
    tar -czf "$folder/results.tar.gz.part" -C "$folder" --exclude='*.safetensors' --exclude=.store runs &&
        mv "$folder/results.tar.gz.part" "$folder/results.tar.gz"
}

