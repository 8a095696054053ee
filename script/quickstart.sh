#!/usr/bin/env bash
# Train a small diversified ViT, all five terms on, on the scanned digits that ship with scikit-learn: a few minutes on
# two CPU cores after the install. Arguments go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
script/setup.sh
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
.venv/bin/python main.py "$@"
