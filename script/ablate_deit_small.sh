#!/usr/bin/env bash
# Run the paper's ablation on ImageNet: recipes/studies/paper.yaml, DeiT-Small with none of the five terms, each term
# alone, each level alone, all but one level, and all. One process per GPU; --nproc-per-node sets another number.
#
#   script/ablate_deit_small.sh DATA OUT [flags of study.py and main.py]
#
# DATA is a folder with train/ and val/, one folder per class. On a cluster use script/slurm_ablate.sbatch.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/.venv/bin:$PATH exec python3 "$root/study.py" "$root/recipes/studies/paper.yaml" \
  "${2:?usage: $0 DATA OUT [flags of study.py and main.py]}" --data-path "$1" --nproc-per-node auto "${@:3}"
