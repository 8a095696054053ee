"""What `analyze.py --atlas` does: measure every model of a list beside its initial weights, and draw one page."""

import contextlib
import hashlib
import io
import itertools
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import timm
import torch

from diversity import MEASURES, TapError
from pipeline.transforms import preprocessing_line
from reports.atlas_list import Entry, read_entries
from reports.atlas_page import write_page
from reports.atlas_records import Atlas, OtherImagesError, images_line, images_of, read_atlas
from reports.published import require_weights
from reports.redundancy import measure
from reports.subjects import RANDOM, Subject, architecture, find_subject, images, kind_of, load_model
from training import arguments
from training.parsing import with_lists
from training.provenance import versions
from utils import BadImageError, World, lock_folder


def make_atlas(
    runs: list[str], num_images: int, output_dir: str | None, ema: bool, overwrite: bool, extra_measures: list[str],
    flags: list[str], world: World,
):  # fmt: skip
    """Measure what `output_dir` does not have yet of the models that RUNs name, and write its page.

    A model that cannot be measured is listed with the reason. For the arguments see the flags of analyze.py.

    Raises:
        SystemExit: no model can be measured, or the folder has an atlas of other images and not `overwrite`.
    """
    if world.size > 1:
        raise SystemExit("error: analyze.py is one process; start it without torchrun")
    entries = read_entries(runs)
    seed = arguments.parse_args(flags).seed  # and so an error in the flags is one of all models
    folder = Path(output_dir or "atlas")
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(folder, "--output-dir"))
        except OSError as error:
            raise SystemExit(f"error: --output-dir {folder} cannot be written: {error.strerror}") from None
        atlas = read_atlas(folder)
        atlas.not_measured = {}
        _Measuring(atlas, folder, num_images, ema, overwrite, extra_measures, flags, seed, world).all_of(entries)
        written = write_page(atlas, folder)
    print(f"written to {folder}: {', '.join(written)}")


@dataclass
class _Measuring:
    """The settings of one call, and the atlas that it adds to."""

    atlas: Atlas
    folder: Path
    num_images: int
    ema: bool
    overwrite: bool
    extra_measures: list[str]
    flags: list[str]
    seed: int
    world: World
    is_first: bool = True

    def all_of(self, entries: list[Entry]):
        """Measure the models that are new, and what they have beside them."""
        done = [self._try(entry) for entry in entries]
        if not any(done):
            name, reason = next(iter(self.atlas.not_measured.items()))
            number = f"none of the {len(entries)} models" if len(entries) > 1 else "the model"
            verb = "could be measured" if len(entries) > 1 else "could not be measured"
            raise SystemExit(f"error: {number} {verb}; {name}: {reason}")
        self.atlas.save(self.folder)

    def _try(self, entry: Entry) -> bool:
        """Measure a model and the initial weights of its architecture; whether that was possible."""
        with self._reason(entry.name):
            subject = _find(entry, [*entry.flags, *self.flags])
            if subject.seed is not None:
                raise SystemExit(f"{RANDOM} is beside every model of an atlas; leave it out")
            if subject.file is None and "pretrained_cfg_overlay" not in subject.model:
                require_weights(subject.model["name"])
            name = self._measured(entry.name, subject, entry.family or subject.model["name"].partition(".")[0])
            initial = _initial(subject, self.seed)
            with self._reason(f"{initial.run} of {name}"):
                self.atlas.models[name]["random"] = self._measured(initial.run, initial, None)
            return True
        return False

    @contextlib.contextmanager
    def _reason(self, name: str) -> Iterator[None]:
        """Note why the model `name` cannot be measured, in place of an error."""
        try:
            yield
        except (OtherImagesError, BadImageError, OSError):  # of all models
            raise
        except SystemExit as error:
            if not isinstance(error.code, str):  # a signal
                raise
            reason = error.code
        except (TapError, torch.OutOfMemoryError) as error:
            reason = str(error)
        except Exception as error:  # a mistake in the code of a model
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        else:
            return
        reason = " ".join(reason.split()).removeprefix("error: ")
        known = self.atlas.not_measured
        same = [other for other, of in known.items() if of.replace(other, "") == reason.replace(name, "")]
        known[name] = reason
        print(f"{name}: not measured{f', for the reason of {same[0]}' if same else f': {reason}'}")

    def _measured(self, name: str, subject: Subject, family: str | None) -> str:
        """Measure a model, unless the atlas has its numbers.

        Args:
            name: of its record; initial weights get another one where the name is taken.
            family: None for initial weights.

        Returns:
            The name of its record.
        """
        ema = self.ema and subject.seed is None
        source = images(subject, self.world, self.num_images, kind_of(subject, ema))
        self._check_images(source.measured_on)
        identity = self._identity(subject)
        known = self.atlas.known(identity, source.measured_on)
        if name in known or (known and family is None):
            name_of_record = name if name in known else known[0]
            self.atlas.models[name_of_record]["family"] = family
            print(f"{name}: measured before")
            return name_of_record
        if family is None:
            names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
            name = next(free for free in names if free not in self.atlas.models)
        model = load_model(subject, source.num_classes, ema, self.world)
        report = measure(subject, model, source, self.extra_measures)
        record = {
            "family": family,
            "identity": identity,
            "architecture": architecture(model),
            "preprocessing": preprocessing_line(subject.data),
            "random": name if family is None else None,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
            "report": report,
        }
        self.atlas.models[name] = record
        self.atlas.save(self.folder)  # so that a call that was stopped continues with the next model
        print(f"{name}: measured")
        return name

    def _check_images(self, measured_on: dict):
        """Take the images of the first model for all; refuse those of another one."""
        found, asked = self.atlas.images, images_of(measured_on)
        if self.is_first and found not in (None, asked) and not self.overwrite:
            raise OtherImagesError(
                f"error: the atlas in {self.folder} was measured on other images ({images_line(found)}) than these "
                f"({images_line(asked)}); choose another --output-dir, or replace it with --overwrite"
            )
        if self.is_first and found != asked:
            self.atlas.images, self.atlas.models = asked, {}
        elif found != asked:
            raise SystemExit(f"its images are others than those of the atlas: {images_line(asked)}")
        self.is_first = False

    def _identity(self, subject: Subject) -> dict:
        """What must be equal for the numbers of a model to serve again, besides the images."""
        chosen = [name for name, of in MEASURES.items() if not of.optional or name in self.extra_measures]
        model = subject.model["name"]
        return {
            "weights": _weights(subject),
            "model": with_lists(subject.model) | {"name": model if subject.seed is None else model.partition(".")[0]},
            "preprocessing": preprocessing_line(subject.data),
            "measures": chosen,
        }


def _find(entry: Entry, flags: list[str]) -> Subject:
    """The model of an entry; an error in its own flags is a line, too, which argparse prints."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            subject = find_subject(entry.run, flags)
    except SystemExit as error:
        if error.code == 2:
            raise SystemExit(printed.getvalue().removesuffix(" (--help lists every flag)\n")) from None
        raise
    sys.stderr.write(printed.getvalue())
    return subject


def _initial(subject: Subject, seed: int) -> Subject:
    """The architecture of a subject with the initial weights of a seed, on the same images."""
    own = {"file": None, "folder": None, "epoch": None, "classes": [], "flags": {}, "is_average": False}
    name = subject.model["name"].partition(".")[0]
    return subject._replace(run=f"{name}, initial weights", seed=seed, **own)


def _weights(subject: Subject) -> str:
    """Which weights a model has: the digest of their file, or where timm has them from, or the seed of initial ones."""
    if subject.seed is not None:
        return f"initial weights of seed {subject.seed}"
    if subject.file is not None:
        with open(subject.file, "rb") as file:
            return f"file {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    if overlay := subject.model.get("pretrained_cfg_overlay"):
        return f"published, with {overlay}"
    config = timm.get_pretrained_cfg(subject.model["name"])
    return f"published {config and (config.hf_hub_id or config.url or config.file)}"
