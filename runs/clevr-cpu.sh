#!/usr/bin/env bash
# CLEVR on a CPU: learn on 700 rendered CLEVR-like scenes, report on official images. About 50 minutes of rendering and
# 45 of training on 2 cores (one thread each). OFFICIAL is a folder in the archive's layout; a part of it will do.
# Usage: runs/clevr-cpu.sh CLEVR_v1.0 [OUT]
set -euo pipefail
official=$1
out=${2:-out/clevr-cpu}
ssdir data clevr --root "$official" --out "$out/official" --skip-missing
ssdir data clevr-like --out "$out/like" --n-train 700 --n-val 60 --n-test 40 --samples 16 --seed 7
ssdir train detector clevr --data "$out/like" --out "$out/detector" --resume \
    --training.batch-size 8 --training.steps 700 --training.warmup-steps 50 \
    --training.log-every 10 --training.validate-every 100 --training.validation-images 60 --training.checkpoint-every 100
ssdir train ssdir clevr --data "$out/like" --detector "$out/detector" --out "$out/ssdir" --resume \
    --training.batch-size 8 --training.steps 900 --training.warmup-steps 50 --training.schedule cosine \
    --training.log-every 10 --training.validate-every 150 --training.validation-images 60 --training.checkpoint-every 100
ssdir evaluate "$out/ssdir" --data "$out/official" --probe-data "$out/like" --out "$out/evaluation"
