#!/usr/bin/env bash
# Train a small diversified ViT, all five terms on, on the scanned digits that ship with scikit-learn: a few minutes on
# two CPU cores after the install. Further arguments go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
script/setup.sh

run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1  # so small a model gains little from a second thread, and loses much when another program needs it
.venv/bin/python main.py \
  --data-set DIGITS --input-size 48 --patch-size 12 --num-workers 1 \
  --model deit_tiny_patch16_224_diverse --model-kwargs depth=4 embed_dim=96 num_heads=4 weight_init=jax \
  --preset released \
  --epochs 80 --warmup-epochs 1 --batch-size 32 --lr 2e-3 --unscale-lr --drop-path 0 --model-ema-decay 0.98 \
  --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --hflip 0 --scale 0.7 1 --ratio 0.9 1.1 \
  --mixup 0 --mixup-prob 0.2 --log-interval 0 --output_dir "$run" "$@"

cat <<END

The paper's run (ImageNet in a folder with train/ and val/, one process per GPU):
  ./script/run_deit_small_diverse.sh /path/to/imagenet
END
