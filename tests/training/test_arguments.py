"""The flags: spellings, the original DeiT's command line, files of flags, and checks across flags."""

import argparse
from unittest import mock

import pytest
import yaml
from helpers import run_process

from diversity import ALIASES, PRESETS, REGULARIZERS, regularizer
from training.arguments import build_parser, coefficients, parse_args, term_options, without_effect
from training.flags import REMOVED

FLAGS = [
    (action, flag)
    for action in build_parser()._actions
    if action.help != argparse.SUPPRESS and action.dest not in ("help", "config")
    for flag in action.option_strings
]
NEEDS = {"--eval": ("--resume", "a.pth"), "--distillation-type": ("--teacher-path", "a.pth")}
SPECIAL = {
    "--device": ["cpu"],
    "--opt": ["sgd"],
    "--model-kwargs": ["depth=4", "embed_dim=96"],
    "--preset": ["corrected"],
    "--weight-groups": ["proj,fc1"],
}


def accepts(action, word):
    try:
        return action.type is None or action.type(word) != action.default
    except (argparse.ArgumentTypeError, ValueError):
        return False


def sample_values(action, flag):
    """Words for a flag that change its default."""
    if action.nargs == 0:
        return []
    if flag in SPECIAL:
        return SPECIAL[flag]
    if action.choices:
        return [next(choice for choice in reversed(action.choices) if choice != action.default)]
    if action.nargs == 2:
        return ["0.25", "0.5"]
    return [next(word for word in ("4", "0.375", "a_b") if accepts(action, word))]


@pytest.mark.parametrize(("action", "flag"), FLAGS, ids=[flag for _, flag in FLAGS])
def test_hyphens_and_underscores_are_the_same(action, flag):
    values, needs = sample_values(action, flag), NEEDS.get(flag, ())
    parsed = parse_args([flag, *values, *needs])
    underscored = "--" + flag.removeprefix("--").replace("-", "_")
    assert parse_args([underscored, *values, *needs]) == parsed
    if len(values) == 1:
        assert parse_args([f"{underscored}={values[0]}", *needs]) == parsed
    if values:
        assert getattr(parsed, action.dest) != action.default


def test_underscores_in_values_stay():
    args = parse_args(["--output_dir=my_runs/a_b", "--data_path", "some_where", "--model-kwargs", "embed_dim=96"])
    assert (args.output_dir, args.data_path, args.model_kwargs) == ("my_runs/a_b", "some_where", {"embed_dim": 96})


@pytest.mark.parametrize("action", {id(action): action for action, _ in FLAGS}.values(), ids=lambda action: action.dest)
def test_every_flag_explains_itself(action):
    assert action.help.strip()


def test_help_does_not_import_what_only_a_run_needs():
    process = run_process("-X", "importtime", "main.py", "--help")
    assert process.returncode == 0 and "--emb-cos-within-coef" in process.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in process.stderr.splitlines()}
    assert "timm" in imported
    assert not imported & {"sklearn", "scipy", "pandas", "matplotlib", "tensorboard"}


def test_every_term_has_a_flag():
    words = [f"--{name}_coef={index}.5" for index, name in enumerate(("mixing", *REGULARIZERS))]
    values = [index + 0.5 for index in range(len(words))]
    assert coefficients(parse_args(words)) == dict(zip(("mixing", *REGULARIZERS), values, strict=True))
    assert not any(coefficients(parse_args([])).values())


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


def test_original_command_line():
    args = parse_args(DEIT)
    default = parse_args([])
    stay = {"--model-ema", "--repeated-aug", "--dist-eval"}  # switches that are on anyway
    flags = [word for word in DEIT if word.startswith("--") and not word.startswith("--no-")]
    for flag in set(flags) - stay:
        name = flag.removeprefix("--").replace("-", "_")
        assert getattr(args, name) != getattr(default, name), flag
    assert (args.lr, args.opt_betas, args.cutmix_minmax, args.seed) == (1e-3, [0.8, 0.99], [0.2, 0.8], 3)
    assert args.pin_mem is False
    assert coefficients(args) == {name: 0.0 for name in REGULARIZERS} | {
        "mixing": 1.0,
        "emb_cos_within": 0.5,
        "emb_contrast_cross": 0.5,
        "attn_cos_within": 1e-4,
        "weight_mha_cond_orth": 5e-4,
    }


def test_original_switches_the_other_way():
    args = parse_args(["--no-model-ema", "--no-repeated-aug", "--resume", "checkpoint.pth", "--output_dir", ""])
    assert (args.model_ema, args.repeated_aug, args.resume, args.output_dir) == (False, False, "checkpoint.pth", "")


# Files of flags


def config(tmp_path, text):
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    return str(path)


ROUND_TRIPS = {
    "defaults": [],
    "original": DEIT,
    "none": ["--aa", "none"],
    "empty": ["--output-dir", "", "--finetune", ""],
    "kwargs": ["--model-kwargs", "depth=6", "qkv_bias=False", "act_layer=gelu", "init_values=1e-6", "mlp_ratio=2.5"],
    "lists": ["--scale", "0.5", "1", "--ratio", "1", "1", "--lr-noise", "0.5", "--opt-betas", "0.9", "0.95"],
    "off": ["--no-model-ema", "--no-tensorboard", "--no-repeated-aug", "--no-dist-eval", "--mixup", "0"],
    "small": ["--lr", "1e-7", "--attn_cos_within_coef", "1e-9", "--opt-eps", "1e-16"],
    "preset": ["--preset", "corrected"],
    "preset and flags": ["--preset", "corrected", "--mixing_coef", "0", "--cond-orth-steps", "1", "--emb_so_coef", "2"],
    "layers": ["--emb-layers", "0,5,11", "--attn-layers", "3", "--weight-groups", "fc1,qkv"],
    "words": ["--output-dir", "a folder/with: odd, names", "--data-set", "FAKE", "--num-classes", "10"],
}


@pytest.mark.parametrize("words", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_runs_args_yaml_repeats_it(tmp_path, words):
    args = parse_args(words)
    path = config(tmp_path, yaml.safe_dump(vars(args), sort_keys=False))  # as main.py writes it
    again = parse_args(["--config", path])
    assert again.config == path
    again.config = None
    assert again == args


def test_command_line_wins_over_the_file(tmp_path):
    path = config(
        tmp_path,
        "lr: 5e-4\nbatch_size: 32\nmodel-ema: false\nrepeated_aug: true\nmixing_coef: 0.5\n"
        "model_kwargs: {depth: 6, embed_dim: 96}\nscale: [0.5, 1]\n",
    )
    args = parse_args(
        ["--lr", "1e-3", "--model-ema", "--no-repeated-aug", "--model-kwargs", "depth=2", "--config", path]
    )
    assert (args.lr, args.batch_size, args.model_ema, args.repeated_aug) == (1e-3, 32, True, False)
    assert (args.mixing_coef, args.model_kwargs, args.scale) == (0.5, {"depth": 2}, [0.5, 1.0])
    assert parse_args([f"--config={path}"]).model_ema is False


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_coefficients_and_settings(name):
    args = parse_args(["--preset", name])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | PRESETS[name].coefs
    default = parse_args([])
    for setting in ("mixing_balance", "cond_orth_steps", "cond_orth_exact", "mhs_collapse_aware"):
        assert getattr(args, setting) == PRESETS[name].settings.get(setting, getattr(default, setting))


def test_explicit_flags_override_a_preset_wherever_they_stand(tmp_path):
    words = ["--emb_cos_within_coef", "0", "--preset", "released", "--mixing-coef=0.25"]
    expected = PRESETS["released"].coefs | {"emb_cos_within": 0.0, "mixing": 0.25}
    assert coefficients(parse_args(words)) == dict.fromkeys(REGULARIZERS, 0.0) | expected
    path = config(tmp_path, "preset: released\nmixing_coef: 0.25\nemb_cos_within_coef: 0\n")
    assert coefficients(parse_args(["--config", path])) == coefficients(parse_args(words))
    assert coefficients(parse_args(["--config", path, "--emb-cos-within-coef", "2"]))["emb_cos_within"] == 2
    assert coefficients(parse_args(["--config", path, "--preset", "diversepatch"]))["emb_dot_contrast_cross"] == 1
    args = parse_args(["--config", path, "--preset", "none"])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | {"mixing": 0.25}


@pytest.mark.parametrize("first", PRESETS)
@pytest.mark.parametrize("second", [*PRESETS, "none", ""])
def test_a_preset_beside_a_runs_args_yaml_takes_the_place_of_its_preset(tmp_path, first, second):
    words = ["--mixing_coef", "0.25", "--cond-orth-normalize", "--lr", "1e-3"]
    path = config(tmp_path, yaml.safe_dump(vars(parse_args(["--preset", first, *words]))))
    args = parse_args(["--config", path, f"--preset={second}"])
    args.config = None
    assert args == parse_args([f"--preset={second}", *words])


def test_exact_spectra_override_the_power_steps_of_a_preset():
    args = parse_args(["--preset", "corrected", "--cond-orth-exact"])
    options = term_options(args)
    assert (options["cond_orth_exact"], options["cond_orth_steps"]) == (True, 1)


def test_a_new_option_is_a_flag_with_the_help_of_its_docstring(capsys):
    with mock.patch.dict(REGULARIZERS):

        @regularizer(level="embedding")
        def emb_of_this_test(last, *, power=2, scale_of_it=0.5, centred=False):
            """Mean power.

            Args:
                last: [B, P, D].
                power: the exponent, in
                    words.
                scale_of_it: a factor.
                centred: without the mean.
            """

        words = ["--power", "3", "--scale_of_it", "0.25", "--centred"]
        args = parse_args(words)
        assert term_options(args) | {"power": 3, "scale_of_it": 0.25, "centred": True} == term_options(args)
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        assert "the exponent, in words (default: 2)" in capsys.readouterr().out


def test_options_of_every_type_are_read_like_their_defaults(tmp_path, capsys):
    with mock.patch.dict(REGULARIZERS):

        @regularizer(level="embedding")
        def emb_of_this_test(last, *, kind="mean", shape=(1, 2), top=None, offset=0, margin=-0.5):
            """Options without a line in the docstring."""

        defaults = {"kind": "mean", "shape": (1, 2), "top": None, "offset": 0, "margin": -0.5}
        given = {"kind": "none", "shape": (3, 4, 5), "top": 0.5, "offset": -2, "margin": 0.25}
        words = ["--kind", "none", "--shape", "3", "4", "5", "--top", "0.5", "--offset=-2", "--margin", "0.25"]
        for line, expected in (([], defaults), (words, given)):
            args = parse_args(line)
            assert expected.items() <= term_options(args).items()
            path = config(tmp_path, yaml.safe_dump(vars(args), sort_keys=False))
            assert expected.items() <= term_options(parse_args(["--config", path])).items()
        assert parse_args(["--top", "last"]).top == "last"
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        assert "setting of emb_of_this_test (default: mean)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_sets_the_coefficient_of_its_term(alias, name, capsys):
    args = parse_args([f"--{alias}_coef", "0.25"])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | {name: 0.25}
    assert f"{alias} is another name of {name}" in error_of(capsys, [f"--{alias}_coef", "1", f"--{name}_coef", "1"])


def test_every_option_of_a_term_is_a_flag():
    options = {option for term in REGULARIZERS.values() for option in term.options}
    assert set(term_options(parse_args([]))) == options
    words = ["--cond-orth-steps", "3", "--cond-orth-normalize", "--mhs-collapse-aware"]
    expected = {"cond_orth_steps": 3, "cond_orth_exact": False, "cond_orth_normalize": True, "mhs_collapse_aware": True}
    assert term_options(parse_args(words)) == expected


def error_of(capsys, words):
    """The one line that a refused command line leaves on stderr."""
    with pytest.raises(SystemExit) as caught:
        parse_args(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: [1, 2\nepochs: 3", "--config"),
        ("lr 1", "--config"),
        ("- lr\n- epochs", "--config"),
        ("", "--config"),
        ("epoch: 3", "--epoch"),
        ("lr: fast", "--lr"),
        ("epochs: 2.5", "--epochs"),
        ("epochs: [3, 4]", ""),
        ("model_ema: 3", "--model-ema"),
        ("scale: 0.5", "--scale"),
        ("lr: true", "--lr"),
        ("emb_cos_within_coef: -1", "--emb-cos-within-coef"),
        ("sched: cosinus", "--sched"),
        ("batch_size: 33", "--batch-size"),
        ("1: 2", "--1"),
        ("\tlr: 1", "--config"),
        ("lr: \x00", "--config"),
    ],
)
def test_a_wrong_file_of_flags(tmp_path, capsys, text, named):
    assert named in error_of(capsys, ["--config", config(tmp_path, text)])


def test_a_missing_file_of_flags(tmp_path, capsys):
    assert "no.yaml" in error_of(capsys, ["--config", str(tmp_path / "no.yaml")])
    assert str(tmp_path) in error_of(capsys, ["--config", str(tmp_path)])


@pytest.mark.parametrize("flag", REMOVED)
def test_a_removed_flag_is_refused_with_a_hint_and_ignored_in_an_old_file(tmp_path, capsys, flag):
    for word in (flag, flag.replace("--", "--no-"), flag.replace("-", "_").replace("__", "--")):
        line = error_of(capsys, [word])
        assert "was removed: " in line and REMOVED[flag] in line
    name = flag.removeprefix("--").replace("-", "_")
    old = parse_args(["--config", config(tmp_path, f"{name}: false\nlr: 1e-3\n")])
    assert old.lr == 1e-3 and not hasattr(old, name)
    line = f"note: {flag} of an earlier version is ignored: {REMOVED[flag]}\n"
    assert capsys.readouterr().err == line


# Checks


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--batch-size 33", "--batch-size --mixup --cutmix"),
        ("--batch-size 33 --mixup 0", "--batch-size --cutmix"),
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
        ("--model-kwargs depth", "--model-kwargs"),
        ("--model-kwargs patch_size=4", "--model-kwargs --patch-size"),
        ("--opt adahessian", "--opt"),
        ("--seed 99999999999999999999", "--seed"),
    ],
)
def test_wrong_command_lines(capsys, words, named):
    line = error_of(capsys, words.split())
    assert all(flag in line for flag in named.split())


@pytest.mark.parametrize(
    "words",
    [
        "--batch-size 33 --eval --resume a.pth",
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
    "--no-model-ema --model-ema-decay 0.9 --model-ema-force-cpu": "model-ema-decay model-ema-force-cpu",
    "--mixup 0 --cutmix 0 --mixup-prob 0.5 --mixup-switch-prob 0.1 --mixup-mode pair": (
        "mixup-prob mixup-mode mixup-switch-prob"
    ),
    "--cutmix-minmax 0.2 0.8 --cutmix 0.5": "cutmix",
    "--no-repeated-aug --aug-repeats 2": "aug-repeats",
    "--reprob 0 --remode const --recount 3": "remode recount",
    "--color-jitter 0.1": "color-jitter",
    "--input-size 32 --scale 0.5 1 --ratio 1 1": "scale ratio",
    "--inat-category genus": "inat-category",
    "--lr-noise-pct 0.1 --lr-noise-std 2": "lr-noise-pct lr-noise-std",
    "--decay-rate 0.5 --decay-epochs 3 --patience-epochs 3": "decay-rate decay-epochs patience-epochs",
    "--sched plateau --decay-epochs 3 --decay-rate 0.5": "decay-epochs",
    "--sched step --patience-epochs 3 --decay-rate 0.5": "patience-epochs",
    "--resplit --world-size 4": "resplit world-size",
    "--input-size 32 --eval-crop-ratio 0.9": "eval-crop-ratio",
    "--mixup 0 --mixup-switch-prob 0.1": "mixup-switch-prob",
    "--cutmix 0 --mixup-switch-prob 0.1": "mixup-switch-prob",
    "--warmup-epochs 0 --warmup-lr 1e-5": "warmup-lr",
    "--data-set FAKE --data-path images": "data-path",
    "--momentum 0.5": "momentum",
    "--opt sgd --opt-eps 1e-3": "opt-eps",
    "--mixing-balance equal": "mixing-balance",
    "--emb-layers all --emb_grad_diversity_coef 1": "emb-layers",
    "--attn-layers all --attn_cos_cross_coef 1": "attn-layers",
    "--weight-groups fc1 --emb_so_coef 1": "weight-groups",
    "--cond-orth-steps 3 --weight_mha_so_coef 1": "cond-orth-steps",
    "--cond-orth-exact --cond-orth-normalize --emb_cond_orth_coef 1": "cond-orth-normalize",
    "--mhs-collapse-aware": "mhs-collapse-aware",
}


@pytest.mark.parametrize(("words", "named"), IDLE.items(), ids=IDLE)
def test_flags_without_effect_are_said(words, named):
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
        "--opt sgd --momentum 0.5",
        "--lr-noise 0.5 --lr-noise-pct 0.1",
        "--preset corrected",
        "--emb_mhs_coef 1 --mhs-collapse-aware --emb-layers all",
        "--weight_mha_cond_orth_in_coef 1 --cond-orth-steps 3 --cond-orth-normalize --weight-groups fc2",
        "--attn_so_coef 1 --attn-layers 0,2 --mixing_coef 1 --mixing-balance equal",
        "--resume auto --output-dir out --start-epoch 2",
    ],
)
def test_flags_with_effect_are_not(words):
    assert without_effect(parse_args(words.split())) == []
