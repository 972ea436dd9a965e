#!/bin/bash
# A study on the nodes of one Slurm job: sbatch examples/cluster/slurm.sh cifar10
# Ray's own launcher starts the cluster (`ray symmetric-run`, Ray 2.49 and later); the driver runs on the first node.
#SBATCH --job-name=utilized-rank
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
set -euo pipefail
study=${1:?name a study}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export UTILIZED_RANK_ENGINE=ray RAY_ADDRESS="$head:6379"
utilized-rank study "$study"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  dvc repro "reports/$study/dvc.yaml"
