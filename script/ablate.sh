#!/usr/bin/env bash
# The ablation of the paper's terms under one recipe: every cell (which of the five terms are on) with every seed, each
# an ordinary run folder OUT/CELL/seedK. ablate_deit_small.sh, ablate_cifar.sh and ablate_digits.sh call it.
#
#   script/ablate.sh OUT PROGRAM [arguments]
#
# PROGRAM is main.py, as one process of one thread unless OMP_NUM_THREADS says otherwise, or a script that passes flags
# on to it. The environment chooses:
#
#   CELLS="plain all"    cells of the table below; default: all twelve
#   SEEDS="0 1 2"        default: 0
#   TASK=0 TASKS=4       only the jobs 0, 4, 8, ... of all cells x seeds; a SLURM array sets both
#   DRY_RUN=1            print the commands, one a line, and run nothing
#
# The same command again continues a grid: what has finished (summary.json) is skipped, what was interrupted resumes
# (--resume auto). A run that fails does not stop the others; the last line names all that did, and the exit status is 1.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 OUT PROGRAM [arguments]" >&2
  exit 2
fi
out=$1
shift
trap 'exit 130' INT  # torchrun answers a signal with an ordinary failure, and the next run would start
trap 'exit 143' TERM

grid() {  # every cell and the terms that are on in it; attention, weight and mixing are levels of a single term
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

flags_of() {  # the objective of one cell, nothing for an unknown one; train_paper.sh sets a preset, hence none
  local cell flags
  while read -r cell flags; do
    [ "$cell" != "$1" ] || echo "--preset none $flags"
  done < <(grid)
}

every_cell=$(grid | cut -d ' ' -f 1 | paste -s -d ' ' -)
CELLS=${CELLS:-$every_cell}
SEEDS=${SEEDS:-0}
TASK=${TASK:-${SLURM_ARRAY_TASK_ID:-0}}
TASKS=${TASKS:-${SLURM_ARRAY_TASK_COUNT:-1}}
for cell in $CELLS; do
  if [ -z "$(flags_of "$cell")" ]; then
    echo "error: CELLS: there is no cell $cell; there are $every_cell" >&2
    exit 2
  fi
done
if ! [[ $TASK =~ ^[0-9]+$ && $TASKS =~ ^[0-9]+$ ]] || [ "$TASK" -ge "$TASKS" ]; then
  echo "error: there is no task $TASK of $TASKS: they count from 0; for a part of an array set TASKS to its size" >&2
  exit 2
fi
for word in "$@"; do
  flag=${word%%=*}
  case ${flag//_/-} in
    --*-coef | --preset | --seed | --output-dir | --resume | --config)
      echo "error: $flag differs from run to run of a grid; CELLS, SEEDS and OUT choose it" >&2
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
for seed in $SEEDS; do  # outermost, so that an unfinished grid is a finished one of fewer seeds
  for cell in $CELLS; do
    job=$((job + 1))
    [ $((job % TASKS)) -eq "$TASK" ] || continue
    run=$out/$cell/seed$seed
    if [ -e "$run/summary.json" ]; then
      echo "$run: finished, skipped" >&2
      continue
    fi
    command=("$@" $(flags_of "$cell") --seed "$seed" --resume auto --output_dir "$run")
    if compgen -G "$run/checkpoint*.pth" >/dev/null; then
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
      [ "$status" -ne 75 ] || exit 75  # stopped by a signal, and saved
      [ "$status" -eq 0 ] || failed+=("$cell/seed$seed")
    fi
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
