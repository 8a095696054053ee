#!/usr/bin/env bash
# Check style and run the default tests in two processes of one thread each, and print the ten slowest, in the
# environment of script/setup.sh.
#
#   script/test.sh [--slow] [arguments of pytest]
#
# --slow also runs the tests that are marked slow, which take minutes each.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
script/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
arguments=(--durations=10 -n 2 --dist loadfile)
for word in "$@"; do
  if [ "$word" = --slow ]; then
    arguments+=(-m "slow or not slow")
  else
    arguments+=("$word")
  fi
done
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "${arguments[@]}"
