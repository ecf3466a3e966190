#!/usr/bin/env bash
# The ablation: all 45 combinations of the generator's table. Usage: runs/paper/ablation.sh [full|small] [OPTIONS...]
# SCALE small: 128 px scenes and small networks, for a CPU. Given again, it goes on; several calls share the work.
set -euo pipefail
source "$(dirname "$0")/settings"
scale=${1:-full}
shift || true
ssdir ablate --data-root "$out/ablation" --scale "$scale" "$@"
