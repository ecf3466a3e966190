#!/usr/bin/env bash
# SPACE on 8 of the quickstart's scenes: learning rate 0.002 for the foreground, 0.001 for the background, falling to 0
# over the run. Prints the image error of five checkpoints. Recorded with 500 steps: 0.0403, 0.0193, 0.0082, 0.0048 and
# 0.0042 (at 500; of the background alone 0.085), short of the aim of 0.001; all 64 cells are present still, and the
# foreground paints the black ground too. About 5 minutes on one idle core.
# Usage: runs/overfit_space.sh [OUT] [STEPS]
set -euo pipefail
out=${1:-out/overfit-space}
steps=${2:-500}
ssdir data mnist-scenes quickstart --out "$out/data" --n-train 8 --n-val 0 --n-test 0
ssdir train space quickstart --data "$out/data" --out "$out/space" --resume \
    --model.foreground-lr-scale 2 --model.schedule.background-only-steps 40 \
    --model.schedule.presence-prior.end 0.05 --model.schedule.presence-prior.first 0 \
    --model.schedule.presence-prior.last 300 \
    --model.schedule.temperature.start 1.5 --model.schedule.temperature.last 150 \
    --training.learning-rate 0.001 --training.steps "$steps" --training.log-every 10 \
    --training.checkpoint-every "$((steps / 5))" --training.keep-checkpoints 9
python - "$out" <<'END'
import sys
from pathlib import Path

from ssdir.data.cache import CachedDataset
from ssdir.baselines.space.model import SPACE

out = Path(sys.argv[1])
images = CachedDataset(out / "data", "train", 128).batch(range(8)).images
for folder in sorted((out / "space" / "checkpoints").iterdir()):
    model = SPACE.from_pretrained(folder)
    error = (model.reconstruct(images) - images).square().mean().item()
    black = (model.background(images) - images).square().mean().item()
    objects = len(model.infer(images)) / len(images)
    print(f"{folder.name}: image error {error:.5f}, of the background alone {black:.4f}; {objects:.1f} objects an image")
END
