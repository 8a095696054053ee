"""Whether timm's published weights of a model can be had: from the cache, or from the hub of Hugging Face."""

from pathlib import Path

import timm
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

NETWORK_SECONDS = 5
FORMATS = (".safetensors", ".bin", ".pth", ".pt", ".npz")


def is_online() -> bool:
    """Whether the hub answers within seconds. Where it does not, the package is put offline, and not asked again.

    Otherwise the package tries again for a minute for each model.
    """
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=NETWORK_SECONDS)
        except Exception:  # of whichever library for HTTP the package uses
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def not_cached(run: str) -> SystemExit:
    """The error of a model whose weights cannot be had."""
    return SystemExit(
        f"error: the weights of {run} are not in the cache, and {constants.ENDPOINT} cannot be reached "
        "(no network, or HF_HUB_OFFLINE is set); give a checkpoint file"
    )


def require_weights(name: str):
    """Raise the `SystemExit` of `not_cached` before the model is built, which takes long where it is large.

    Args:
        name: of a timm model. One whose weights are not of the hub is not checked.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or config.file:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=config.hf_hub_id, repo_type="model")
    is_cached = any(path.suffix in FORMATS for path in folder.glob("snapshots/*/*"))
    if not is_cached and not is_online():
        raise not_cached(name)
