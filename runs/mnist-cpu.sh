#!/usr/bin/env bash
# Full size on a CPU: does the mnist preset learn, and how long is a step? 400 scenes, 300 + 60 steps of 8 images;
# about 20 minutes on 2 cores. Not a result: that is runs/paper/train.sh ssdir mnist. Usage: runs/mnist-cpu.sh [OUT]
set -euo pipefail
out=${1:-out/mnist-cpu}
ssdir data mnist-scenes main --out "$out/data" --n-train 300 --n-val 100 --n-test 0
ssdir train detector mnist --data "$out/data" --out "$out/detector" --resume \
    --training.batch-size 8 --training.steps 300 --training.warmup-steps 30 \
    --training.log-every 10 --training.validate-every 100 --training.validation-images 100
ssdir train ssdir mnist --data "$out/data" --detector "$out/detector" --out "$out/ssdir" --resume \
    --training.batch-size 8 --training.steps 60 --training.warmup-steps 10 \
    --training.log-every 5 --training.validate-every 30 --training.validation-images 50
