#!/usr/bin/env bash
# The paper's CLEVR column at full size: 70,000 train scenes of the official archive, VGG11-BN at 300 px, 880 boxes.
# Wants a GPU and about 40 GB of disk beside the archive. All train scenes train, as in the paper: nothing is chosen, so
# that none are held out (--hold-out val=0.03 would). The official val scenes report; the test scenes are not annotated.
# Started again after an interruption, it goes on where it stopped.
# Usage: runs/clevr.sh CLEVR_v1.0 [OUT]
set -euo pipefail
root=$1
out=${2:-out/clevr}
ssdir data clevr --root "$root" --out "$out/train" --splits train
ssdir data clevr --root "$root" --out "$out/test" --splits val
ssdir train detector clevr --data "$out/train" --out "$out/detector" --resume
ssdir train ssdir clevr --data "$out/train" --detector "$out/detector" --out "$out/ssdir" --resume
ssdir evaluate "$out/ssdir" --data "$out/test" --probe-data "$out/train" --out "$out/evaluation"
