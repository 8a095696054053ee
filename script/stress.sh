#!/usr/bin/env bash
# Kill small training runs again and again, many of them during a save, and check that they end like a run that was not
# killed. It takes a few seconds for each kill on two CPU cores.
#
#   script/stress.sh [KILLS] [SEED] [RANKS]
#
# 200 kills, seed 0 and one process for each run by default. See tests/stress.py.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
script/setup.sh
export OMP_NUM_THREADS=1  # the runs are forked, and a fork has no other threads
exec .venv/bin/python tests/stress.py --kills "${1:-200}" --seed "${2:-0}" --ranks "${3:-1}"
