#!/usr/bin/env bash
# Slot Attention on 8 of the quickstart's scenes, learning rate 0.002. Prints the image error of five checkpoints.
# Recorded with 1500 steps: 0.0758, 0.0573, 0.0412, 0.0345 and 0.0334 (a black image: 0.0997), far from the aim of 0.001;
# nearly all of it is painted by the slot that counts as the background. About 5 minutes of one core.
# Usage: runs/overfit_slot_attention.sh [OUT] [STEPS]
set -euo pipefail
out=${1:-out/overfit-slot-attention}
steps=${2:-1500}
ssdir data mnist-scenes quickstart --out "$out/data" --n-train 8 --n-val 0 --n-test 0
ssdir train slot-attention quickstart --data "$out/data" --out "$out/slot-attention" --resume \
    --training.learning-rate 0.002 --training.batch-size 8 --training.steps "$steps" --training.warmup-steps 40 \
    --training.log-every 20 --training.checkpoint-every "$((steps / 5))" --training.keep-checkpoints 9
python - "$out" <<'END'
import sys
from pathlib import Path

from ssdir.data.cache import CachedDataset
from ssdir.baselines.slot_attention.model import SlotAttentionAutoencoder

out = Path(sys.argv[1])
images = CachedDataset(out / "data", "train", 128).batch(range(8)).images
for folder in sorted((out / "slot-attention" / "checkpoints").iterdir()):
    model = SlotAttentionAutoencoder.from_pretrained(folder)
    error = (model.reconstruct(images) - images).square().mean().item()
    black = (model.background(images) - images).square().mean().item()
    objects = len(model.infer(images)) / len(images)
    print(f"{folder.name}: image error {error:.5f}, of the background alone {black:.4f}; {objects:.1f} objects an image")
END
