"""The programs of examples/: they run, train, log every term, and leave stock models."""

import json
import re
import sys

import pytest
import timm
import torch
from example_programs import EXACT_COEFS, load_example, weights
from helpers import REPOSITORY
from ranks import run_ranks

PROGRAMS = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py"))
PACKAGES = {"lightning_loop": ("lightning", "lightning"), "accelerate_loop": ("accelerate", "hf")}
PACKAGES["hf_trainer"] = ("transformers", "hf")


def example(name: str):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name][0], reason=f"the extra [{PACKAGES[name][1]}] is not installed")
    return load_example(name)


def test_every_program_is_known():
    assert set(PROGRAMS) == {"timm_loop", *PACKAGES}


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [(name, *of) for name, of in PACKAGES.items()] + [("hf_trainer", "accelerate", "hf")],
)
def test_missing_package(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"examples/{name}.py needs .*: pip install '\.\[{extra}\]'"):
        load_example(name)


def test_timm_loop(capsys):
    model, averaged = load_example("timm_loop").main(epochs=4)
    losses = [float(loss) for loss in re.findall(r" loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    stock = timm.create_model("deit_tiny_patch16_224", num_classes=4, **load_example("timm_loop").SIZE)
    stock.load_state_dict(model.state_dict())
    stock.load_state_dict(averaged.state_dict())


class TestLightning:
    def test_training(self):
        module = example("lightning_loop")
        trainer, model = module.main(epochs=2, enable_progress_bar=False, enable_model_summary=False)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert metrics["accuracy"] > 0.6
        assert {f"train/{term}" for term in ("loss", "cls_ce", *module.COEFS)} <= metrics.keys()
        assert trainer.model.loss_fn.training  # sanity validation and validation leave train mode
        timm.create_model("deit_tiny_patch16_224", num_classes=4, **module.SIZE).load_state_dict(model.state_dict())

    @pytest.mark.slow
    def test_accumulation_and_mixed_precision(self):
        options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        module = example("lightning_loop")
        trainer, _ = module.main(epochs=1, accumulate_grad_batches=2, precision="bf16-mixed", **options)
        assert trainer.global_step == 4
        assert trainer.callback_metrics["train/loss"].isfinite()

    @pytest.mark.slow
    def test_average_of_weights(self):
        options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        module = example("lightning_loop")
        callback = sys.modules["lightning"].pytorch.callbacks.EMAWeightAveraging(decay=0.5)
        averaged = weights(module.main(epochs=1, callbacks=[callback], **options)[1])
        raw = weights(module.main(epochs=1, **options)[1])
        assert averaged.isfinite().all() and not torch.equal(averaged, raw)


@pytest.fixture
def fresh_state():
    """Accelerate's state belongs to the process; without it every Accelerator takes the first one's settings."""
    state = pytest.importorskip("accelerate.state", reason="the extra [hf] is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
class TestAccelerate:
    def test_training(self, capsys):
        module = example("accelerate_loop")
        model = module.main(epochs=2, cpu=True)
        losses = [float(loss) for loss in re.findall(r": loss ([\d.]+)", capsys.readouterr().out)]
        assert losses[1] < losses[0]
        timm.create_model("deit_tiny_patch16_224", num_classes=4, **module.SIZE).load_state_dict(model.state_dict())

    @pytest.mark.slow
    def test_mixed_precision(self):
        model = example("accelerate_loop").main(epochs=1, cpu=True, mixed_precision="bf16")
        assert weights(model).isfinite().all() and weights(model).dtype == torch.float32

    def test_two_processes(self):
        expected = weights(example("accelerate_loop").main(epochs=1, coefs=EXACT_COEFS, mixup=False, cpu=True))
        result = run_ranks(2, "tests/ddp_accelerate.py")
        assert result.returncode == 0, result.stderr
        ranks = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        found = {line["rank"]: torch.tensor(line["weights"]) for line in ranks}
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-5)
