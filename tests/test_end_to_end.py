"""Whole runs on the scanned digits: through `python main.py`, through torchrun, and with every option of training."""

import json
import re

import pytest
import timm
import torch
import yaml
from helpers import TINY, data_options, few_digits, log_of, parse, run_main, run_process, world

from datasets import build_data
from diversity import PRESETS, REGULARIZERS
from engine import evaluate
from models import build_model

TERMS = ("--mixing_coef", "1", *(word for name in REGULARIZERS for word in (f"--{name}_coef", "0.01")))
RUN = (*TINY, *TERMS, "--batch-size", "64")
"""Flags of 20 steps an epoch on all digits."""


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Two epochs of a small diversified ViT in a real process inside a SLURM shell, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    command = ["main.py", *RUN, "--epochs", "2", "--log-interval", "8", "--tensorboard", "--output_dir", folder]
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    result = run_process(*command, environment=slurm)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_leaves_its_records(digits_run):
    folder, _ = digits_run
    names = {path.name.split(".out.tfevents")[0] for path in folder.iterdir()}
    assert names == {
        "args.yaml", "environment.json", "objective.txt", "log.txt", "events", "curves.png", "summary.json",
        "checkpoint.pth", "checkpoint.1.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth", ".lock",
    }  # fmt: skip
    assert yaml.safe_load((folder / "args.yaml").read_text())["epochs"] == 2
    records = log_of(folder)
    assert [record["epoch"] for record in records] == [0, 1]
    keys = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    keys |= {"train_grad_norm", "train_images_per_s", "train_data_wait", "test_acc1_ema", "bad_images"}
    keys |= {f"train_{name}{end}" for name in ("mixing", *REGULARIZERS) for end in ("", "_share")}
    assert keys <= records[0].keys()
    assert records[0]["test_images"] == 360
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 2 and summary["test_acc1_ema"] == records[1]["test_acc1_ema"]


def test_a_run_prints_what_a_reader_needs_and_no_warnings(digits_run):
    folder, result = digits_run
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("epoch "))
    header, (table, *_) = "\n".join(lines[:first]), [n for n, line in enumerate(lines) if line.startswith("term ")][2:]
    for word in (torch.__version__, timm.__version__, "commit", "cpu", "seed 0", "learning rate", *REGULARIZERS):
        assert word in header
    num = r"[-\d.e+]+"
    step = (
        rf"epoch \d +\d+/20  loss {num}  grad {num}  lr {num}  \d+ images/s  data wait \d+ %  eta (unknown|\d+:\d+:\d+)"
    )
    epoch = rf"epoch \d of 2: loss {num}, accuracy raw {num} %, EMA {num} %, \d+ images/s, data wait \d+ %"
    patterns = [*[step] * 4, epoch] * 2  # steps 0, 8, 16 and 19
    for line, pattern in zip(lines[first:table], patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    record = log_of(folder)[-1]
    for line, name in zip(lines[table + 1 :], ("cls_ce", "mixing", *REGULARIZERS), strict=False):
        value, share = record[f"train_{name}"], record[f"train_{name}_share"]
        assert line.split() == [name, f"{value:.4g}", f"{100 * share:.2f}", "%"]
    assert lines[-1] == f"run folder: {folder}"
    assert all(len(line) <= 100 for line in lines if str(folder) not in line)


def test_checkpoints_hold_no_code_and_timms_keys(digits_run):
    folder, _ = digits_run
    for name in ("checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"):
        model = timm.create_model(
            "deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3,
            checkpoint_path=str(folder / name),
        )  # fmt: skip
        stored = torch.load(folder / name, weights_only=True)
        weights = stored.get("model_ema", stored["model"])  # timm prefers an average where there is one
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_resume_continues_log_and_schedule_and_eval_repeats_the_last_accuracy(digits_run, tmp_path, capsys):
    folder, _ = digits_run
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("log.txt", "checkpoint.pth"):
        (copy / name).write_bytes((folder / name).read_bytes())
    resume = ["--resume", copy / "checkpoint.pth"]
    run_main(*RUN, "--epochs", 3, "--output_dir", copy, *resume, "--resume-with-changes")
    records = log_of(copy)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert records[:2] == log_of(folder)
    capsys.readouterr()
    run_main(*TINY, *resume, "--eval")
    accuracy = f"raw {records[-1]['test_acc1']:.2f} %, EMA {records[-1]['test_acc1_ema']:.2f} %"
    assert accuracy in capsys.readouterr().out


def test_a_run_that_was_stopped_before_its_summary_writes_it_after_resuming(digits_run, tmp_path):
    folder, _ = digits_run
    for name in ("log.txt", "checkpoint.pth"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    resume = ["--resume", tmp_path / "checkpoint.pth", "--output_dir", tmp_path]
    run_main(*RUN, "--epochs", 2, *resume)
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (tmp_path, folder))
    assert {**summary, "training_seconds": 0} == {**expected, "training_seconds": 0}
    assert log_of(tmp_path) == log_of(folder)
    with pytest.raises(SystemExit, match="has finished its 2 epochs"):
        run_main(*RUN, "--epochs", 2, *resume)


def test_resume_takes_schedule_and_settings_from_the_flags(digits_run, tmp_path, capsys, few_digits):
    folder, _ = digits_run
    (tmp_path / "run").mkdir()
    words = ["--resume", folder / "checkpoint.pth", "--output_dir", tmp_path / "run", "--epochs", 4]
    words += ["--resume-with-changes"]
    run_main(*RUN, *words, "--lr", 0.5, "--unscale-lr", "--warmup-epochs", 0, "--weight-decay", 0.3)
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == [2, 3]
    assert log_of(tmp_path / "run")[0]["train_lr"] > 0.1
    groups = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert "resume" not in yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())


def test_a_run_is_repeated_and_continued_from_its_args_yaml(tmp_path, few_digits):
    run_main(*TINY, *TERMS, "--seed", 3, "--output_dir", tmp_path / "run")
    record = ["--config", tmp_path / "run" / "args.yaml"]
    run_main(*record, "--output_dir", tmp_path / "again")
    run_main(*record, "--resume", tmp_path / "run" / "checkpoint.pth", "--epochs", 2, "--resume-with-changes")
    first, second = log_of(tmp_path / "run")
    (again,) = log_of(tmp_path / "again")
    assert again["train_loss"] == first["train_loss"]
    assert second["epoch"] == 1


def test_two_processes_train_accumulate_and_evaluate_each_image_once(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py")
    result = run_process(
        *launch, *TINY, *TERMS, "--accum-steps", 3, "--batch-size", 32, "--output_dir", tmp_path / "two"
    )
    assert result.returncode == 0, result.stderr
    (record,) = log_of(tmp_path / "two")
    assert record["test_images"] == record["test_images_ema"] == 360
    assert "192 images per optimizer step" in result.stdout
    assert result.stdout.count("at step 0, before any update") == 1
    assert result.stdout.count("run folder") == 1

    args = parse()
    torch.manual_seed(args.seed)
    model = build_model(args.model, 10, args.input_size, args.patch_size, **args.model_kwargs)
    matrices = [m.double() for block in model.blocks for m in block.attn.qkv.weight.detach().chunk(3)]
    gaps = [((matrix @ matrix.T - torch.eye(len(matrix))) ** 2).sum().item() for matrix in matrices]
    assert record["step0"]["weight_mha_so"] == pytest.approx(sum(gaps), rel=1e-5)  # the mean of the two ranks
    stored = torch.load(tmp_path / "two" / "checkpoint.pth", weights_only=True)
    for name, end in (("model", ""), ("model_ema", "_ema")):
        model.load_state_dict(stored[name])
        alone = evaluate(model, build_data(data_options(), world()).val, world())
        assert alone["loss"] == pytest.approx(record[f"test_loss{end}"], rel=1e-5), (
            "the ranks evaluated different weights"
        )
        assert alone["ece"] == pytest.approx(record[f"test_ece{end}"], rel=1e-4)


@pytest.fixture
def four_steps():
    """Digits for four steps of 64 images an epoch, or for one of 192."""
    with few_digits(512):
        yield


OPTIONS = {
    "no ema": "--no-model-ema",
    "ema in main memory": "--model-ema-force-cpu",
    "no mixing of images": "--mixup 0 --cutmix 0",
    "mixup alone, per pair": "--cutmix 0 --mixup-mode pair",
    "cutmix of bounded boxes, per element": "--cutmix-minmax 0.2 0.8 --mixup-mode elem --mixup-prob 0.5",
    "dropout and stochastic depth": "--drop 0.1 --drop-path 0.2",
    "no smoothing": "--smoothing 0",
    "clipping and accumulation": "--clip-grad 1 --accum-steps 3",
    "bf16": "--amp bf16",
    "fp16": "--amp fp16",
    "sgd with steps": "--opt sgd --sched step --decay-epochs 1",
    "plateau": "--sched plateau",
    "noise": "--lr-noise 0.1 0.9",
    "cool-down": "--cooldown-epochs 1",
    "plain shuffling, no augmentation": "--no-repeated-aug --aa none --reprob 0 --color-jitter 0 --hflip 0",
    "every rank evaluates all": "--no-dist-eval",
    "larger input, odd grid": "--input-size 60 --patch-size 12",
    "another timm model": "--model vit_tiny_patch16_224",
    "swin": "--model swin_tiny_patch4_window7_224 --patch-size 4 --model-kwargs window_size=4 embed_dim=12 "
    "depths=(2,2) num_heads=(2,4)",
    "eva": "--model eva02_tiny_patch14_224",
    "layers, matrices, settings": "--emb-layers all --attn-layers 0,1 --weight-groups qkv,proj,fc1,fc2 "
    "--mixing-balance equal --cond-orth-steps 3 --cond-orth-normalize --mhs-collapse-aware",
    "exact spectra": "--cond-orth-exact",
    "distilled model without a teacher": "--model deit_tiny_distilled_patch16_224",
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_with_all_terms(flags, tmp_path, four_steps):
    run_main(*TINY, *TERMS, *flags.split(), "--batch-size", 64, "--output_dir", tmp_path / "run")
    records = log_of(tmp_path / "run")
    assert len(records) == (2 if "cooldown" in flags else 1)
    assert records[0]["train_skipped_steps"] == 0
    assert all(value == value for value in records[0].values())  # no NaN
    assert ("test_acc1_ema" in records[0]) == ("--no-model-ema" not in flags)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_is_named_in_the_output(preset, tmp_path, capsys, few_digits):
    run_main(*TINY, "--preset", preset, "--mixing_coef", 0.5, "--output_dir", tmp_path / "run")
    (record,) = log_of(tmp_path / "run")
    table = (tmp_path / "run" / "objective.txt").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith(f"preset {preset}\n") and "mixing " in table and " 0.5 " in table
    for name in PRESETS[preset].coefs:
        assert f"train_{name}" in record and f"\n{name} " in table
    flags = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert {name: flags[f"{name}_coef"] for name in PRESETS[preset].coefs} == PRESETS[preset].coefs | {"mixing": 0.5}


def test_finetune_at_another_size_and_class_count(digits_run, tmp_path, capsys, few_digits):
    folder, _ = digits_run
    larger = ("--input-size", 48, "--num-classes", 12)
    run_main(*TINY, *TERMS, *larger, "--finetune", folder / "checkpoint_best.pth", "--output_dir", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "head.weight" in printed
    assert "pos_embed resampled" in printed
    assert len(log_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("model", ["deit_tiny_patch16_224_diverse", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("terms", [(), TERMS], ids=["plain", "diverse"])
def test_distillation(kind, model, terms, tmp_path, four_steps):
    teacher = tmp_path / "teacher.pth"
    small = timm.create_model("resnet10t", num_classes=10)
    torch.save(small.state_dict(), teacher)
    run_main(
        *TINY, *terms, "--model", model, "--batch-size", 64, "--output_dir", tmp_path / "run",
        "--distillation-type", kind, "--teacher-model", "resnet10t", "--teacher-path", teacher,
    )  # fmt: skip
    (record,) = log_of(tmp_path / "run")
    assert record["train_distillation"] > 0
    shares = [value for name, value in record.items() if name.endswith("_share")]
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, four_steps):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_main(*TINY, *TERMS, "--seed", seed, "--batch-size", 64, "--output_dir", tmp_path / name)
    losses = [log_of(tmp_path / name)[0]["train_loss"] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]
