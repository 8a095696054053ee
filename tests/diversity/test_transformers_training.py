"""Models of transformers in training: checkpointing, precision, compilation, processes, copies, and what is refused."""

import ast
import json
import re

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from ranks import run_ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers_pairs import CLASSES, CONFIG, SIZE, make_pair

import diversity
from diversity.backbones import Backbone

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

COEFS = {"mixing": 1.0, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 0.1, "weight_mha_so": 0.1}
LABELS = torch.tensor([0, 3, 1, 4])


def images(dtype=torch.float64, size=SIZE):
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


def step(model, coefs=COEFS, call=None, dtype=torch.float64):
    """The terms of a step, and the gradients that it leaves."""
    loss_fn = diversity.DiverseLoss(model.train(), coefs, mixup=diversity.PatchMixup())
    np.random.seed(1)
    model.zero_grad()
    loss, terms = loss_fn(images(dtype), LABELS, call=call)
    loss.backward()
    loss_fn.tapped.close()
    return terms, [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def vit(**config):
    return make_pair("vit", transformers, **config)[0]


class TestWaysToTrain:
    def test_maps_do_not_depend_on_the_attention_implementation(self):
        fused, eager = vit(attn_implementation="sdpa"), vit(attn_implementation="eager")
        torch.testing.assert_close(step(fused), step(eager), rtol=1e-5, atol=1e-6)  # eager: softmax in float32
        assert fused.config._attn_implementation == "sdpa"

    def test_checkpointing(self):
        plain, checkpointed = vit(), vit()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(step(checkpointed), step(plain), rtol=1e-12, atol=1e-13)

    def test_reentrant_checkpointing_gives_maps_no_gradient(self):
        model = vit()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match=r"maps of block 0 have no gradient.*use_reentrant=False"):
            step(model)
        step(model, {"emb_cos_within": 0.5})  # reads no maps

    def test_frozen_queries_and_keys_need_no_gradient(self):
        model = vit()
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        terms, _ = step(model)
        assert terms["attn_cos_within"] > 0

    def test_autocast_and_half_precision(self):
        expected, _ = step(vit())
        model = vit().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms, gradients = step(model, dtype=torch.float32)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        torch.testing.assert_close(terms, expected, rtol=0.1, atol=0.02, check_dtype=False)
        assert terms["attn_cos_within"].dtype == torch.float32
        half = vit().bfloat16()
        tapped = diversity.TappedViT(half, {"attention"}).train()
        assert tapped(images(torch.bfloat16)).attention.dtype == torch.float32
        tapped.close()
        terms, _ = step(half, dtype=torch.bfloat16)
        torch.testing.assert_close(terms, expected, rtol=0.1, atol=0.05, check_dtype=False)

    def test_outputs_as_tuples(self):
        model = vit()
        found = step(model, call=lambda pixels: model(pixels, return_dict=False))
        torch.testing.assert_close(found, step(vit()), rtol=0, atol=0)

    def test_other_sizes_through_call(self):
        model = vit()
        loss_fn = diversity.DiverseLoss(model.train(), {"emb_cos_within": 1.0, "attn_cos_within": 1.0})
        larger = images(size=2 * SIZE)
        with pytest.raises(ValueError, match="size"):
            loss_fn(larger, LABELS)
        loss, _ = loss_fn(larger, LABELS, call=lambda pixels: model(pixels, interpolate_pos_encoding=True))
        assert loss.isfinite()

    def test_call_of_another_model_is_noticed(self):
        with pytest.raises(RuntimeError, match="did not fire"):
            step(vit(), call=vit())

    def test_copies_of_the_model_for_an_average_change_nothing(self):
        model = vit()
        loss_fn = diversity.DiverseLoss(model, COEFS)
        averaged = AveragedModel(model)
        of_loss = AveragedModel(loss_fn)
        averaged.update_parameters(loss_fn.model)
        of_loss.update_parameters(loss_fn)
        expected = model.eval()(images()).logits
        assert torch.equal(averaged.module.eval()(images()).logits, expected)
        assert torch.equal(of_loss.eval()(images()), expected)
        assert loss_fn.train()(images(), LABELS)[0].isfinite()

    def test_stock_files(self, tmp_path):
        model = vit().float()
        step(model, dtype=torch.float32)
        diversity.DiverseLoss(model, COEFS).model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded.eval()(images(torch.float32)).logits, model.eval()(images(torch.float32)).logits)

    def test_distillation_trains_the_second_head(self):
        class Towards(nn.Module):
            alpha = 0.5

            def forward(self, samples, logits):
                return logits.square().mean()

        model = make_pair("deit", transformers)[0].train()
        logits = model(images())
        loss_fn = diversity.DiverseLoss(model, {}, distillation=Towards())
        _, terms = loss_fn(images(), LABELS)
        assert terms["distillation"] == pytest.approx(logits.distillation_logits.square().mean().item())
        of_class = nn.functional.cross_entropy(logits.cls_logits, LABELS)
        assert terms["cls_ce"] == pytest.approx(of_class.item())

    @pytest.mark.slow
    def test_compiled(self):
        model = vit().float()
        expected = step(model, dtype=torch.float32)
        loss_fn = diversity.DiverseLoss(model.train(), COEFS, mixup=diversity.PatchMixup())
        loss_fn.compile_step(backend="aot_eager")
        np.random.seed(1)
        model.zero_grad()
        loss, terms = loss_fn(images(torch.float32), LABELS)
        loss.backward()
        found = terms, [parameter.grad for parameter in model.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("around", ["loss_fn", "model"])
    def test_two_processes(self, around):
        result = run_ranks(2, "tests/ddp_transformers.py", around)
        assert result.returncode == 0, result.stderr
        (differences,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert max(differences.values()) < 1e-12


class TestRefused:
    def test_models_without_a_classifier(self):
        model = transformers.ViTModel(transformers.ViTConfig(**CONFIG)).double()
        assert diversity.measure_redundancy(model, [images()])["images"] == 4
        with pytest.raises(diversity.TapError, match=r"logits: it has no classifier.*AutoModelForImageClassification"):
            diversity.DiverseLoss(model, {"emb_cos_within": 1.0})

    def test_dinov2_has_no_patch_logits(self):
        model = make_pair("dinov2", transformers)[0]
        with pytest.raises(
            diversity.TapError, match="`classifier` reads 48 features, and a patch token has 24"
        ) as error:
            diversity.DiverseLoss(model, {"mixing": 1.0})
        assert error.value.terms == ["mixing"]

    @pytest.mark.parametrize("name", ["CLIP", "Siglip"])
    def test_clip_and_siglip(self, name):
        config = {key: CONFIG[key] for key in CONFIG if key != "num_labels"} | {"hidden_size": 24}
        vision = getattr(transformers, f"{name}VisionModel")(getattr(transformers, f"{name}VisionConfig")(**config))
        with pytest.raises(diversity.TapError, match=r"self_attn.*timm has these weights, as vit_base") as error:
            diversity.measure_redundancy(vision, [])
        assert "\n" not in str(error.value)
        assert error.value.argument == "model"

    def test_other_families(self):
        config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
        model = transformers.ResNetForImageClassification(config)
        with pytest.raises(diversity.TapError, match=r"only ViT, DeiT, DINOv2 and BEiT models.*'resnet'"):
            diversity.TappedViT(model, {"last"})

    def test_wrappers_of_timm(self):
        config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=CLASSES)
        model = transformers.TimmWrapperForImageClassification(config)
        with pytest.raises(diversity.TapError, match=r"give `model\.timm_model` instead"):
            diversity.TappedViT(model, {"last"})
        diversity.TappedViT(model.timm_model, {"last"})

    def test_blocks_of_another_version(self):
        model = vit()
        model.vit.layers[1].attention = nn.Identity()
        with pytest.raises(diversity.TapError, match="update transformers"):
            diversity.TappedViT(model, {"last"})

    def test_remedies_and_function_level_measures_are_for_timm(self):
        with pytest.raises(diversity.RemedyError, match="not one of timm's"):
            diversity.apply_remedy(vit(), "attnscale")
        with pytest.raises(diversity.TapError, match="function-level measures: they need a model of timm"):
            diversity.measure_function(vit(), [(images(), LABELS)])

    def test_data_parallel(self):
        tapped = diversity.TappedViT(vit(), {"last"})
        with pytest.raises(TypeError, match=r"DataParallel.*torchrun"):
            tapped._replicate_for_data_parallel()
        with pytest.raises(TypeError, match="cannot run in DataParallel"):
            tapped.train()(images(), call=nn.DataParallel(tapped.model))

    def test_models_without_taps_train(self):
        config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, num_labels=CLASSES)
        model = transformers.ResNetForImageClassification(config).double()
        loss, _ = diversity.DiverseLoss(model, {})(images(), LABELS)
        loss.backward()
        assert all(parameter.grad.any() for parameter in model.classifier.parameters())


@pytest.mark.slow
def test_the_example_of_the_docs_runs():
    page = (REPOSITORY / "docs" / "your-own-loop.md").read_text()
    (example,) = [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "transformers" in text]
    names = {}
    exec(example, names)
    assert names["loss"].isfinite() and names["model"].classifier.weight.grad is not None
    assert {"mixing", "emb_cos_within", "attn_cos_within"} <= names["terms"].keys()


class TestGrid:
    def test_of_images_of_another_size(self):
        model = make_pair("dinov2", transformers)[0]
        backbone = Backbone.of(model)
        assert backbone.grid == (4, 4) and backbone.grid_of(images(size=48)) == (6, 6)
        report = diversity.measure_redundancy(model, [images(size=48)])
        assert all(value is not None for value in report["attention"]["distance"])

    def test_registers_are_prefix_tokens(self):
        model = make_pair("dinov2_with_registers", transformers)[0]
        output = diversity.TappedViT(model, {"last", "tokens"}).train()(images())
        assert output.last.shape[1] == 16 and output.tokens.shape[1] == 19


def test_transformers_is_not_imported():
    for path in (REPOSITORY / "diversity").rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        assert not [name for name in names if name.split(".")[0] == "transformers"], path
