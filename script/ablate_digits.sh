#!/usr/bin/env bash
# Run the ablation of script/ablate.sh on the scanned digits that ship with scikit-learn, with the recipe of
# script/quickstart.sh: twelve runs of a few minutes each on a CPU.
#
#   script/ablate_digits.sh OUT [flags of main.py]
#
# Run folders are OUT/CONFIGURATION/seedK. For CONFIGS, SEEDS, TASK, TASKS and DRY_RUN see script/ablate.sh.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 1 ]; then
  echo "usage: $0 OUT [flags of main.py]" >&2
  exit 2
fi
out=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)

exec "$root/script/ablate.sh" "$out" "$root/main.py" \
  --data-set DIGITS --input-size 48 --patch-size 12 --num-workers 1 \
  --model deit_tiny_patch16_224_diverse --model-kwargs depth=4 embed_dim=96 num_heads=4 weight_init=jax \
  --epochs 80 --warmup-epochs 1 --batch-size 32 --lr 2e-3 --unscale-lr --drop-path 0 --model-ema-decay 0.98 \
  --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --hflip 0 --scale 0.7 1 --ratio 0.9 1.1 \
  --mixup 0 --mixup-prob 0.2 --log-interval 0 --redundancy-every 10 "$@"
