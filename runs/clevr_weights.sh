#!/usr/bin/env bash
# The weights that ship in the package as `clevr`: learned on rendered CLEVR-like scenes by preset scenes, reported on official
# images where a folder in the archive's layout is given (a part of it will do). 1.7 s of one core render a scene; the trainings
# take about an hour on 2 cores. Usage: runs/clevr_weights.sh [CLEVR_v1.0] [OUT]
set -euo pipefail
official=${1:-}
out=${2:-out/clevr}
ssdir data clevr-like --out "$out/scenes" --n-train 3000 --n-val 120 --n-test 0 --width 192 --height 128 --samples 8 --masks --seed 11
ssdir train detector scenes --data "$out/scenes" --out "$out/detector" --resume
ssdir train ssdir scenes --data "$out/scenes" --detector "$out/detector" --out "$out/ssdir" --resume
python "$(dirname "$0")/ship_weights.py" "$out/ssdir" src/ssdir/weights/clevr
if [ -n "$official" ]; then
    ssdir data clevr --root "$official" --out "$out/official" --skip-missing --masks
    ssdir evaluate "$out/ssdir" --data "$out/official" --probe-data "$out/scenes" --out "$out/evaluation"
fi
