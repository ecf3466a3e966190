#!/usr/bin/env bash
# Per-object reconstructions and the downstream task: SSDIR, SPAIR and SPACE in one table, on the same images.
# Usage: runs/paper/downstream.sh mnist|clevr|wider [OPTIONS...], such as --limit 500
set -euo pipefail
source "$(dirname "$0")/settings"
dataset=$1
shift
data=(--data "$out/$dataset/data")
if [[ $dataset == clevr ]]; then data=(--data "$out/clevr/test" --probe-data "$out/clevr/data"); fi
ssdir compare "$out/$dataset/ssdir" "$out/$dataset/spair" "$out/$dataset/space" "${data[@]}" \
    --out "$out/$dataset/comparison" "${compare[@]}" "${device[@]}" "$@"
