#!/usr/bin/env bash
# CLEVR on a CPU: learn on 700 rendered CLEVR-like scenes, report on official images. On 2 cores: 50 minutes of rendering,
# then on one core each 16 minutes of the detector (preset clevr, VGG11 at 300 px), and about 20 of SSDIR on top of
# it (preset small: a few hundred scenes are too few for the paper's settings). OFFICIAL is a folder in the archive's layout;
# a part of it will do.
# Usage: runs/clevr-cpu.sh CLEVR_v1.0 [OUT]
set -euo pipefail
official=$1
out=${2:-out/clevr-cpu}
ssdir data clevr --root "$official" --out "$out/official" --skip-missing
ssdir data clevr-like --out "$out/like" --n-train 700 --n-val 60 --n-test 40 --samples 16 --seed 7
ssdir train detector clevr --data "$out/like" --out "$out/detector" --resume \
    --training.batch-size 8 --training.steps 700 --training.warmup-steps 50 \
    --training.log-every 10 --training.validate-every 100 --training.validation-images 60 --training.checkpoint-every 100
ssdir train ssdir small --data "$out/like" --detector "$out/detector" --out "$out/ssdir" --resume \
    --training.batch-size 8 --training.steps 800 \
    --training.log-every 20 --training.validate-every 200 --training.validation-images 60 --training.checkpoint-every 100
ssdir evaluate "$out/detector" --data "$out/official" --out "$out/evaluation-detector"
ssdir evaluate "$out/ssdir" --data "$out/official" --probe-data "$out/like" --out "$out/evaluation"
