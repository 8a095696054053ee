#!/usr/bin/env bash
# Run the rows of the paper's ablation on the scanned digits that ship with scikit-learn, with the recipe of
# script/quickstart.sh: recipes/studies/paper_digits.yaml, twelve runs of a few minutes each on a CPU.
#
#   script/ablate_digits.sh OUT [flags of study.py and main.py]
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/.venv/bin:$PATH exec python3 "$root/study.py" "$root/recipes/studies/paper_digits.yaml" \
  "${1:?usage: $0 OUT [flags of study.py and main.py]}" "${@:2}"
