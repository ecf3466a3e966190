#!/bin/sh
# The ablation study of docs/ablation.md at the small scale: all 45 combinations on a CPU with two cores.
# It may be stopped at any time; the same command goes on. Each of the two workers has one core.
set -eu
out=${1:-out/ablation}
export OMP_NUM_THREADS=1
ssdir ablate --data-root "$out" --scale small --workers 1 &
first=$!
ssdir ablate --data-root "$out" --scale small --workers 1
wait "$first"
