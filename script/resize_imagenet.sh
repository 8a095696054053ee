#!/usr/bin/env bash
# Make a smaller copy of an ImageNet-like folder, whose training images cost less to decode.
#
#   script/resize_imagenet.sh SRC DST [SIDE]
#
# Images of SRC/train with a short side above SIDE (256 by default) are resized to it. All other files in the folders of
# SRC are copied. The same command continues an interrupted copy. pipeline/resize.py says what the copy changes in
# training.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "usage: $0 SRC DST [SIDE]" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # it has a process for every core
PYTHONPATH=$root exec "$python" -m pipeline.resize "$@"
