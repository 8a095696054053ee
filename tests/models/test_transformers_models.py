"""The models of transformers beside timm's models with their weights: the same outputs, from files and from memory."""

import pytest
import torch

from models import build_model, weights

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = SMALL | {"intermediate_size": 96}
SWIN = dict(image_size=56, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=7)
REGISTERS = "Dinov2WithRegisters"
BEIT = MLP | {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
BEIT_SHARED = MLP | {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
TIMM_SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}

CASES = {
    "ViT": ("ViTForImageClassification", "ViT", MLP, "vit_tiny_patch16_224", {}),
    "ViT without a classifier": ("ViTModel", "ViT", MLP, "vit_tiny_patch16_224", {}),
    "DeiT": ("DeiTForImageClassificationWithTeacher", "DeiT", MLP, "deit_tiny_distilled_patch16_224", {}),
    "BEiT": ("BeitForImageClassification", "Beit", BEIT, "beit_base_patch16_224", {}),
    "BEiT of the class token": (
        *("BeitForImageClassification", "Beit", BEIT | {"use_mean_pooling": False}),
        *("beit_base_patch16_224", {"global_pool": "token"}),
    ),
    "BEiT, shared": ("BeitForImageClassification", "Beit", BEIT_SHARED, "beit_base_patch16_224", TIMM_SHARED),
    "DINOv2": ("Dinov2Model", "Dinov2", SMALL, "vit_small_patch14_dinov2", {}),
    "DINOv2, SwiGLU": (
        *("Dinov2Model", "Dinov2", SMALL | {"use_swiglu_ffn": True}),
        *("vit_giant_patch14_dinov2", {"mlp_ratio": 128 / 24}),
    ),
    "DINOv2 with registers": (f"{REGISTERS}Model", REGISTERS, SMALL, "vit_small_patch14_reg4_dinov2", {}),
    "Swin": ("SwinForImageClassification", "Swin", SWIN, "swin_tiny_patch4_window7_224", {}),
}


def theirs_of(name):
    """A model of transformers, whose tensors are all random."""
    torch.manual_seed(0)
    model, config, kwargs, _, _ = CASES[name]
    config = getattr(transformers, f"{config}Config")(**kwargs, num_labels=5)
    return randomized(getattr(transformers, model)(config))


def randomized(model):
    """With larger values than the initial ones, beside which the epsilon of the layer norms would count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def ours_of(name):
    _, _, config, timm_name, options = CASES[name]
    size = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}
    if "Swin" in name:
        size = {key: config[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
    classes = 5 if "ForImage" in CASES[name][0] else 0
    return build_model(timm_name, classes, config["image_size"], **size, **options).eval()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("written_by", ["save_pretrained", "torch.save"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_outputs(tmp_path, name, written_by):
    theirs, ours = theirs_of(name), ours_of(name)
    if written_by == "save_pretrained":
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:  # as a LightningModule around it
        path = tmp_path / "last.ckpt"
        tensors = {f"model.{key}": tensor for key, tensor in theirs.state_dict().items()}
        torch.save({"state_dict": tensors}, path)
    weights.load_weights(ours, str(path), new_head=False)
    size = CASES[name][2]["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = theirs(images)
        if "ForImage" in CASES[name][0]:
            expected, found = output.logits, ours(images)
        else:
            expected, found = output.last_hidden_state, ours.forward_features(images)
    assert expected.std() > 0.1
    # the layer norms of ViT, DeiT and BEiT have another epsilon, of which a note warns
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_dinov2_classifier_reads_the_patches_too(tmp_path):
    """timm's head reads the class token alone: it is loaded only where the other half is zero, as we write it."""
    config = transformers.Dinov2Config(**SMALL, num_labels=5)
    theirs = transformers.Dinov2ForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_model("vit_small_patch14_dinov2", 5, 32, patch_size=8, depth=3, embed_dim=24, num_heads=3).eval()
    before = ours.head.weight.clone()
    path = str(tmp_path / "model.safetensors")
    notes = weights.load_weights(ours, path)
    assert "head.weight dropped: the classifier of transformers reads the mean of the patch tokens too" in notes
    assert torch.equal(ours.head.weight, before)
    with pytest.raises(ValueError, match=r"head\.bias is not in the file"):
        weights.load_weights(ours, path, new_head=False)
    written = weights.LAYOUTS["DINOv2 of transformers"].from_timm(ours.state_dict(), ours)
    theirs = transformers.Dinov2ForImageClassification.from_pretrained(None, config=config, state_dict=written).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, ours(images))


def test_the_encoder_of_vitmae(tmp_path):
    small = {f"decoder_{name}": 2 for name in ("num_hidden_layers", "num_attention_heads")}
    small |= {f"decoder_{name}": 16 for name in ("hidden_size", "intermediate_size")}
    config = transformers.ViTMAEConfig(**MLP, **small, mask_ratio=0.0)
    theirs = randomized(transformers.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)
    ours = ours_of("ViT without a classifier")
    notes = weights.load_weights(ours, str(tmp_path / "model.safetensors"))
    count = sum(name.startswith("decoder.") for name in theirs.state_dict())
    assert f"left out, as not behind that prefix: decoder. ({count} tensors)" in notes
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.vit(images, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
        torch.testing.assert_close(ours.forward_features(images), expected, rtol=1e-4, atol=1e-4)
