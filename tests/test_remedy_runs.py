"""Runs with remedies, and with those of stock timm: training, stopping, averaging, evaluating, exporting, comparing."""

import pytest
import timm
import torch
import yaml
from analyzing import PLAIN_VIT, analyzed, measured, numbers, small_model
from cutting import InputRecorder, content, cut_run, records
from helpers import TINY, few_digits, log_of, parse, run_main
from ranks import run_ranks

import table
from diversity import REMEDIES, apply_remedy
from models.weights import load_weights
from training import checkpoint
from training.build import build_initial, build_optimizer

SHORT = (
    *(*TINY, "--epochs", 2, "--batch-size", 32, "--warmup-epochs", 0, "--lr", 4e-3, "--unscale-lr"),
    *("--model-ema-decay", 0.5, "--save-every-minutes", 0, "--mixing_coef", 1, "--emb_cos_within_coef", 0.5),
)
"""Flags of a run of six steps."""

SEVERAL = (
    *("--remedy", "attnscale", "laplacian", "value_residual", "contranorm", "ortho_residual"),
    *("--remedy-kwargs", "laplacian_heads=1"),
)
"""One remedy of each kind: it has parameters, changes heads, values, what a branch reads, and what it adds."""

WITH_BUFFERS = (
    *("--remedy", "reattention", "gfsa", "featscale", "value_residual"),
    *("--remedy-kwargs", "value_residual_learnable=True"),
)
"""Remedies with parameters of other shapes, and with running statistics."""

STOCK = {
    "differential attention": ("--model-kwargs", *TINY[-3:], "attn_layer=diff"),
    "registers": ("--model-kwargs", *TINY[-3:], "reg_tokens=4"),
    "LayerScale": ("--model-kwargs", *TINY[-3:], "init_values=1e-5"),
    "Muon": ("--opt", "muon"),
}


@pytest.fixture(scope="module", autouse=True)
def digits():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with `SEVERAL`: its folder, and its weights before the first step and after each."""
    folder, weights = tmp_path_factory.mktemp("remedies") / "several" / "seed0", []

    def keep(moment, *_):
        if moment == "step":
            weights.append({name: value.clone() for name, value in recorder.state.model.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        recorder = InputRecorder(patch.setattr, keep)
        run_main(*SHORT, *SEVERAL, "--output-dir", folder)
    initial = build_initial(parse(*SHORT[len(TINY) :], *SEVERAL), 10).state_dict()
    return folder, [initial, *weights]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remedies") / "plain" / "seed0"
    run_main(*SHORT, "--output-dir", folder)
    return folder


def stored(folder):
    return torch.load(folder / checkpoint.LAST, weights_only=True)


def apply_several(model):
    for name in SEVERAL[1:6]:
        apply_remedy(model, name, **({"laplacian_heads": 1} if name == "laplacian" else {}))


def test_remedies_are_trained_and_saved_beside_the_keys_of_the_stock_model(trained, plain):
    folder, weights = trained
    saved = stored(folder)["model"]
    assert [*saved][: -len(saved) + len(stored(plain)["model"])] == [*stored(plain)["model"]]
    own = [name for name in saved if name.startswith("remedies.")]
    assert {name.split(".")[1] for name in own} == {"attnscale"} and len(own) == 2
    assert all(torch.equal(weights[0][name], torch.zeros(3)) and saved[name].all() for name in own)
    assert all(weights[-1][name].equal(saved[name]) for name in saved)


def test_without_decay(trained):
    args = parse(*SHORT[len(TINY) :], *SEVERAL)
    model = build_initial(args, 10)
    decayed = {p for g in build_optimizer(args, model, 1e-3).param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed and not decayed & {*model.remedies.parameters()}


def test_the_initial_weights_of_the_stock_model_stay(trained, plain):
    initial = build_initial(parse(*SHORT[len(TINY) :]), 10).state_dict()
    assert all(torch.equal(value, trained[1][0][name]) for name, value in initial.items())


def test_the_average_equals_one_by_hand(trained):
    folder, weights = trained
    average = stored(folder)["model_ema"]
    assert average.keys() == weights[0].keys() and len(weights) == 7
    for name, value in average.items():
        expected = weights[0][name].double()
        for step in weights[1:]:
            expected = 0.5 * expected + 0.5 * step[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flags", [SEVERAL, WITH_BUFFERS, *STOCK.values()], ids=["several", "buffers", *STOCK])
def test_a_stopped_run_ends_as_one_that_was_not_stopped(flags, trained, tmp_path, monkeypatch):
    whole = trained[0] if flags is SEVERAL else tmp_path / "whole"
    if flags is not SEVERAL:
        flags = (*flags, "--epochs", 1)
        run_main(*SHORT, *flags, "--output-dir", whole)
    cut_run(monkeypatch, tmp_path / "run", (0, 2), flags=(*SHORT, *flags))
    assert content(tmp_path / "run") == content(whole)
    assert records(tmp_path / "run") == records(whole)
    assert all(record["train_skipped_steps"] == 0 for record in records(whole))


def test_a_run_names_its_remedies_and_an_evaluation_takes_them_from_the_checkpoint(trained, capsys):
    folder, _ = trained
    lines = (folder / "objective.txt").read_text().splitlines()
    names = [name for name in REMEDIES if name in SEVERAL]
    assert [line.split()[1] for line in lines if line.startswith("remedy ")] == names
    assert "remedy laplacian laplacian_heads=1" in lines
    capsys.readouterr()
    run_main("--eval", "--resume", folder / checkpoint.LAST, *("--device", "cpu", "--num-workers", 0))
    record = log_of(folder)[-1]
    accuracies = f"raw {record['test_acc1']:.2f} %, EMA {record['test_acc1_ema']:.2f} %"
    assert accuracies in capsys.readouterr().out


def test_a_run_is_repeated_from_its_args_yaml(trained, tmp_path):
    folder, _ = trained
    flags = yaml.safe_load((folder / "args.yaml").read_text())
    assert flags["remedy"] == [name for name in REMEDIES if name in SEVERAL]
    run_main("--config", folder / "args.yaml", "--output-dir", tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)


def test_the_stock_keys_load_into_stock_timm(trained):
    folder, _ = trained
    size = dict(num_classes=10, img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
    model, saved = timm.create_model("deit_tiny_patch16_224", **size), stored(folder)["model"]
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not missing and unexpected == [name for name in saved if name.startswith("remedies.")]
    apply_several(model)
    model.load_state_dict(saved)  # strictly


def test_other_remedies_are_another_model(trained, plain, refused):
    folder, _ = trained
    resume = ("--resume", folder / checkpoint.LAST, "--resume-with-changes", "--epochs", 3)
    base = (*SHORT, *SEVERAL)
    several = " ".join(name for name in REMEDIES if name in SEVERAL)
    assert f"has another model: --remedy {several} -> none, " in refused(*resume, base=SHORT)
    line = refused(*resume, "--remedy", "laplacian", "xsa", base=base)
    assert f"has another model: --remedy {several} -> laplacian xsa; " in line
    assert "--remedy-kwargs laplacian_heads=1 -> none" in refused(*resume, "--remedy-kwargs", base=base)
    line = refused("--resume", plain / checkpoint.LAST, "--remedy", "xsa", base=SHORT)
    assert "has another model: --remedy none -> xsa" in line
    line = refused("--eval", "--resume", plain / checkpoint.LAST, "--remedy", "xsa", base=())
    assert "--remedy is xsa, but the checkpoint's model has none" in line


def test_weights_of_a_run_with_remedies_need_a_model_with_them(trained, refused):
    folder, _ = trained
    line = refused("--finetune", folder / checkpoint.LAST)
    assert "was trained with --remedy attnscale contranorm laplacian ortho_residual value_residual, which" in line
    line = refused("--finetune", folder / checkpoint.LAST, *SEVERAL, "--remedy", "attnscale", "laplacian")
    assert "was trained with --remedy contranorm ortho_residual value_residual, which the model does not" in line
    teacher = ("--distillation-type", "soft", "--teacher-model", "deit_tiny_patch16_224", "--teacher-path")
    assert "--teacher-path" in refused(*teacher, folder / checkpoint.LAST, *SEVERAL)


def test_fine_tuning_from_stock_weights_keeps_initial_parameters(plain, tmp_path, capsys):
    capsys.readouterr()
    flags = ("--finetune", plain / checkpoint.LAST, "--remedy", "attnscale", "xsa", "--lr", 1e-30)
    run_main(*SHORT, *flags, "--epochs", 1, "--output-dir", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "--remedy attnscale: its parameters are not in the file and keep their initial values" in lines
    assert "--remedy xsa: the weights of the file were trained without it" in lines
    saved, before = stored(tmp_path)["model"], stored(plain)["model"]
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_weights_of_other_settings_are_noted(trained):
    folder, _ = trained
    model = build_initial(parse(*SHORT[len(TINY) :], *SEVERAL, "contranorm_scale=0.125"), 10)
    line = "--remedy-kwargs contranorm_scale=0.125: the weights of the file were trained with 0.01"
    assert load_weights(model, str(folder / checkpoint.LAST)) == [line]


def test_a_dry_run_with_remedies_writes_nothing(tmp_path, capsys):
    run_main(*SHORT, *SEVERAL, "--dry-run", "--output-dir", tmp_path / "run")
    assert "remedy ortho_residual" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--remedy atnscale", "--remedy atnscale is unknown; did you mean attnscale"),
        ("--remedy-kwargs laplacian_heads=1", "laplacian_heads=1 is a setting of laplacian; add laplacian to --remedy"),
        ("--remedy xsa --remedy-kwargs laplacian_heads=1", "laplacian_heads=1 is a setting of laplacian; add"),
        (
            "--remedy laplacian --remedy-kwargs laplacian_head=1",
            "laplacian_head is unknown; did you mean",
        ),
        ("--remedy xsa --remedy-kwargs key=1", "key is unknown; no chosen remedy has settings"),
        ("--remedy laplacian --remedy-kwargs key=1", "key is unknown; there are laplacian_heads"),
        ("--remedy laplacian --remedy-kwargs laplacian_heads=9", "--model deit_tiny_patch16_224_diverse with --remedy"),
        ("--remedy laplacian --remedy-kwargs laplacian_heads=half", "with --remedy laplacian: "),
        ("--remedy xsa --model resnet10t --model-kwargs channels=[8,8,8,8] stem_width=8", "with --remedy xsa: ResNet "),
        ("--remedy xsa --model-kwargs remedies=xsa", "--model-kwargs remedies: use --remedy"),
    ],
)
def test_wrong_remedies(flags, named, refused):
    base = TINY if "resnet" not in flags else [word for word in TINY if word not in ("--patch-size", "8")]
    assert named in refused(*flags.split(), base=base)


def test_runs_with_remedies_are_rows_of_one_table(trained, plain, tmp_path, capsys):
    registers = tmp_path / "registers" / "seed0"
    run_main(*SHORT, *STOCK["registers"], "--output-dir", registers)
    capsys.readouterr()
    table.main([str(trained[0].parents[1]), str(plain.parents[1]), str(tmp_path)])
    printed = capsys.readouterr().out
    assert "another table" not in printed
    assert all(f"| {name} " in printed for name in ("plain", "several", "registers"))
    assert "--remedy differs: none in plain, registers; " in printed and "in several" in printed
    assert "--model-kwargs reg_tokens differs: not set in plain, several; 4 in registers" in printed


def test_analyze_measures_a_run_with_its_remedies(trained, tmp_path, undrawn):
    report = analyzed(tmp_path, trained[0], "--num-images", 20)
    model = small_model("deit_tiny_patch16_224_diverse")
    apply_several(model)
    model.load_state_dict(stored(trained[0])["model"])
    assert numbers(report) == measured(model, 20)


def test_analyze_measures_published_weights_with_a_remedy(tmp_path, undrawn):
    model, path = small_model(), tmp_path / "published.pth"
    torch.save(model.state_dict(), path)
    overlay = f"pretrained_cfg_overlay={ {'file': str(path), 'num_classes': 10} }"
    words = (*PLAIN_VIT, overlay, "--remedy", "xsa", "--num-images", 20)
    report = analyzed(tmp_path, "deit_tiny_patch16_224", *words)
    apply_remedy(model, "xsa")
    assert numbers(report) == measured(model, 20)


@pytest.mark.parametrize(("remedy", "is_fused"), [("gfsa", True), ("reattention", False)])
def test_a_run_says_whether_attention_is_fused(remedy, is_fused, capsys):
    run_main(*SHORT, "--remedy", remedy, "--dry-run")
    assert ("fast path: fused attention" in capsys.readouterr().out) == is_fused


@pytest.mark.slow
@pytest.mark.parametrize(
    "remedies",
    [
        ("attnscale", "xsa", "gfsa"),
        ("value_residual", "neutreno", "contranorm", "ortho_residual"),
        ("reattention", "laplacian", "centered", "featscale"),
    ],
    ids=" ".join,
)
def test_a_compiled_run_trains_as_an_eager_one(remedies, tmp_path):
    for name, flag in (("eager", "--no-compile"), ("compiled", "--compile")):
        run_main(*SHORT, "--remedy", *remedies, flag, "--output-dir", tmp_path / name)
    eager, compiled = (log_of(tmp_path / name)[-1] for name in ("eager", "compiled"))
    for column in ("train_loss", "train_emb_cos_within", "test_loss", "test_loss_ema"):
        assert compiled[column] == pytest.approx(eager[column], rel=1e-4), column


def test_two_ranks_take_the_steps_of_one_process(tmp_path):
    still = ("--mixup", 0, "--cutmix", 0, "--aa", "none", "--reprob", 0, "--drop-path", 0, "--hflip", 0)
    flags = (*SHORT, *SEVERAL, *still, "--opt", "sgd", "--lr", 0.05, "--epochs", 1)
    for count in (1, 2):
        folder = tmp_path / str(count)
        words = (folder / "steps", "never", 0, "self", "TERM", *flags, "--batch-size", 32 // count)
        (folder / "steps").mkdir(parents=True)
        result = run_ranks(count, "tests/cutting.py", *words, "--output-dir", folder / "run")
        assert result.returncode == 0, result.stderr
    one, two = (stored(tmp_path / count / "run") for count in "12")
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, rtol=0, atol=1e-3 * value.abs().max().item())
        assert all(value.all() for name, value in one[key].items() if name.startswith("remedies."))
