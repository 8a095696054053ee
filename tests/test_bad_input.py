"""Whatever a user gets wrong ends in one line that names it and a non-zero exit, never in a traceback."""

import pytest
import torch
from helpers import BRIEF, CONVNET, FOLDER, TINY, TINY_MODEL, make_image_folder, run_main, run_process
from ranks import run_forked

from diversity import PRESETS, REGULARIZERS
from models import build_model
from training.flags import DEIT_3


def weights(path, **kwargs):
    """A checkpoint with the weights of the model of `TINY`, changed by `kwargs`."""
    kwargs = {"name": "deit_tiny_patch16_224_diverse", "num_classes": 10, **TINY_MODEL, **kwargs}
    torch.save({"model": build_model(**kwargs).state_dict()}, path)
    return path


# Flags


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--batch-size 15", "--batch-size --mixup --cutmix"),
        ("--input-size 30", "--input-size --patch-size"),
        ("--emb_cos_within_coef -1", "--emb-cos-within-coef"),
        ("--mixing_coef nan", "--mixing-coef"),
        ("--attn_cos_within_coef=inf", "--attn-cos-within-coef"),
        ("--emb_cos_witin_coef 1", "--emb-cos-within-coef"),
        ("--model deit_tinny_patch16_224", "--model deit_tiny_patch16_224"),
        ("--model-kwargs depht=2", "--model depht"),
        ("--model-kwargs embed_dim=25 num_heads=3", "--model 25"),
        ("--model-kwargs depth", "--model-kwargs depth"),
        ("--data-set CIFAR11", "--data-set CIFAR10"),
        ("--data-set digit", "--data-set DIGITS"),
        ("--data-set IMNET", "--data-set --data-path"),
        ("--data-set hfds", "--data-set hfds/"),
        ("--data-set tfds/mnist --data-path .", "--data-set tfds/mnist"),
        ("--data-set torch/cifar99 --data-path .", "--data-set torch/cifar99"),
        ("--opt adamww", "--opt adamw"),
        ("--opt-betas 0.9", "--opt-betas"),
        ("--opt-betas 0.9 1.5", "--opt-betas"),
        ("--aa rnd-m9", "--aa rnd-m9"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device cudaa", "--device cudaa"),
        ("--num-classes 3", "--num-classes 10"),
        ("--batch-size 2000", "--batch-size 2000"),
        ("--eval", "--eval --resume"),
        ("--no-such-flag", "--no-such-flag"),
        ("--preset paper", "--preset paper released corrected"),
        ("--preset", "--preset"),
        *((f"{flag} 1", f"{flag} DeiT III") for flag in DEIT_3),
        ("--scale_lr_flag --unscale-lr", "--scale-lr-flag --unscale-lr"),
        ("--output-dir caf\udce9", "caf UTF-8"),
        ("--mixing-balance half", "--mixing-balance tokens equal"),
        ("--emb-layers -1", "--emb-layers"),
        ("--emb-layers middle", "--emb-layers middle 0,5,11"),
        ("--attn-layers 0,,1", "--attn-layers 0,,1"),
        ("--weight-groups qkv,mlp", "--weight-groups mlp fc1"),
        ("--weight-groups=", "--weight-groups"),
        ("--cond-orth-steps 0", "--cond-orth-steps"),
        ("--cond-orth-steps 5 --cond-orth-exact", "--cond-orth-steps --cond-orth-exact"),
        ("--preset released --emb-layers 2", "--emb-layers deit_tiny --emb-cos-within-coef block 2 0 to 1"),
        ("--attn_so_coef 1 --attn-layers 0,7", "--attn-layers --attn-so-coef block 7 0 to 1"),
        ("--attn_mhs_coef 1 --model-kwargs num_heads=1 embed_dim=24", "--attn-mhs-coef deit_tiny single head"),
        ("--attn_cos_cross_coef 1 --model-kwargs depth=1", "--attn-cos-cross-coef deit_tiny single block"),
        ("--emb_so_coef 1 --patch-size 32", "--emb-so-coef deit_tiny single patch"),
        ("--mixing_coef 1 --model-kwargs patch_drop_rate=0.5", "--mixing-coef deit_tiny patch_drop_rate"),
    ],
)
def test_flags(refused, words, named):
    line = refused(*words.split())
    assert all(word in line for word in named.split())


def test_size_that_the_models_own_patches_do_not_divide(refused):
    line = refused("--input-size", 40, "--model", "vit_tiny_patch16_224", base=BRIEF)
    assert "--input-size 40" in line and "16" in line


@pytest.mark.parametrize("term", ["mixing", *REGULARIZERS])
def test_a_term_needs_a_transformer_that_it_knows(refused, term):
    flag = f"--{term.replace('_', '-')}-coef"
    line = refused(*CONVNET, flag, 1, base=BRIEF)
    assert "--model resnet10t" in line and flag in line and "ViT" in line


def test_every_term_that_an_unknown_family_lacks_is_named(refused):
    line = refused(*CONVNET, "--preset", "released", base=BRIEF)
    assert all(f"--{name.replace('_', '-')}-coef" in line for name in PRESETS["released"].coefs)


def test_a_convolutional_net_trains_without_terms(tmp_path, capsys):
    make_image_folder(tmp_path)
    run_main(*BRIEF, *FOLDER, tmp_path, *CONVNET, "--batch-size", 4)
    assert "test accuracy: raw" in capsys.readouterr().out


# Checkpoints


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of one epoch."""
    make_image_folder(tmp_path / "images")
    run_main(*TINY, *FOLDER, tmp_path / "images", "--output-dir", tmp_path / "run")
    return tmp_path / "run"


TEACHER = ("--distillation-type", "hard", "--teacher-model", "vit_tiny_patch16_224", "--teacher-path")


@pytest.mark.parametrize(
    "flags", [("--resume",), ("--finetune",), ("--eval", "--resume"), TEACHER], ids=lambda f: f[-1]
)
def test_files_that_are_missing_or_damaged(refused, tmp_path, flags):
    complete = weights(tmp_path / "complete.pth")
    (tmp_path / "truncated.pth").write_bytes(complete.read_bytes()[:-20_000])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("missing", "truncated", "empty", "text"):
        path = tmp_path / f"{name}.pth"
        assert refused(*flags, path).startswith(f"error: {flags[-1]} {path}")


@pytest.mark.parametrize(
    ("flags", "width", "others"), [("--finetune", 24, 29), ("--eval --resume", 24, 30), ("--eval --finetune", 24, 30),
                                   (" ".join(TEACHER), 192, 150)],
)  # fmt: skip
def test_files_of_another_shape(refused, tmp_path, flags, width, others):
    path = weights(tmp_path / "wide.pth", embed_dim=48)
    misfit = f"blocks.0.attn.proj.bias is [48] in the file and [{width}] in the model, and {others} more"
    flags = flags.split()
    assert refused(*flags, path) == f"error: {flags[-1]} {path} does not fit VisionTransformer: {misfit}"


def test_weights_alone_are_not_continued(refused, tmp_path):
    path = weights(tmp_path / "weights.pth")
    assert refused("--resume", path) == (
        f"error: --resume {path} has no epoch, lr_scheduler, optimizer, scaler; training continues from "
        "checkpoint.pth, other weights start a new run with --finetune"
    )


def test_weights_for_another_kind_of_model(refused, tmp_path):
    path = weights(tmp_path / "plain.pth")
    line = refused("--model", "deit_tiny_distilled_patch16_224", "--finetune", path)
    assert line.startswith(f"error: --finetune {path}")


def test_teacher_with_another_class_count(refused, tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(build_model("resnet10t", 7, 32).state_dict(), path)
    line = refused("--distillation-type", "soft", "--teacher-model", "resnet10t", "--teacher-path", path)
    assert line.startswith(f"error: --teacher-path {path}") and "[7]" in line and "[10]" in line


def test_unknown_teacher(refused, tmp_path):
    line = refused(
        "--distillation-type", "soft", "--teacher-model", "regnety_161", "--teacher-path", tmp_path / "no.pth"
    )
    assert "--teacher-model regnety_161" in line and "regnety_160" in line
    assert "--teacher-path" in refused("--distillation-type", "soft")


def test_resuming_a_run_of_another_kind(refused, run_folder):
    words = (*FOLDER, run_folder.parent / "images", "--epochs", 2, "--resume-with-changes")
    words += ("--resume", run_folder / "checkpoint.pth")
    for change in (("--model-kwargs", "depth=3", "embed_dim=24", "num_heads=3"), ("--opt", "sgd")):
        assert refused(*words, *change).startswith(f"error: --resume {run_folder / 'checkpoint.pth'}")
    assert "--finetune" in refused(*words[:-1], run_folder / "checkpoint_best.pth")
    run_main(*TINY, *words)


def test_resuming_a_finished_run(refused, run_folder, capsys):
    """It is an error, unless --resume auto found the checkpoint."""
    words, path = (*FOLDER, run_folder.parent / "images"), run_folder / "checkpoint.pth"
    for folder in ((), ("--output-dir", run_folder)):
        line = refused(*words, *folder, "--resume", path)
        advice = "raise --epochs with --resume-with-changes, or use --eval"
        assert line == f"error: --resume {path} has finished its 1 epochs; {advice}"
    run_main(*TINY, *words, "--output-dir", run_folder, "--resume", "auto")
    assert capsys.readouterr().out == f"{run_folder} has finished its 1 epochs\n"


# The run folder


def test_a_folder_that_holds_a_run(refused, run_folder):
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    line = refused(*FOLDER, run_folder.parent / "images", "--output-dir", run_folder)
    assert f"--output-dir {run_folder}" in line and "--resume" in line
    assert {path.name: path.read_bytes() for path in run_folder.iterdir()} == before


@pytest.mark.parametrize("place", ["file", "file/run", "folder"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "args.yaml").mkdir(parents=True)  # stands for a folder without permission, also as root
    assert f"--output-dir {tmp_path / place} cannot be written" in refused("--output-dir", tmp_path / place)


# From outside


@pytest.mark.parametrize(
    ("run", "words", "code", "named"),
    [
        (run_process, ("--emb_cos_within_coef", "-1"), 2, "--emb-cos-within-coef"),
        (run_forked, ("--data-set", "IMNET", "--data-path", "no/such/folder"), 1, "--data-path no/such/folder"),
    ],
)
def test_a_process_ends_with_one_line_and_a_code(run, words, code, named):
    process = run("main.py", *TINY, *words)
    assert process.returncode == code
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert named in process.stderr


def test_a_process_with_loader_workers_ends_with_one_line(tmp_path):
    make_image_folder(tmp_path)
    path = tmp_path / "train" / "cat" / "0.png"
    path.write_bytes(b"")
    words = (*FOLDER, tmp_path, "--num-workers", 2, "--max-bad-images", 0)
    process = run_forked("main.py", *TINY, *words)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: unreadable image {path}") and process.stderr.count("\n") == 1
