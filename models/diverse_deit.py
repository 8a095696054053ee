"""The paper's DeiTs, registered with timm: stock architecture and state_dict keys.

timm itself has deit_{tiny,small,base}_patch16_224 and their distilled versions. This file adds the 24-layer DeiT-Small
and, for each model of the paper, a `_diverse` name that differs in one initial value: the class token is drawn from a
truncated normal of standard deviation 0.02, as in the paper's code, where timm draws it from a normal of 1e-6.
"""

import timm
from timm.layers import trunc_normal_
from timm.models import register_model


def _diverse(stock_name, pretrained, **kwargs):
    """The stock model, its class token as the paper draws it unless trained weights are loaded."""
    model = timm.create_model(stock_name, pretrained=pretrained, **kwargs)
    if not pretrained and model.cls_token is not None:
        trunc_normal_(model.cls_token, std=0.02)
    return model


@register_model
def deit_tiny_patch16_224_diverse(pretrained=False, **kwargs):
    """DeiT-Tiny with the paper's class-token initialisation."""
    return _diverse("deit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def deit_small_patch16_224_diverse(pretrained=False, **kwargs):
    """DeiT-Small with the paper's class-token initialisation."""
    return _diverse("deit_small_patch16_224", pretrained, **kwargs)


@register_model
def deit_base_patch16_224_diverse(pretrained=False, **kwargs):
    """DeiT-Base with the paper's class-token initialisation."""
    return _diverse("deit_base_patch16_224", pretrained, **kwargs)


@register_model
def deit_small_layer24_patch16_224(pretrained=False, **kwargs):
    """DeiT-Small with 24 blocks in place of 12; there are no published weights to start it from."""
    return timm.create_model("deit_small_patch16_224", pretrained=pretrained, **{"depth": 24, **kwargs})


@register_model
def deit_small_layer24_patch16_224_diverse(pretrained=False, **kwargs):
    """24-layer DeiT-Small with the paper's class-token initialisation."""
    return _diverse("deit_small_layer24_patch16_224", pretrained, **kwargs)
