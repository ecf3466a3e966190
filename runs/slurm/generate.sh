#!/usr/bin/env bash
# Scenes as a job array: each job makes one shard in the same folder on a shared disk, a last job merges and verifies.
# Usage: bash runs/slurm/generate.sh DATA SHARDS [SCENES...]     (on the login node: submits all jobs)
# SCENES: words after "ssdir data": mnist-scenes and a preset (default: mnist-scenes main), or clevr-like; and settings.
# If a shard was killed, give the same command again: shards that are done end at once, the others go on.
#SBATCH --job-name=ssdir-generate
#SBATCH --cpus-per-task=1
#SBATCH --mem=2G
#SBATCH --time=01:00:00
#SBATCH --requeue
set -euo pipefail
case ${1:?usage: bash $0 DATA SHARDS [SCENES...]} in
shard)
    ssdir data "${@:4}" --out "$2" --workers "${SLURM_CPUS_PER_TASK:-1}" --shard "$SLURM_ARRAY_TASK_ID/$3"
    ;;
merge)
    ssdir data "${@:3}" --out "$2" --merge
    ssdir data check "$2"
    ;;
*)
    words=("${@:3}")
    ((${#words[@]})) || words=(mnist-scenes main)
    array=$(sbatch --parsable --array="1-$2" "$0" shard "$1" "$2" "${words[@]}")
    sbatch --dependency="afterok:$array" "$0" merge "$1" "${words[@]}"
    ;;
esac
