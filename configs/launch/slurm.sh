#!/usr/bin/env bash
# A sweep cut into parts, or one training over several processes, under SLURM; run it from the checkout:
#   sbatch configs/launch/slurm.sh sweep configs/sweep_privacy.toml
#   sbatch configs/launch/slurm.sh train configs/demo.toml
# Further words are dotted overrides. The run folder must lie on a disk that all nodes see. The same command resumes.
#SBATCH --job-name=capsfl
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=2G
#SBATCH --time=08:00:00
#SBATCH --output=capsfl-%j.log
# With GPUs, one for each task:
##SBATCH --gpus-per-task=1
set -euo pipefail

command=${1:?sweep or train}
config=${2:?a configuration, such as configs/sweep_privacy.toml}
shift 2
cd "${SLURM_SUBMIT_DIR:-.}"
PATH="${CAPSFL_VENV:-$PWD/.venv}/bin:$PATH"

case "$command" in
  sweep)
    # Parts need nobody else: one that fails does not stop the others, and is run again by the same command.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 capsfl sweep "$config" --part auto "$@"
    ;;
  train)
    # The processes join by what SLURM tells them, and train one cohort together.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" capsfl train "$config" --devices.parallel shard_map "$@"
    ;;
  *)
    echo "slurm.sh: $command: expected sweep or train" >&2
    exit 2
    ;;
esac
