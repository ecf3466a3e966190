#!/usr/bin/env bash
# The paper's WIDER FACE column at full size: the official zips in ROOT, VGG11-BN at 300 px, 880 boxes. Wants a GPU.
# Started again after an interruption, it goes on where it stopped. Usage: runs/wider.sh ROOT [OUT]
set -euo pipefail
root=$1
out=${2:-out/wider}
ssdir data wider-face --root "$root" --out "$out/data"
ssdir train detector wider --data "$out/data" --out "$out/detector" --resume
ssdir train ssdir wider --data "$out/data" --detector "$out/detector" --out "$out/ssdir" --resume
ssdir evaluate "$out/ssdir" --data "$out/data" --out "$out/evaluation"
