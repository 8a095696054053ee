"""Checkpoint files: written whole or not at all, read without running code from them, refused with one line."""

import argparse
import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

SETTINGS = {"weight_decay", "betas", "eps", "momentum", "initial_lr"}  # of an optimizer's group, from the flags
LAST = "checkpoint.pth"
BEST = {"acc1": "checkpoint_best.pth", "acc1_ema": "checkpoint_best_ema.pth"}


@dataclass
class TrainState:
    """Everything that changes while a run trains, and so everything a run continues from.

    Attributes:
        model: the stock timm model, not its wrappers, so that files hold timm's keys.
        epoch: the next epoch to train.
        best: {"acc1": percent, "acc1_ema": percent}, the best so far.
    """

    model: nn.Module
    model_ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    loss_scaler: torch.amp.GradScaler
    epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)

    def save(self, output_dir: Path, accuracies: dict[str, float], args: dict):
        """Write checkpoint.pth, and the weights alone as a best checkpoint where an accuracy is the best so far.

        Args:
            accuracies: the epoch's values for the keys of `BEST`; those of weights that are not kept are left out.
            args: the run's flags, kept in the files.
        """
        weights = {"acc1": self.model.state_dict()}
        if self.model_ema is not None:
            weights["acc1_ema"] = self.model_ema.module.state_dict()
        improved = [name for name in weights if accuracies[name] > self.best.get(name, -1.0)]
        self.best |= {name: accuracies[name] for name in improved}
        whole = {
            "model": weights["acc1"],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.loss_scaler.state_dict(),
            "epoch": self.epoch - 1,  # the finished one, as DeiT writes it
            "best": self.best,
            "args": args,
        }
        if self.model_ema is not None:
            whole["model_ema"] = weights["acc1_ema"]
        save(whole, output_dir / LAST)
        for name in improved:
            best = {"model": weights[name], "acc1": accuracies[name], "epoch": self.epoch - 1, "args": args}
            save(best, output_dir / BEST[name])

    def restore(self, checkpoint: dict, path: str):
        """Continue from a loaded checkpoint.pth, weights included.

        The schedule and the optimizer's settings stay those of the flags; timm's schedules depend on the epoch alone,
        except plateau's.

        Raises:
            SystemExit: it is of another model, of another optimizer, or holds weights alone.
        """
        missing = {"optimizer", "lr_scheduler", "scaler", "epoch"} - checkpoint.keys()
        if missing:
            raise SystemExit(
                f"error: --resume {path} holds no {', '.join(sorted(missing))}; "
                f"training continues from {LAST}, other weights start a new run with --finetune"
            )
        load_model_and_ema(self.model, self.model_ema, checkpoint, path)
        stored, own = (
            state["param_groups"][0].keys() for state in (checkpoint["optimizer"], self.optimizer.state_dict())
        )
        if stored != own:
            raise SystemExit(f"error: --resume {path} was written with another optimizer, see --opt")
        settings = [{key: group[key] for key in SETTINGS & group.keys()} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise SystemExit(f"error: --resume {path} was written with another optimizer: {error}") from None
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.epoch = checkpoint["epoch"] + 1
        if isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        else:
            self.scheduler.step(checkpoint["epoch"])
        if checkpoint["scaler"]:  # empty when the run so far did not scale its loss
            self.loss_scaler.load_state_dict(checkpoint["scaler"])
        self.best = checkpoint.get("best", {})


def load_model_and_ema(model: nn.Module, model_ema: ModelEmaV3 | None, checkpoint: dict, path: str):
    """Weights of a loaded checkpoint; an average it does not hold starts from its raw weights.

    Raises:
        SystemExit: the weights do not fit the model.
    """
    load_state_dict(model, checkpoint["model"], path, "--resume")
    if model_ema is not None:
        load_state_dict(model_ema.module, checkpoint.get("model_ema", checkpoint["model"]), path, "--resume")


def save(state: dict, path: Path):
    """Write `state` so that `path` holds either the old file or the new one, whenever the machine stops.

    The file is written beside the target, flushed to disk and renamed.

    Args:
        state: tensors, numbers, strings, dicts and lists only, so that `weights_only=True` can load it.
        path: the target.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: str, flag: str) -> dict:
    """A checkpoint of this program or of DeiT for `--resume`, from a file or an https URL.

    Raises:
        SystemExit: the file is missing, damaged, or not one of this program's.
    """
    path = _local_file(path, flag)
    with _readable(path, flag):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not _is_weights(checkpoint.get("model")):
        raise SystemExit(f"error: {flag} {path} holds no weights under 'model'; it is not a checkpoint of this program")
    return checkpoint


def origin(path: str, flag: str) -> tuple[dict, int | None]:
    """The flags that a checkpoint of this program was trained with, and its last epoch; {}, None for other files.

    Raises:
        SystemExit: the file is damaged.
    """
    if path.endswith(".safetensors"):
        return {}, None
    with _readable(path, flag):
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    args = stored.get("args") if isinstance(stored, dict) else None
    return (args, stored.get("epoch")) if isinstance(args, dict) else ({}, None)


def load_weights(model: nn.Module, path: str, flag: str, new_head: bool = True, use_ema: bool = False) -> list[str]:
    """Load weights in any of timm's and DeiT's layouts, to fine-tune from or to teach with.

    Position embeddings and patch embeddings of another size are resampled by timm. A classifier of another size is
    dropped when `new_head` is set, which leaves the model's own initial one.

    Args:
        model: a timm model.
        path: .pth or .safetensors file, or an https URL.
        flag: the flag that named it, for messages.
        use_ema: load the averaged weights.

    Returns:
        One line for each thing that did not go in as it was.

    Raises:
        SystemExit: the file is missing or damaged, or does not fit beyond the head.
    """
    path = _local_file(path, flag)
    with _readable(path, flag):
        if use_ema and "model_ema" not in torch.load(path, map_location="cpu", weights_only=True):
            raise SystemExit(f"error: {flag} {path} holds no averaged weights")
        weights = timm.models.load_state_dict(path, use_ema=use_ema, weights_only=True)
    if not _is_weights(weights):
        raise SystemExit(f"error: {flag} {path} holds no model weights")
    notes, own = [], model.state_dict()
    for name in _classifier_names(model):
        if new_head and _differs(name, weights, own):
            notes.append(f"{name} of shape {[*weights[name].shape]} dropped: the model needs {[*own[name].shape]}")
            del weights[name]
        elif new_head and name not in weights:
            notes.append(f"{name} is not in the file: it starts anew")
    resized = [name for name in ("pos_embed", "patch_embed.proj.weight") if _differs(name, weights, own)]
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        with contextlib.suppress(RuntimeError):  # what cannot be resampled is named as a misfit below
            weights = adapt(weights, model)
    for name in resized:
        if not _differs(name, weights, own):
            notes.append(f"{name} resampled to {[*own[name].shape]}")
    load_state_dict(model, weights, path, flag, may_miss=[note.split()[0] for note in notes])
    return notes


def load_state_dict(model: nn.Module, weights: dict, path: str, flag: str, may_miss: list[str] = ()):
    """model.load_state_dict that answers a misfit with one line that names the first tensor.

    Raises:
        SystemExit: a tensor is missing, unknown or of another shape.
    """
    own = model.state_dict()
    misfits = [
        f"{name} is {[*weights[name].shape]} in the file and {[*own[name].shape]} in the model"
        for name in own.keys() & weights.keys()
        if _differs(name, weights, own)
    ]
    misfits += [f"{name} is not in the file" for name in own.keys() - weights.keys() - set(may_miss)]
    misfits += [f"{name} is not in the model" for name in weights.keys() - own.keys()]
    if misfits:
        misfits.sort()
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise SystemExit(f"error: {flag} {path} does not fit {type(model).__name__}: {misfits[0]}{more}")
    model.load_state_dict(weights, strict=False)


def _classifier_names(model: nn.Module) -> list[str]:
    """state_dict names of the classifiers."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [
        f"{name}.{parameter}" if parameter else name
        for name, module in model.named_modules()
        if any(module is head for head in heads)
        for parameter in module.state_dict()
    ]


def _is_weights(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(tensor) for tensor in value.values())


def _differs(name: str, weights: dict, own: dict) -> bool:
    return name in weights and name in own and weights[name].shape != own[name].shape


def _local_file(path: str, flag: str) -> str:
    """A file on this machine: `path` itself, or what an https URL names, kept in torch's hub folder."""
    if not path.startswith("https://"):
        if not Path(path).is_file():
            raise SystemExit(f"error: {flag} {path}: there is no such file")
        return path
    local = Path(torch.hub.get_dir()) / "checkpoints" / path.rsplit("/", 1)[-1]
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path, str(local), progress=False)
        except OSError as error:
            raise SystemExit(f"error: {flag} {path} cannot be downloaded: {error}") from None
    return str(local)


@contextlib.contextmanager
def _readable(path: str, flag: str):
    """Turn whatever a damaged or foreign file makes torch raise into one line."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SystemExit(f"error: {flag} {path} cannot be read, it is truncated or no checkpoint ({reason})") from None
