"""Command lines that are refused in one line, and flags that have no effect."""

import pytest
from flag_files import error_of

from training.arguments import parse_args
from training.flag_warnings import without_effect


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--batch-size 33", "--batch-size --mixup --cutmix"),
        ("--batch-size 33 --mixup 0", "--batch-size --cutmix"),
        ("--data-set wds/any --num-classes 2 --cache-images memory", "--cache-images --data-set"),
        ("--batch-size 33 --mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", "--batch-size --cutmix"),
        ("--input-size 224 --patch-size 15", "--input-size --patch-size"),
        ("--distillation-type hard", "--distillation-type --teacher-path"),
        ("--eval", "--eval --resume --finetune"),
        ("--resume a.pth --finetune b.pth", "--resume --finetune"),
        ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax"),
        ("--scale 1 0.5", "--scale"),
        ("--ratio 2 1", "--ratio"),
        ("--epochs 10 --start-epoch 10", "--start-epoch --epochs"),
        ("--device gpu", "--device"),
        ("--emb_cos_within_coef -0.5", "--emb-cos-within-coef"),
        ("--mixing_coef nan", "--mixing-coef"),
        ("--weight_mha_cond_orth_coef=inf", "--weight-mha-cond-orth-coef"),
        ("--lr 0", "--lr"),
        ("--lr", "--lr"),
        ("--epochs ten", "--epochs"),
        ("--num-workers -1", "--num-workers"),
        ("--drop-path 1.5", "--drop-path"),
        ("--sched cosin", "--sched"),
        ("--mixup-mode half", "--mixup-mode"),
        ("--emb_cos_withn_coef 1", "--emb-cos-withn-coef --emb-cos-within-coef"),
        ("--epoch 3", "--epoch --epochs"),
        ("stray", "stray"),
        ("--input-size 48 64", "64 --input-size one side square"),
        ("--model-ema True", "True --model-ema --no-model-ema"),
        ("--scale 0.1 0.5 1", "--scale"),
        ("--dry-run --check-data", "--dry-run --check-data"),
        ("--dry-run --eval --resume a.pth", "--dry-run --eval"),
        ("--model-kwargs depth", "--model-kwargs"),
        ("--model-kwargs patch_size=4", "--model-kwargs --patch-size"),
        ("--opt adahessian", "--opt"),
        ("--seed 99999999999999999999", "--seed"),
        ("--lr-noise 0.9 0.4", "--lr-noise"),
        ("--lr-noise 1", "--lr-noise"),
        ("--lr-noise 0.5 1.5", "--lr-noise"),
        ("--lr-noise 0.1 0.2 0.3", "--lr-noise"),
        ("--lr-noise 0.5 --lr-noise-pct 0", "--lr-noise-pct --lr-noise-std"),
        ("--lr-noise-pct 1.5", "--lr-noise-pct"),
        ("--mixing-where mixup", "--mixing-where always cutmix"),
        ("--diversity-until 0", "--diversity-until"),
        ("--diversity-warmup 5 --diversity-until 5", "--diversity-until --diversity-warmup"),
        ("--grad-norms-every -1", "--grad-norms-every"),
        ("--val-fraction 1", "--val-fraction"),
        ("--val-fraction nan", "--val-fraction"),
        ("--val-fraction 0.1 --data-set wds/any", "--val-fraction --data-set"),
    ],
)
def test_wrong_command_lines(capsys, words, named):
    line = error_of(capsys, words.split())
    assert all(flag in line for flag in named.split())


@pytest.mark.parametrize(
    "words",
    [
        "--batch-size 33 --eval --resume a.pth",
        "--data-set wds/any --num-classes 2 --cache-images memory --eval --resume a.pth",
        "--warmup-lr 0 --dr 0.5",
        "--batch-size 33 --mixup 0 --cutmix 0",
        "--start-epoch 10 --epochs 10 --cooldown-epochs 1",
    ],
)
def test_right_command_lines(words):
    assert parse_args(words.split()).epochs > 0


IDLE = {
    "--teacher-model resnet18": "teacher-model",
    "--teacher-path a.pth": "teacher-path",
    "--distillation-alpha 0.1": "distillation-alpha",
    "--distillation-tau 3": "distillation-tau",
    "--distillation-type hard --teacher-path a.pth --distillation-tau 3": "distillation-tau",
    "--no-model-ema --model-ema-decay 0.9 --model-ema-warmup --model-ema-force-cpu": (
        "model-ema-decay model-ema-warmup model-ema-force-cpu"
    ),
    "--mixup 0 --cutmix 0 --mixup-prob 0.5 --mixup-switch-prob 0.1 --mixup-mode pair": (
        "mixup-prob mixup-mode mixup-switch-prob"
    ),
    "--cutmix-minmax 0.2 0.8 --cutmix 0.5": "cutmix",
    "--no-repeated-aug --aug-repeats 2": "aug-repeats",
    "--reprob 0 --remode const --recount 3": "remode recount",
    "--color-jitter 0.1": "color-jitter",
    "--aa trivialaugment --color-jitter 0.1": "color-jitter",
    "--val-split test --val-fraction 0.1": "val-split",
    "--data-set DIGITS --val-split test --val-fraction 0.1": "val-split",
    "--cache-size 240": "cache-size",
    "--cache-images device --prefetcher --no-fast-crop": "prefetcher fast-crop",
    "--cache-images memory --input-size 32 --no-prefetcher --no-fast-crop": "prefetcher fast-crop",
    "--input-size 32 --scale 0.5 1 --ratio 1 1": "scale ratio",
    "--inat-category genus": "inat-category",
    "--lr-noise-pct 0.1 --lr-noise-std 2": "lr-noise-pct lr-noise-std",
    "--decay-rate 0.5 --decay-epochs 3 --patience-epochs 3": "decay-rate decay-epochs patience-epochs",
    "--sched plateau --decay-epochs 3 --decay-rate 0.5": "decay-epochs",
    "--sched step --patience-epochs 3 --decay-rate 0.5": "patience-epochs",
    "--sched step --min-lr 1e-6": "min-lr",
    "--sched constant --min-lr 1e-6": "min-lr",
    "--resplit --world-size 4": "resplit world-size",
    "--input-size 32 --eval-crop-ratio 0.9": "eval-crop-ratio",
    "--mixup 0 --mixup-switch-prob 0.1": "mixup-switch-prob",
    "--cutmix 0 --mixup-switch-prob 0.1": "mixup-switch-prob",
    "--warmup-epochs 0 --warmup-lr 1e-5": "warmup-lr",
    "--data-set FAKE --data-path images": "data-path",
    "--momentum 0.5": "momentum",
    "--opt sgd --opt-eps 1e-3": "opt-eps",
    "--mixing-balance equal": "mixing-balance",
    "--mixing-where cutmix": "mixing-where",
    "--mixing_coef 1 --mixing-where cutmix --cutmix 0": "mixing-coef",
    "--preset released --mixing-where cutmix --mixup-switch-prob 0": "mixing-coef",
    "--preset corrected --mixing-where cutmix --mixup-prob 0": "mixing-coef",
    "--diversity-warmup 5 --diversity-until 20": "diversity-warmup diversity-until",
    "--emb-layers all --emb_grad_diversity_coef 1": "emb-layers",
    "--attn-layers all --attn_cos_cross_coef 1": "attn-layers",
    "--weight-groups fc1 --emb_so_coef 1": "weight-groups",
    "--cond-orth-steps 3 --weight_mha_so_coef 1": "cond-orth-steps",
    "--cond-orth-exact --cond-orth-normalize --emb_cond_orth_coef 1": "cond-orth-normalize",
    "--mhs-collapse-aware": "mhs-collapse-aware",
    "--checkpoint-key teacher": "checkpoint-key",
}


@pytest.mark.parametrize(("words", "named"), IDLE.items(), ids=IDLE)
def test_flags_without_effect_are_reported(words, named):
    lines = without_effect(parse_args(words.split()))
    assert [line.split()[0] for line in lines] == [f"--{name}" for name in named.split()]
    assert all(" has no effect: " in line for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--distillation-type soft --teacher-path a.pth --distillation-tau 3 --distillation-alpha 0.1",
        "--aa none --color-jitter 0.1",
        "--data-set INAT --inat-category genus",
        "--cutmix-minmax 0.2 0.8 --mixup-switch-prob 0.1",
        "--sched step --decay-epochs 3 --decay-rate 0.5",
        "--sched plateau --patience-epochs 3 --decay-rate 0.5",
        "--sched poly --decay-rate 0.5",
        "--sched constant --cooldown-epochs 1 --min-lr 1e-6",
        "--opt sgd --momentum 0.5",
        "--lr-noise 0.5 --lr-noise-pct 0.1",
        "--preset corrected",
        "--emb_mhs_coef 1 --mhs-collapse-aware --emb-layers all",
        "--weight_mha_cond_orth_in_coef 1 --cond-orth-steps 3 --cond-orth-normalize --weight-groups fc2",
        "--attn_so_coef 1 --attn-layers 0,2 --mixing_coef 1 --mixing-balance equal",
        "--resume auto --output-dir out --start-epoch 2",
        "--mixing_coef 1 --mixing-where cutmix --mixup 0",
        "--emb_so_coef 1 --diversity-warmup 5 --diversity-until 20 --grad-norms-every 3",
    ],
)
def test_flags_with_effect_are_not_reported(words):
    assert without_effect(parse_args(words.split())) == []
