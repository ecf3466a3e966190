#!/usr/bin/env bash
# The small weights that ship in the package: the quickstart's networks, trained longer, on all of MNIST's train digits.
# About an hour on 2 cores. Usage: runs/pretrained.sh [MNIST_FOLDER] [OUT]
set -euo pipefail
digits=${1:-data/mnist}
out=${2:-out/pretrained}
ssdir data mnist-scenes quickstart --out "$out/data" --digits "$digits" --download \
    --n-train 40000 --n-val 500 --n-test 1000
ssdir train detector quickstart --data "$out/data" --out "$out/detector" \
    --training.steps 2500 --training.warmup-steps 250 --training.weight-decay 0.03 --training.ema-decay 0.998 \
    --training.validate-every 500 --training.checkpoint-every 500
