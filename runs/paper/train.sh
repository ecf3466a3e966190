#!/usr/bin/env bash
# A model of the sheets on a dataset: runs/paper/train.sh MODEL mnist|clevr|wider [OPTIONS...]
# MODEL: ssdir (with its detector, where there is none), detector, spair or space. OPTIONS go to its ssdir train. Given
# again, it goes on where it stopped; OPTIONS that a run began with hold.
set -euo pipefail
source "$(dirname "$0")/settings"
model=$1 dataset=$2
shift 2
train() { # MODEL OPTIONS...
    local run=$out/$dataset/$1
    if [[ -e $run ]]; then
        ssdir train "$1" --out "$run" --resume "${device[@]}"
    else
        ssdir train "$1" "$dataset" --data "$out/$dataset/data" --out "$run" "${device[@]}" "${@:2}"
    fi
}
case $model in
detector) train detector "${detector[@]}" "${training[@]}" "$@" ;;
spair) train spair "${spair[@]}" "${training[@]}" "$@" ;;
space) train space "${space[@]}" "${training[@]}" "$@" ;;
ssdir)
    train detector "${detector[@]}" "${training[@]}"
    train ssdir --detector "$out/$dataset/detector" "${training[@]}" "${ssdir[@]}" "$@"
    ;;
esac
