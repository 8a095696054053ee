#!/usr/bin/env bash
# Train a small ViT with all five terms on the scanned digits that ship with scikit-learn. After the installation it
# takes a few minutes on two CPU cores. Further arguments are passed to main.py.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
script/setup.sh

run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1  # a second thread helps such a small model little, and slows it down on a busy machine
# glibc keeps the large buffers that a step on the CPU frees, instead of returning them to the system for the next step
# to request again: a step takes about 3 % less time. What the run uses at most stays the same.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_MAX_=0
.venv/bin/python main.py --config recipes/digits.yaml --preset released --output_dir "$run" "$@"

cat <<END

The paper's run (ImageNet in a folder with train/ and val/, one process per GPU):
  ./script/run_deit_small_diverse.sh /path/to/imagenet
END
