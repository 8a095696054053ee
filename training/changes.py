"""What a resumed run may change: its flags and its data are compared with those that the checkpoint contains."""

from collections.abc import Mapping
from typing import NamedTuple

from diversity import ALIASES, REGULARIZERS, resolve_aliases
from diversity.classification import MIXING
from pipeline.image_cache import side_of
from training.parsing import as_typed, flag_of, with_lists
from training.resuming import Checkpoint

MODEL = ("model", "patch_size", "model_kwargs")
REMEDIES = ("remedy", "remedy_kwargs")
"""Flags of the model too, by which the rows of an ablation may differ."""

PARAMETER_GROUPS = ("layer_decay", "freeze")
"""Flags by which an optimizer has other groups of parameters."""

DATA = ("data_set", "inat_category", "num_classes", "val_fraction")
UNRELATED = {
    *("config", "resume", "resume_with_changes", "finetune", "start_epoch", "eval", "eval_sets", "preset", "data_path"),
    *(
        "checkpoint_key",
        "output_dir",
        "batch_size",
        "accum_steps",
    ),  # processes x batch size x accumulated steps are compared
    *("device", "num_workers", "loader_timeout", "pin_mem", "dist_eval", "repeats_together", "max_bad_images"),
    *("save_every_steps", "save_every_minutes", "keep_checkpoints", "log_interval", "tensorboard", "save_predictions"),
    *("redundancy_every", "grad_norms_every", "check_data", "dry_run", "model_ema_force_cpu", "max_nonfinite_steps"),
    *("compile", "compile_mode", "fused_attn", "channels_last", "patch_product", "static_graph", "grad_checkpointing"),
    *("deterministic", "dist_url", "world_size", "local_rank", "scale_lr_flag", "resplit"),
}
"""Flags that change neither what is trained nor, beyond rounding, its numbers."""

FREE_SCHEDULES = ("constant", "step", "plateau")  # their rates do not depend on the number of epochs


class Change(NamedTuple):
    """A flag, or a number of the run such as "training images", before and after a resume."""

    name: str
    before: object
    after: object

    def __str__(self):
        return f"{self.name} {as_typed(self.before)} -> {as_typed(self.after)}"


def find_changes(
    checkpoint: Checkpoint, args: Mapping, defaults: Mapping, data: Mapping, global_batch: int, allowed: bool
) -> list[Change]:
    """What differs between a checkpoint and the run that continues from it, where it changes the training.

    Args:
        checkpoint: from `find_checkpoint`; nothing differs from an empty one.
        args: the flags, by their names in Python.
        defaults: of the flags, for those that the checkpoint does not have.
        data: `Data.description` of the run.
        global_batch: images per optimizer step.
        allowed: whether changes of the training are wanted.

    Raises:
        SystemExit: the model, the labels, --val-fraction, the groups of parameters, or the images of an epoch that has
            begun differ; or something else, and changes are not `allowed`.
    """
    path, stored = checkpoint
    if not path:
        return []
    before = stored["args"] if isinstance(stored.get("args"), Mapping) else args  # DeiT's are a namespace
    changes = _changed_flags(*(_comparable(with_lists({**defaults, **flags})) for flags in (before, args)))
    numbers = {"global_batch": "images per optimizer step", "train_images": "training images"}
    numbers |= {"val_images": "validation images"}
    old, new = {**stored.get("data", {}), **stored}, {**data, "global_batch": global_batch}
    counts = [Change(text, old[key], new[key]) for key, text in numbers.items() if old.get(key, new[key]) != new[key]]
    for fixed, what in ((("input_size", *MODEL, *REMEDIES), "model"), (DATA, "data set")):
        if other := [change for change in changes if change.name in map(flag_of, fixed)]:
            raise SystemExit(
                f"error: --resume {path} has another {what}: {_listed(other)}; give the old values, or start a new run "
                "in another --output-dir"
            )
    if regrouped := [change for change in changes if _has_other_groups(change)]:
        raise SystemExit(
            f"error: --resume {path} has an optimizer with other groups of parameters: {_listed(regrouped)}; give the "
            "old values, or start a new run from the weights by --finetune, in another --output-dir"
        )
    if stored.get("step") and any(change.name != "validation images" for change in counts):
        raise SystemExit(
            f"error: --resume {path} is within an epoch that has other images: {_listed(counts)}; keep the images and "
            "processes x --batch-size x --accum-steps"
        )
    changes += counts
    if changes and not allowed:
        raise SystemExit(
            f"error: --resume {path} was trained differently: {_listed(changes)}; give the old values, or continue "
            "with the new ones by --resume-with-changes, which writes them to changes.jsonl"
        )
    return changes


def _changed_flags(before: Mapping, after: Mapping) -> list[Change]:
    """The flags that differ and change the training."""
    unrelated = {*UNRELATED, *(f"{alias}_coef" for alias in ALIASES)}
    if all(flags["sched"] in FREE_SCHEDULES and not flags["lr_noise"] for flags in (before, after)):
        unrelated |= {"epochs", "cooldown_epochs"}
    is_cached = "none" not in (before["cache_images"], after["cache_images"])
    unrelated |= {"cache_images" if is_cached else "cache_size"}  # the same batches from either memory
    return [
        Change(flag_of(name), before[name], after[name])
        for name in after
        if name not in unrelated and before[name] != after[name]
    ]


def _has_other_groups(change: Change) -> bool:
    is_another_factor = change.name == "--layer-decay" and None not in (change.before, change.after)
    return change.name in map(flag_of, PARAMETER_GROUPS) and not is_another_factor


def _comparable(flags: dict[str, object]) -> dict[str, object]:
    """The flags, with aliases of terms under the names of the terms, and with the size that cached images have."""
    coefs = {name: flags[f"{name}_coef"] for name in (MIXING, *REGULARIZERS, *ALIASES)}
    size = {"cache_size": side_of(flags["cache_size"], flags["input_size"])}
    return flags | {f"{name}_coef": coef for name, coef in resolve_aliases(coefs).items()} | size


def _listed(changes: list[Change]) -> str:
    return ", ".join(map(str, changes))
