#!/usr/bin/env bash
# "Additional reconstructions": three images, of each the rows SSDIR, SPAIR and SPACE with every box that fires and six
# objects. Usage: runs/paper/sheet.sh mnist|clevr|wider [OPTIONS...], such as --pick various or --pick 3,17,42
set -euo pipefail
source "$(dirname "$0")/settings"
dataset=$1
shift
data=$out/$dataset/data
if [[ $dataset == clevr ]]; then data=$out/clevr/test; fi
ssdir compare "$out/$dataset/ssdir" "$out/$dataset/spair" "$out/$dataset/space" --data "$data" \
    --out "$out/$dataset/sheet" --only-sheet "${sheet[@]}" --pick first --nms none "${device[@]}" "$@"
