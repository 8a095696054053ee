#!/usr/bin/env bash
# Train DeiT-Base with the paper's five terms.
# Usage: script/run_deit_base_diverse.sh DATA [flags of main.py]; see script/train_paper.sh.
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
exec "$(dirname "$0")/train_paper.sh" deit_base_patch16_224_diverse "$@"
