#!/usr/bin/env bash
# Train a small ViT with all five terms on the scanned digits that ship with scikit-learn. After the installation it
# takes a few minutes on two CPU cores. Further arguments are passed to main.py.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
script/setup.sh

run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
export OMP_NUM_THREADS=1  # a second thread helps such a small model little, and slows it down on a busy machine
# glibc keeps the large buffers that a step on the CPU frees, instead of returning them to the system for the next step
# to request again: a step takes about 3 % less time. What the run uses at most stays the same.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_MAX_=0
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
