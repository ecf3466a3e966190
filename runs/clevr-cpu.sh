#!/usr/bin/env bash
# CLEVR on a CPU: learn on rendered CLEVR-like scenes, report on official images. 3.5 s of one core render a scene (3 hours for
# these 3,200); then the detector and SSDIR of preset scenes. OFFICIAL is a folder in the archive's layout; a part of it will do.
# Usage: runs/clevr-cpu.sh CLEVR_v1.0 [OUT]
set -euo pipefail
official=$1
out=${2:-out/clevr-cpu}
ssdir data clevr --root "$official" --out "$out/official" --skip-missing --masks
ssdir data clevr-like --out "$out/like" --n-train 3200 --n-val 200 --n-test 0 --width 240 --height 160 --samples 16 --masks --seed 11
ssdir train detector scenes --data "$out/like" --out "$out/detector" --resume
ssdir train ssdir scenes --data "$out/like" --detector "$out/detector" --out "$out/ssdir" --resume
ssdir evaluate "$out/detector" --data "$out/official" --out "$out/evaluation-detector"
ssdir evaluate "$out/ssdir" --data "$out/official" --probe-data "$out/like" --out "$out/evaluation"
