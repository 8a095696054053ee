#!/usr/bin/env bash
# Lint and the whole test suite, in the environment of script/setup.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
script/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
exec .venv/bin/python -m pytest "$@"
