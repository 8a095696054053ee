#!/usr/bin/env bash
# Kill small training runs again and again, some of them within a save, and check that they end as the run that nobody
# killed: a few seconds for each kill on two CPU cores.
#
#   script/stress.sh [KILLS] [SEED]
#
# 200 kills and seed 0 by default. See tests/stress.py.
set -euo pipefail
cd "$(dirname "$0")/.."
script/setup.sh
export OMP_NUM_THREADS=1  # a life is forked, and a fork takes no thread along
exec .venv/bin/python tests/stress.py --kills "${1:-200}" --seed "${2:-0}"
