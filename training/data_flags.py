"""The flags of main.py about images: augmentation, data sets and loaders."""

from argparse import BooleanOptionalAction as Switch

from diversity.mixing import MODES
from models.flag_types import positive_float, positive_int
from pipeline.evaluation_sets import paths_needed, sets_help
from pipeline.image_cache import PLACES
from pipeline.sources import SOURCES, sources_help
from pipeline.transforms import TORCHVISION_POLICIES
from training.flag_actions import named_paths
from training.parsing import (
    fraction,
    fraction_below_one,
    none_or_text,
    nonneg_float,
    nonneg_int,
    positive_fraction,
)


def add_augmentation(parser):
    """Add the group of augmentation, Mixup and CutMix to a parser."""
    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", type=none_or_text, default="rand-m9-mstd0.5-inc1", metavar="NAME",
        help=f"timm auto-augment, or torchvision's {' or '.join(TORCHVISION_POLICIES)}; none = off")  # fmt: skip
    add("--color-jitter", type=nonneg_float, default=0.4, help="strength without --aa, or with timm's 3a; 0 = off")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default=None,
        help="of training crops; None = --interpolation")  # fmt: skip
    add("--scale", type=fraction, nargs=2, default=[0.08, 1.0], metavar=("LOW", "HIGH"),
        help="area of random crops, as fractions of the image")  # fmt: skip
    add("--ratio", type=positive_float, nargs=2, default=[0.75, 4 / 3], metavar=("LOW", "HIGH"),
        help="aspect ratio of random crops")  # fmt: skip
    add("--hflip", type=fraction, default=0.5, help="probability of a horizontal flip; 0 = off")
    add("--repeated-aug", action=Switch, default=True,
        help="augment each drawn image --aug-repeats times")  # fmt: skip
    add("--aug-repeats", type=positive_int, default=3, help="copies of each image under --repeated-aug")
    add("--reprob", type=fraction, default=0.25, help="probability of random erasing; 0 = off")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what random erasing fills with")
    add("--recount", type=positive_int, default=1, help="largest number of boxes erased per image")
    add("--smoothing", type=fraction_below_one, default=0.1, help="label smoothing; 0 = off")
    add("--mixup", type=nonneg_float, default=0.8, metavar="ALPHA", help="alpha of Mixup; 0 = off")
    add("--cutmix", type=nonneg_float, default=1.0, metavar="ALPHA", help="alpha of CutMix; 0 = off")
    add("--cutmix-minmax", type=fraction, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="side of the CutMix box as a fraction of the image's side, instead of --cutmix")  # fmt: skip
    add("--mixup-prob", type=fraction, default=1.0, help="probability of mixing at all")
    add("--mixup-switch-prob", type=fraction, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", choices=MODES, default="batch", help="one draw per batch, pair or element")


def add_preprocessing(parser):
    """Add the group of what a model expects of its images to a parser."""
    add = parser.add_argument_group(
        "preprocessing",
        "None = as the weights of --finetune or --resume need it: what a checkpoint of this program was trained with; "
        "for other weights of --finetune, timm's configuration of --model; otherwise DeiT's, in brackets",
    ).add_argument
    add("--mean", type=fraction, nargs=3, default=None, metavar=("R", "G", "B"),
        help="subtracted from the colours, from 0 to 1 [0.485 0.456 0.406]")  # fmt: skip
    add("--std", type=positive_fraction, nargs=3, default=None, metavar=("R", "G", "B"),
        help="divides the colours, from 0 to 1 [0.229 0.224 0.225]")  # fmt: skip
    add("--interpolation", choices=("bilinear", "bicubic"), default=None,
        help="of validation images, of all images up to 32 px, and of what --cache-images keeps [bicubic]")  # fmt: skip
    add("--eval-crop-ratio", "--crop-pct", type=positive_float, default=None,
        help="cropped over resized side of a validation image, above 32 px [0.875]")  # fmt: skip
    add("--crop-mode", choices=("center", "squash", "border"), default=None,
        help="of validation images above 32 px: center = the middle; squash = resized to a square first; "
        "border = the whole image with borders [center]")  # fmt: skip


def add_data(parser):
    """Add the group of data sets, loaders and evaluation to a parser."""
    add = parser.add_argument_group("data").add_argument
    add("--data-set", default="IMNET", metavar="NAME", help=sources_help())
    no_path = " and ".join(name for name, source in SOURCES.items() if "data_path" not in source.flags)
    add("--data-path", default="", metavar="DIR", help=f"folder of the data; not needed by {no_path}")
    add("--train-split", "--train-dir", default="train", metavar="NAME", help="sub-folder or split to train on")
    add("--val-split", "--val-dir", default=None, metavar="NAME",
        help="sub-folder or split to evaluate on; None = val (folders) or validation (timm names)")  # fmt: skip
    add("--val-fraction", type=fraction_below_one, default=0.0, metavar="F",
        help="evaluate on this fraction of each class of the training images, in place of --val-split; the same images "
        "for all seeds, which are not trained on; 0 = off")  # fmt: skip
    add("--eval-sets", nargs="*", action=named_paths(paths_needed()), default=[], metavar="NAME=PATH",
        help=f"with --eval: the sets to evaluate on, in place of --data-set: {sets_help()}")  # fmt: skip
    add("--num-classes", type=positive_int, default=None,
        help="None = counted; needed for a data set without class names")  # fmt: skip
    add("--inat-category", default="name", help="iNaturalist label",
        choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"))  # fmt: skip
    add("--max-bad-images", type=nonneg_int, default=100,
        help="unreadable training images a process replaces before training stops")  # fmt: skip
    add("--num-workers", type=nonneg_int, default=None,
        help="loader processes per rank, half as many for evaluation; None = the cores this process may use, "
        "less two on a GPU machine, divided among the local ranks; at least 1")  # fmt: skip
    add("--loader-timeout", type=nonneg_int, default=600, metavar="SECONDS",
        help="longest wait for a loader process before the run stops with an error; 0 = no limit")  # fmt: skip
    add("--cache-images", choices=PLACES, default="none",
        help="decode all images once, at the start, into the memory of each process (memory) or of its device "
        "(device), and augment training images as a batch on it; none = read images in every epoch")  # fmt: skip
    add("--cache-size", type=positive_int, default=None, metavar="PIXELS",
        help="side of a cached training image, to which the whole image is resized, whatever its aspect ratio; "
        "None = --input-size up to 32 px, otherwise --input-size / 0.875")  # fmt: skip
    add("--pin-mem", action=Switch, default=True, help="page-locked batches on a GPU machine")
    add("--dist-eval", action=Switch, default=True,
        help="divide the validation images among the ranks; exact, no padding is counted")  # fmt: skip
