#!/usr/bin/env bash
# The paper's MNIST column at full size: 50,000 scenes of 512 px, VGG11-BN at 300 px, 880 boxes.
# Wants a GPU. About 6 GB of disk. Usage: runs/mnist.sh [MNIST_FOLDER] [OUT]
set -euo pipefail
digits=${1:-data/mnist}
out=${2:-out/mnist}
ssdir data mnist-scenes main --out "$out/data" --digits "$digits" --download
ssdir train detector mnist --data "$out/data" --out "$out/detector"
ssdir train ssdir mnist --data "$out/data" --detector "$out/detector" --out "$out/ssdir"
ssdir evaluate "$out/ssdir" --data "$out/data" --out "$out/evaluation"
