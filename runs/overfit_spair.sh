#!/usr/bin/env bash
# SPAIR on 8 of the quickstart's scenes, learning rate 0.001. Prints the image error of every checkpoint. Recorded with 2,000
# steps: 0.0307, 0.0176, 0.0117, 0.0082,
# 0.0069, 0.0061, 0.0056, 0.0056, short of the aim of 0.001; 23.5 of 64 cells are present. About 8 minutes of one core.
# Usage: runs/overfit_spair.sh [OUT]
set -euo pipefail
out=${1:-out/overfit-spair}
ssdir data mnist-scenes quickstart --out "$out/data" --n-train 8 --n-val 0 --n-test 0
ssdir train spair quickstart --data "$out/data" --out "$out/spair" --resume \
    --training.learning-rate 0.001 --training.schedule cosine --training.warmup-steps 100 \
    --training.steps 2000 --training.batch-size 8 --training.log-every 20 \
    --training.checkpoint-every 250 --training.keep-checkpoints 9
python - "$out" <<'END'
import sys
from pathlib import Path

from ssdir.data.cache import CachedDataset
from ssdir.baselines.spair.model import SPAIR

out = Path(sys.argv[1])
images = CachedDataset(out / "data", "train", 128).batch(range(8)).images
for folder in sorted((out / "spair" / "checkpoints").iterdir()):
    model = SPAIR.from_pretrained(folder)
    error = (model.reconstruct(images) - images).square().mean().item()
    objects = len(model.infer(images)) / len(images)
    print(f"{folder.name}: image error {error:.5f}; {objects:.1f} objects an image")
END
