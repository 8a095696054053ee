#!/usr/bin/env bash
# Train a model with the paper's recipe: 300 epochs, 128 images per GPU (the paper: 8 GPUs), learning rate
# 5e-4 x global batch / 512. A model whose name ends in _diverse is trained with the paper's five terms (--preset released).
#
#   script/train_paper.sh MODEL DATA [flags of main.py]
#
# DATA is a folder with train/ and val/, one folder per class. The script starts one process per GPU, or NGPU=n
# processes, with torchrun; a single process without it. TORCHRUN_ARGS replaces torchrun's --standalone, for several machines.
# The flags are those of recipes/deit_small.yaml or, with the terms, recipes/deit_small_diverse.yaml, for any MODEL.
# The run folder is runs/MODEL unless --output_dir names another. The same command again continues the run from its
# newest complete checkpoint.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 2 ]; then
  echo "usage: $0 MODEL DATA [flags of main.py]" >&2
  exit 2
fi
model=$1 data=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)

recipe=deit_small
[[ $model != *_diverse ]] || recipe=deit_small_diverse
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
NGPU=${NGPU:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
NGPU=$((NGPU > 0 ? NGPU : 1))
launch=(-m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node="$NGPU")
[[ $NGPU -gt 1 || -n ${TORCHRUN_ARGS:-} ]] || launch=()
exec "$python" ${launch[@]+"${launch[@]}"} "$root/main.py" \
  --config "$root/recipes/$recipe.yaml" --model "$model" --data-path "$data" \
  --output_dir "runs/$model" --resume auto "$@"
