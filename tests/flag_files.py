"""Command lines and files of flags for the tests of the flags."""

import pytest

from training.arguments import parse_args

# Every flag of DeiT's main.py of 2021, with a value that is not the default here, and the released code's five.
ORIGINAL = """
    --batch-size 128 --epochs 400 --model deit_small_patch16_224 --input-size 384 --drop 0.1 --drop-path 0.2
    --model-ema --model-ema-decay 0.9999 --model-ema-force-cpu
    --opt sgd --opt-eps 1e-6 --opt-betas 0.8 0.99 --clip-grad 2.0 --momentum 0.8 --weight-decay 0.1
    --sched step --lr 1e-3 --lr-noise 0.1 0.9 --lr-noise-pct 0.5 --lr-noise-std 0.5 --warmup-lr 1e-5 --min-lr 1e-6
    --decay-epochs 20 --warmup-epochs 10 --cooldown-epochs 5 --patience-epochs 7 --decay-rate 0.2
    --color-jitter 0.3 --aa rand-m6-mstd0.5-inc1 --smoothing 0.2 --train-interpolation bilinear --repeated-aug
    --reprob 0.5 --remode const --recount 2 --resplit
    --mixup 0.7 --cutmix 0.9 --cutmix-minmax 0.2 0.8 --mixup-prob 0.9 --mixup-switch-prob 0.4 --mixup-mode pair
    --teacher-model regnety_040 --teacher-path teacher.pth --distillation-type hard --distillation-alpha 0.4
    --distillation-tau 2.0 --finetune start.pth --data-path images --data-set INAT --inat-category genus
    --output_dir out --device cuda --seed 3 --start_epoch 2 --eval --dist-eval --num_workers 4
    --pin-mem --no-pin-mem --world_size 8 --dist_url tcp://localhost:1234 --scale_lr_flag
    --mixing_coef 1 --emb_cos_within_coef 0.5 --emb_contrast_cross_coef 0.5 --attn_cos_within_coef 1e-4
    --weight_mha_cond_orth_coef 5e-4
"""
DEIT = ORIGINAL.split()


def config(tmp_path, text):
    """The path of a file of flags with `text`."""
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    return str(path)


def error_of(capsys, words):
    """The one line that a refused command line leaves on stderr."""
    with pytest.raises(SystemExit) as caught:
        parse_args(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err
