#!/usr/bin/env bash
# Create .venv and install the pinned requirements into it. If they are installed already, it changes nothing.
# PYTHON=... selects the interpreter (>= 3.11) of .venv.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python >= 3.11 is needed; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if cat requirements.txt constraints.txt | cmp -s - .venv/installed; then
  exit 0
fi
echo "Installing into .venv: torch, torchvision, timm and their dependencies (several GB, once)"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
cat requirements.txt constraints.txt > .venv/installed
