#!/usr/bin/env bash
# The small weights that ship in the package as `digits`: the quickstart's networks with a wider decoder, trained longer, on all
# of MNIST's train digits. About an hour on 2 cores. Usage: runs/pretrained.sh [MNIST_FOLDER] [OUT]
set -euo pipefail
digits=${1:-data/mnist}
out=${2:-out/pretrained}
ssdir data mnist-scenes quickstart --out "$out/data" --digits "$digits" --download \
    --n-train 40000 --n-val 500 --n-test 1000
ssdir train detector quickstart --data "$out/data" --out "$out/detector" --resume \
    --training.steps 2500 --training.learning-rate 0.006 --training.warmup-steps 250 --training.weight-decay 0.03 --training.ema-decay 0.998 \
    --training.validate-every 500 --training.checkpoint-every 500
ssdir train ssdir quickstart --data "$out/data" --detector "$out/detector" --out "$out/ssdir" --resume \
    --model.decoder-channels 64 64 32 16 --model.train-objects 256 --training.batch-size 20 --training.steps 3000 \
    --training.validate-every 1000 --training.checkpoint-every 250 --training.log-every 50
python "$(dirname "$0")/ship_weights.py" "$out/ssdir"
