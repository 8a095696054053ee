#!/usr/bin/env bash
# Run the rows of the paper's ablation on images of 32 px, such as CIFAR-10: recipes/studies/paper_cifar.yaml.
#
#   script/ablate_cifar.sh DATA OUT [flags of study.py and main.py]
#
# DATA is a folder with train/ and test/, one folder per class. CIFAR-10 takes a few hours per run on one CPU core. The
# averaged weights (--model-ema-decay 0.999) need several thousand optimizer steps; for a shorter run, pass a lower
# decay.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/.venv/bin:$PATH exec python3 "$root/study.py" "$root/recipes/studies/paper_cifar.yaml" \
  "${2:?usage: $0 DATA OUT [flags of study.py and main.py]}" --data-path "$1" "${@:3}"
