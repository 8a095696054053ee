#!/usr/bin/env bash
# Run the paper's ablation on ImageNet: DeiT-Small with the recipe of script/train_paper.sh, with none of the five terms,
# each term alone, each level alone, all but one level, and all. One process per GPU; NGPU=n sets another number.
#
#   script/ablate_deit_small.sh DATA OUT [flags of main.py]
#
# DATA is a folder with train/ and val/, one folder per class. Run folders are OUT/CONFIGURATION/seedK. For CONFIGS,
# SEEDS, TASK, TASKS and DRY_RUN see script/ablate.sh. On a cluster use script/slurm_ablate.sbatch.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 2 ]; then
  echo "usage: $0 DATA OUT [flags of main.py]" >&2
  exit 2
fi
data=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)

exec "$here/ablate.sh" "$out" ${NGPU:+env NGPU="$NGPU"} \
  "$here/train_paper.sh" deit_small_patch16_224_diverse "$data" --redundancy-every 50 "$@"
