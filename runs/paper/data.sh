#!/usr/bin/env bash
# The datasets: runs/paper/data.sh mnist [DIGITS] | clevr CLEVR_v1.0 | wider ROOT
# DIGITS: the folder of MNIST (data/mnist; files that it lacks are downloaded). ROOT: the official zips of WIDER FACE.
set -euo pipefail
source "$(dirname "$0")/settings"
dataset=$1
data=$out/$dataset/data
case $dataset in
mnist)
    digits=(--digits "${2:-data/mnist}" --download)
    if [[ -n ${MINIATURE:-} ]]; then digits=(); fi # those inside the package
    ssdir data mnist-scenes main --out "$data" "${digits[@]}" "${scenes[@]}"
    ;;
clevr) # all train scenes train, the val scenes report
    ssdir data clevr --root "$2" --out "$data" --splits train
    ssdir data clevr --root "$2" --out "$out/clevr/test" --splits val
    ;;
wider)
    ssdir data wider-face --root "$2" --out "$data"
    ;;
esac
