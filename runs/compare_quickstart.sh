#!/usr/bin/env bash
# Every model on the quickstart's scenes with as much time: 20 minutes of one core each, counting the detector
# that a model stands on. Steps are chosen by the speed measured on one core of an Intel Xeon (Sapphire Rapids).
# About two hours on one core, one on two (PART=1 and PART=2 train one half each; then PART=table).
# Usage: [PART=1|2|table] runs/compare_quickstart.sh [OUT]
set -euo pipefail
out=${1:-out/compare-quickstart}
part=${PART:-all}
export OMP_NUM_THREADS=1
watch=(--training.validate-every 100 --training.validation-images 100 --training.checkpoint-every 200)
ssdir data mnist-scenes quickstart --out "$out/data"
train() { # KIND NAME OPTIONS...
    ssdir train "$1" quickstart --data "$out/data" --out "$out/$2" --resume "${watch[@]}" "${@:3}"
}
if [[ $part == all || $part == 1 ]]; then
    train detector detector
    train ssdir ssdir --detector "$out/detector" --training.steps 1800
    ssdir train ssdir quickstart-cells --data "$out/data" --detector "$out/detector" --teacher "$out/ssdir" --out "$out/cells" \
        --resume "${watch[@]}" --training.steps 1000
    train crop-vae crop-vae --detector "$out/detector" --training.steps 1500
fi
if [[ $part == all || $part == 2 ]]; then
    train spair spair --training.steps 2300
    train space space --training.steps 2000
    train slot-attention slot-attention --training.steps 4500
fi
if [[ $part == all || $part == table ]]; then
    ssdir compare --name "SSDIR, glimpses=$out/ssdir" "SSDIR, cells=$out/cells" "crop VAE=$out/crop-vae" \
        "SPAIR=$out/spair" "SPACE=$out/space" "Slot Attention=$out/slot-attention" \
        --true-boxes "$out/crop-vae" --data "$out/data" --out "$out/comparison"
fi
