"""The paper's DeiTs, registered with timm: stock architecture and state_dict keys.

timm itself has deit_{tiny,small,base}_patch16_224 and their distilled versions. This file adds the 24-layer DeiT-Small
and, for each model of the paper, a `_diverse` name that differs in one initial value: the class token is drawn from a
truncated normal of standard deviation 0.02, as in the paper's code, where timm draws it from a normal of 1e-6.
"""

import timm
from timm.layers import trunc_normal_
from timm.models import register_model


@register_model
def deit_small_layer24_patch16_224(pretrained=False, **kwargs):
    """DeiT-Small with 24 blocks in place of 12; there are no published weights to start it from."""
    return timm.create_model("deit_small_patch16_224", pretrained=pretrained, **{"depth": 24, **kwargs})


def _register_diverse(stock_name: str):
    def build(pretrained=False, **kwargs):
        """The stock model, its class token as the paper draws it unless trained weights are loaded."""
        model = timm.create_model(stock_name, pretrained=pretrained, **kwargs)
        if not pretrained and model.cls_token is not None:
            trunc_normal_(model.cls_token, std=0.02)
        return model

    build.__name__ = f"{stock_name}_diverse"
    register_model(build)


for name in ("deit_tiny", "deit_small", "deit_base", "deit_small_layer24"):
    _register_diverse(f"{name}_patch16_224")
