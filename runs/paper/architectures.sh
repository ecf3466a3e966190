#!/usr/bin/env bash
# The architecture figures: every layer of the networks of the three columns, with activations, shapes and parameters.
# Usage: runs/paper/architectures.sh
set -euo pipefail
for preset in mnist clevr wider; do
    echo "== $preset"
    ssdir info --preset "$preset"
done
