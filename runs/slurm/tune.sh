#!/usr/bin/env bash
# A search by any number of workers, each a job of its own with one GPU; they share one study.
# Usage: sbatch --array=1-16 runs/slurm/tune.sh mnist --data DATA --out OUT --trials 200 \
#            --storage postgresql://USER:PASSWORD@HOST/DATABASE
# Without --storage the study is an SQLite file in OUT, for the jobs of one machine.
#SBATCH --job-name=ssdir-tune
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
ssdir tune "$@"
