#!/usr/bin/env bash
# Train the ablation of the paper's terms with one recipe: each configuration (which of the five terms are on) with each
# seed. Run folders are OUT/CONFIGURATION/seedK. ablate_deit_small.sh, ablate_cifar.sh and ablate_digits.sh call this.
#
#   script/ablate.sh OUT PROGRAM [arguments]
#
# PROGRAM is main.py, which runs as one process with one thread unless OMP_NUM_THREADS is set, or a script that passes
# its flags to main.py. Environment variables:
#
#   CONFIGS="plain all"  configurations of the table below; default: all twelve (CELLS is the earlier name)
#   SEEDS="0 1 2"        default: 0
#   TASK=0 TASKS=4       run only jobs 0, 4, 8, ... of all configurations x seeds; a SLURM array sets both
#   DRY_RUN=1            print the commands, one per line, and run nothing
#
# The same command again skips finished runs (those with a summary.json) and resumes interrupted ones (--resume auto). A
# run that was trained with other flags or data is refused, finished or not: main.py compares them with the checkpoint.
# A run that fails does not stop the others; the last line names all that failed, and the exit status is 1.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 2 ]; then
  echo "usage: $0 OUT PROGRAM [arguments]" >&2
  exit 2
fi
out=$1
shift
trap 'exit 130' INT  # after a signal torchrun fails like any failed run, and the next run would start
trap 'exit 143' TERM

configurations() {  # each configuration with its terms; the levels attention, weight and mixing have one term each
  local mixing="--mixing_coef 1"
  local cos="--emb_cos_within_coef 0.5" contrast="--emb_contrast_cross_coef 0.5"
  local attention="--attn_cos_within_coef 1e-4"
  local weight="--weight_mha_cond_orth_coef 5e-4"
  cat <<END
plain
only_mixing $mixing
only_emb_cos_within $cos
only_emb_contrast_cross $contrast
only_attn_cos_within $attention
only_weight_mha_cond_orth $weight
level_embedding $cos $contrast
without_mixing $cos $contrast $attention $weight
without_embedding $mixing $attention $weight
without_attention $mixing $cos $contrast $weight
without_weight $mixing $cos $contrast $attention
all $mixing $cos $contrast $attention $weight
END
}

flags_of() {  # flags of one configuration, nothing if it is unknown; --preset none because train_paper.sh sets a preset
  local name flags
  while read -r name flags; do
    [ "$name" != "$1" ] || echo "--preset none $flags"
  done < <(configurations)
}

known=$(configurations | cut -d ' ' -f 1 | paste -s -d ' ' -)
CONFIGS=${CONFIGS:-${CELLS:-$known}}
SEEDS=${SEEDS:-0}
TASK=${TASK:-${SLURM_ARRAY_TASK_ID:-0}}
TASKS=${TASKS:-${SLURM_ARRAY_TASK_COUNT:-1}}
for name in $CONFIGS; do
  if [ -z "$(flags_of "$name")" ]; then
    echo "error: CONFIGS: there is no configuration $name; there are $known" >&2
    exit 2
  fi
done
if ! [[ $TASK =~ ^[0-9]+$ && $TASKS =~ ^[0-9]+$ ]] || [ "$TASK" -ge "$TASKS" ]; then
  echo "error: there is no task $TASK of $TASKS: tasks count from 0; for a part of an array, set TASKS to its size" >&2
  exit 2
fi
for word in "$@"; do
  flag=${word%%=*}
  case ${flag//_/-} in
    --*-coef | --preset | --seed | --output-dir | --resume | --config)
      echo "error: $flag differs between the runs of an ablation; set CONFIGS, SEEDS or OUT instead" >&2
      exit 2
      ;;
  esac
done

if [[ $1 == *.py ]]; then
  root=$(cd "$(dirname "$0")/.." && pwd)
  python=python3
  [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
  set -- env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" "$@"
fi

quoted() {
  local line
  line=$(printf '%q ' "$@")
  printf '%s' "${line% }"
}

job=-1
failed=()
for seed in $SEEDS; do  # the outer loop, so that an unfinished ablation is a finished one with fewer seeds
  for name in $CONFIGS; do
    job=$((job + 1))
    [ $((job % TASKS)) -eq "$TASK" ] || continue
    run=$out/$name/seed$seed
    command=("$@" $(flags_of "$name") --seed "$seed" --resume auto --output_dir "$run")
    has_checkpoint=$(compgen -G "$run/checkpoint*.pth" || true)
    if [ -e "$run/summary.json" ]; then
      if [ -z "$has_checkpoint" ] || [ "${DRY_RUN:-0}" != 0 ]; then
        echo "$run: finished, skipped" >&2
        continue
      fi
      echo "$run: finished, compared with this command" >&2
    elif [ -n "$has_checkpoint" ]; then
      echo "$run: interrupted, resumes" >&2
    else
      echo "$run: starts" >&2
    fi
    if [ "${DRY_RUN:-0}" != 0 ]; then
      quoted "${command[@]}"
      echo
    else
      status=0
      "${command[@]}" || status=$?
      [ "$status" -ne 75 ] || exit 75  # the run was stopped by a signal and saved
      [ "$status" -eq 0 ] || failed+=("$name/seed$seed")
    fi
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
