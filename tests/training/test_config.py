"""--config: files of flags, a run's args.yaml among them."""

import shlex

import pytest
import yaml
from flag_files import DEIT, config, error_of

from training.arguments import config_lines, parse_args
from training.flags import REMOVED

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


@pytest.mark.parametrize("words", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_run_prints_what_its_file_of_flags_resolved_to(tmp_path, words):
    args = parse_args(words)
    path = config(tmp_path, yaml.safe_dump(vars(args), sort_keys=False))
    lines = config_lines(parse_args(["--config", path, "--batch-size", "6"]))
    assert lines[0].startswith(f"config {path}:") and all(line.startswith("  ") for line in lines[1:])
    printed = shlex.split(" ".join(line.removeprefix("  ") for line in lines).removeprefix(f"config {path}:"))
    again = parse_args(printed)
    own = {"config", "resume", "start_epoch", "local_rank", "output_dir"}
    differing = {name for name, value in vars(args).items() if getattr(again, name) != value} - own
    assert differing == {"batch_size"} and again.batch_size == 6
    assert config_lines(args) == []


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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: [1, 2\nepochs: 3", "--config"),
        ("lr 1", "--config"),
        ("- lr\n- epochs", "--config"),
        ("", "--config"),
        ("epoch: 3", "flags.yaml: unknown argument --epoch=3; did you mean --epochs"),
        ("recipe: x.yaml\nrows: {plain: {}}", "is a study, which has rows of flags; train it by `python study.py"),
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


def test_a_file_of_flags_changes_those_of_its_base(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    config(tmp_path / "recipes", "epochs: 9\nlr: 0.1\nmodel_kwargs: {depth: 6}\npreset: corrected\naa: none\n")
    path = config(tmp_path, "base: recipes/flags.yaml\nlr: 0.2\nmodel_kwargs: {embed_dim: 96}\naa: rand-m6\n")
    monkeypatch.chdir("/")  # the base is beside the file, wherever the command is given
    args = parse_args(["--config", path, "--epochs", "8"])
    assert (args.epochs, args.lr, args.model_kwargs, args.preset) == (8, 0.2, {"embed_dim": 96}, "corrected")
    assert args.aa == "rand-m6" and not hasattr(args, "base")
    assert parse_args(["--config", str(tmp_path / "recipes" / "flags.yaml")]).epochs == 9
    (tmp_path / "third.yaml").write_text("base: flags.yaml\n")
    line = error_of(capsys, ["--config", str(tmp_path / "third.yaml")])
    assert "has a base too; name recipes/flags.yaml" in line
    (tmp_path / "third.yaml").write_text("base: absent.yaml\n")
    assert "absent.yaml cannot be read" in error_of(capsys, ["--config", str(tmp_path / "third.yaml")])


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


def test_a_fine_tuned_run_continues_from_a_file_with_its_args_yaml(tmp_path, capsys):
    words = ["--config", config(tmp_path, "finetune: first.pth\n")]
    args = parse_args([*words, "--resume", "second.pth"])
    assert (args.resume, args.finetune) == ("second.pth", "first.pth")
    assert "both name weights" in error_of(capsys, [*words, "--resume", "second.pth", "--finetune", "third.pth"])
    assert "both name weights" in error_of(capsys, ["--config", config(tmp_path, "finetune: a\nresume: b\n")])


def test_a_file_of_flags_wins_over_a_checkpoints(tmp_path):
    stored = {"lr": 0.1, "epochs": 7}
    args = parse_args(["--config", config(tmp_path, "epochs: 8\n")], stored)
    assert (args.lr, args.epochs) == (0.1, 8) and stored == {"lr": 0.1, "epochs": 7}
