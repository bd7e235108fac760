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
# Stops at the first failure. The same command skips finished stages and resumes training; a run that ended before its
# first checkpoint starts over with --save_overwrite after CONFIG. Environment variables:
#     MODEL_SIZE     1B (default) or 7B, of STEP
#     ENTROPY_FLAGS  of analysis.entropy (default: --data_size 2048 --batch_size 4)
#     CHANGE_FLAGS   of analysis.change_parameters, such as --select random, --verify or --format temperature
#     PROCESSES      of training (default: the GPUs here, or 1)
# CONFIG, STEP, RATIO, FACTOR, CHANGE_FLAGS and every --key.sub=value that changes the run name it and its folder,
# checkpoints/resuscitated/MODEL_SIZE/NAME. A run of other settings under that name is an error of the trainer.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: bash scripts/resuscitation.sh STEP RATIO FACTOR CONFIG [--key.sub=value ...]" >&2
    exit 2
fi
step=$1 ratio=$2 factor=$3 config=$4
shift 4
root=$(dirname "${BASH_SOURCE[0]}")/..
# SLURM runs a copy of this file from elsewhere.
[ -d "$root/analysis" ] || root=${SLURM_SUBMIT_DIR:-$root}
cd "$root"
for needed in analysis "$config"; do
    if [ ! -e "$needed" ]; then
        echo "error: $needed: not in $PWD, where this script runs" >&2
        exit 2
    fi
done
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python3
# All lines; read exits with status 1 without a delimiter.
read -rd '' -a entropy_flags <<<"${ENTROPY_FLAGS---data_size 2048 --batch_size 4}" || true
read -rd '' -a change_flags <<<"${CHANGE_FLAGS-}" || true
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
model_size=${MODEL_SIZE:-1B}

suffix=safetensors key=resuscitation
case " ${change_flags[*]-} " in
    *" --format"[\ =]"full "*) suffix=pt ;;
    *" --format"[\ =]"temperature "*) key=temperature_MLP ;;
esac
setting=step${step}_ratio${ratio}_factor${factor}${change_flags[*]:+_${change_flags[*]}}
setting=$(tr -cs 'A-Za-z0-9.\n' _ <<<"$setting")
overrides=
for flag in "$@"; do
    case $flag in
        --save_* | --run_name=* | --device=* | --wandb.* | --try_load_latest_save* | --debug) ;;
        *) overrides+=_${flag#--} ;;
    esac
done
overrides=$(tr -cs 'A-Za-z0-9.\n+-' _ <<<"$overrides")
if [ ${#overrides} -gt 120 ]; then # a file name has room for 255 characters
    overrides=${overrides:0:100}_$(cksum <<<"$*" | cut -d " " -f 1)
fi
name=$(basename "$config" .yaml)_$setting$overrides
edit=$PWD/checkpoints/resuscitated/$model_size/$setting.$suffix
folder=checkpoints/pretrained_1B
[ "$model_size" = 1B ] || folder=checkpoints/pretrained
folder=$folder/$step-unsharded

"$python" -m analysis.entropy --step "$step" --model_size "$model_size" \
    "${entropy_flags[@]+"${entropy_flags[@]}"}"
if [ -s "$edit" ] && [ "$edit" -ot "$folder/mlp_average_coefficients.safetensors" ]; then
    echo "error: $edit: older than the coefficients of $folder; remove it, and the run $name if there is one" >&2
    exit 1
elif [ -s "$edit" ]; then # it is renamed once complete and, with --verify, verified
    echo "$edit: done before"
else
    "$python" -m analysis.change_parameters --step "$step" --model_size "$model_size" --resuscitation_ratio "$ratio" \
        --amplifying_factor "$factor" --output "$edit" "${change_flags[@]+"${change_flags[@]}"}"
fi
launch=("$python")
[ "$processes" -eq 1 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$processes")
"${launch[@]}" -m scripts.train "$config" --run_name="$name" --load_path="$folder" \
    --model."$key"="$edit" --save_folder="checkpoints/resuscitated/$model_size/$name" --try_load_latest_save "$@"
