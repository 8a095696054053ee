#!/usr/bin/env bash
# Run the ablation of script/ablate.sh on images of 32 px, such as CIFAR-10, with a ViT of 6 blocks and width 96.
# Patches have 4 x 4 pixels, so the grid is 8 x 8. Twelve runs of 30 epochs; CIFAR-10 takes a few hours per run on one
# CPU core. Augmentation is light: padded crops, flips, and CutMix of every other batch.
#
#   script/ablate_cifar.sh DATA OUT [flags of main.py]
#
# DATA is a folder with train/ and test/, one folder per class. Run folders are OUT/CONFIGURATION/seedK. For CONFIGS,
# SEEDS, TASK, TASKS and DRY_RUN see script/ablate.sh. The averaged weights (--model-ema-decay 0.999) need several
# thousand optimizer steps; for a shorter run, pass a lower decay.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
if [ $# -lt 2 ]; then
  echo "usage: $0 DATA OUT [flags of main.py]" >&2
  exit 2
fi
data=$1 out=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)

exec "$root/script/ablate.sh" "$out" "$root/main.py" \
  --data-path "$data" --val-split test --input-size 32 --patch-size 4 --num-workers 1 \
  --model deit_tiny_patch16_224_diverse --model-kwargs depth=6 embed_dim=96 num_heads=3 \
  --epochs 30 --warmup-epochs 3 --batch-size 128 --lr 1e-3 --unscale-lr --drop-path 0 --model-ema-decay 0.999 \
  --no-repeated-aug --aa none --color-jitter 0 --reprob 0 \
  --mixup 0 --mixup-prob 0.5 --log-interval 0 --redundancy-every 10 "$@"
