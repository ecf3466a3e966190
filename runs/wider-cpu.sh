#!/usr/bin/env bash
# WIDER FACE on a CPU, on as few images as fit on a laptop: the detector of preset wider, SSDIR of preset small on top. 16 and
# 17 minutes on one core. ROOT holds the official archives, or unpacked folders.
# Usage: runs/wider-cpu.sh ROOT [OUT]
set -euo pipefail
root=$1
out=${2:-out/wider-cpu}
ssdir data wider-face --root "$root" --out "$out/data"
ssdir train detector wider --data "$out/data" --out "$out/detector" --resume \
    --training.batch-size 8 --training.steps 500 --training.warmup-steps 50 \
    --training.log-every 10 --training.validate-every 100 --training.checkpoint-every 100
ssdir train ssdir small --data "$out/data" --detector "$out/detector" --out "$out/ssdir" --resume \
    --training.batch-size 8 --training.steps 250 \
    --training.log-every 10 --training.validate-every 50 --training.checkpoint-every 100
