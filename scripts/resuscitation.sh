#!/usr/bin/env bash
#SBATCH --job-name=resuscitation
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
# Entropy, resuscitation, training of one setting: on this machine, or as a SLURM job (sbatch with the same arguments).
#
#     bash scripts/resuscitation.sh STEP RATIO FACTOR CONFIG [--key.sub=value ...]
#     bash scripts/resuscitation.sh 738020 0.5 2 configs/1B/1B_bs128_lr4e4_pubmed_1ep_738k.yaml
#
# Stops at the first failure. Again, it skips what is done and goes on where training stopped. Variables change the rest:
#     MODEL_SIZE     1B (default) or 7B, of STEP
#     ENTROPY_FLAGS  of analysis.entropy (default: --data_size 2048 --batch_size 4)
#     CHANGE_FLAGS   of analysis.change_parameters, such as --select random
#     PROCESSES      of training (default: the GPUs here, or 1)
# The run's name, and with it its folder, says STEP, RATIO, FACTOR and CHANGE_FLAGS.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: bash scripts/resuscitation.sh STEP RATIO FACTOR CONFIG [--key.sub=value ...]" >&2
    exit 2
fi
step=$1 ratio=$2 factor=$3 config=$4
shift 4
# SLURM runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python3
read -ra entropy_flags <<<"${ENTROPY_FLAGS---data_size 2048 --batch_size 4}"
read -ra change_flags <<<"${CHANGE_FLAGS-}"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
model_size=${MODEL_SIZE:-1B}

setting=$(tr -cs 'A-Za-z0-9.\n' _ <<<"step${step}_ratio${ratio}_factor${factor}${CHANGE_FLAGS:+_$CHANGE_FLAGS}")
name=$(basename "$config" .yaml)_$setting
edit=$PWD/checkpoints/resuscitated/$model_size/$setting.safetensors

"$python" -m analysis.entropy --step "$step" --model_size "$model_size" "${entropy_flags[@]}"
if [ -s "$edit" ]; then # it gets its name when it is whole
    echo "$edit: done before"
else
    "$python" -m analysis.change_parameters --step "$step" --model_size "$model_size" --resuscitation_ratio "$ratio" \
        --amplifying_factor "$factor" --output "$edit" "${change_flags[@]+"${change_flags[@]}"}"
fi
launch=("$python")
[ "$processes" -eq 1 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$processes")
folder=checkpoints/pretrained_1B
[ "$model_size" = 1B ] || folder=checkpoints/pretrained
"${launch[@]}" -m scripts.train "$config" --run_name="$name" --load_path="$folder/$step-unsharded" \
    --model.resuscitation="$edit" --try_load_latest_save "$@"
