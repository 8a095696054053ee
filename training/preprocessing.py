"""How images are preprocessed: as the flags say, otherwise as in the training of the weights that a run starts from."""

from argparse import Namespace
from pathlib import Path

from models import published_preprocessing
from models.weights import describe, local_file, origin
from pipeline.transforms import SMALL, Preprocessing
from training import checkpoint_files
from training.checkpoint import LAST

NAMES = ("mean", "std", "interpolation", "eval_crop_ratio", "crop_mode")


def fill_preprocessing(args: Namespace):
    """Set the flags of `NAMES` that were not given to the values that the run's first weights were trained with.

    These weights are those of --resume, otherwise those of --finetune. A flag that stays None has DeiT's value. The
    checkpoints of the run contain the flags after this, so nobody needs the first weights to resume or evaluate them.
    """
    known = _of_start(args)
    if args.input_size <= SMALL:  # nothing is cropped
        known |= {"eval_crop_ratio": None, "crop_mode": None}
    for name in NAMES:
        if getattr(args, name) is None:
            setattr(args, name, known.get(name))
    args.eval_crop_ratio = args.eval_crop_ratio or Preprocessing.eval_crop_ratio
    args.train_interpolation = args.train_interpolation or args.interpolation or Preprocessing.interpolation


def preprocessing_of(path: str, model: str) -> dict[str, object]:
    """{flag: value} of the preprocessing that weights were trained with; without a value it is DeiT's.

    A checkpoint of this program contains its flags. For any other file, timm's configuration of the model is used, and
    before it what an exported file says, such as timm's config.json beside it.
    A file that cannot be read has none; loading its weights reports the error.
    """
    try:
        return _stored(path) or published_preprocessing(model) | describe(local_file(path)).preprocessing
    except ValueError:
        return {}


def normalisation_warnings(args: Namespace) -> list[str]:
    """One line for each file of weights that were trained with another mean or standard deviation than the run's."""
    files = {"--finetune": (args.finetune, args.model)}
    if args.distillation_type != "none":
        files["--teacher-path"] = args.teacher_path, args.teacher_model
    lines = []
    for flag, (path, model) in files.items():
        known = preprocessing_of(path, model) if path else {}
        for name in ("mean", "std"):
            theirs, ours = (flags.get(name) or getattr(Preprocessing, name) for flags in (known, vars(args)))
            if known and [*theirs] != [*ours]:
                theirs, ours = (" ".join(map("{:g}".format, values)) for values in (theirs, ours))
                lines.append(f"the weights of {flag} were trained with --{name} {theirs}, and get images with {ours}")
    return lines


def _of_start(args: Namespace) -> dict[str, object]:
    """`preprocessing_of` the file whose weights the run starts from; {} if there is none."""
    resumed = checkpoint_files.candidates(Path(args.output_dir) / LAST) if args.resume == "auto" else [args.resume]
    for path in filter(None, map(str, resumed)):
        try:
            if stored := _stored(path):
                return stored
        except ValueError:  # damaged: the one before it is resumed
            continue
    return preprocessing_of(args.finetune, args.model) if args.finetune else {}


def _stored(path: str) -> dict[str, object]:
    """The preprocessing of a checkpoint of this program; {} for any other file.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    flags = origin(local_file(path)).flags
    return {name: flags.get(name) for name in NAMES} if "eval_crop_ratio" in flags else {}
