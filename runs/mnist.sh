#!/usr/bin/env bash
# The paper's MNIST column at full size: 50,000 scenes of 512 px, VGG11-BN at 300 px, 880 boxes.
# Wants a GPU and about 8 GB of disk. Started again after an interruption, it goes on where it stopped.
# Usage: runs/mnist.sh [MNIST_FOLDER] [OUT]
set -euo pipefail
digits=${1:-data/mnist}
out=${2:-out/mnist}
ssdir data mnist-scenes main --out "$out/data" --digits "$digits" --download
ssdir train detector mnist --data "$out/data" --out "$out/detector" --resume
ssdir train ssdir mnist --data "$out/data" --detector "$out/detector" --out "$out/ssdir" --resume
ssdir evaluate "$out/ssdir" --data "$out/data" --out "$out/evaluation"
