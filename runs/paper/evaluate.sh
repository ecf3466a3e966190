#!/usr/bin/env bash
# All figures of one model: runs/paper/evaluate.sh MODEL mnist|clevr|wider [OPTIONS...]
# OPTIONS go to ssdir evaluate: --limit 500, --nms none.
set -euo pipefail
source "$(dirname "$0")/settings"
model=$1 dataset=$2
shift 2
data=(--data "$out/$dataset/data")
if [[ $dataset == clevr ]]; then data=(--data "$out/clevr/test" --probe-data "$out/clevr/data"); fi
ssdir evaluate "$out/$dataset/$model" "${data[@]}" --out "$out/$dataset/evaluation-$model" "${device[@]}" "$@"
