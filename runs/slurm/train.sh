#!/usr/bin/env bash
# Any model on several machines with several GPUs each. A job that is killed goes on where it stopped.
# Usage: sbatch runs/slurm/train.sh ssdir mnist --data DATA --detector DETECTOR --out OUT
#        sbatch --nodes=1 --gpus-per-node=2 runs/slurm/train.sh detector mnist --data DATA --out OUT
# training.batch_size is that of all processes together: it stays, and the curve with it, whatever --nodes says.
#SBATCH --job-name=ssdir-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / gpus > 0 ? ${SLURM_CPUS_PER_TASK:-1} / gpus : 1))
# Jobs that share a machine must not share a port.
port=$((20000 + SLURM_JOB_ID % 20000))
# One launcher a machine, which starts one process a GPU. Accelerate inside finds the others by torchrun's variables.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" -m ssdir train "$@" --resume
