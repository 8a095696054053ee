"""atlas.json: what an atlas has measured so far, on which images, and what it could not measure."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reports.runs import PROVENANCE
from utils import write_json

ATLAS = "atlas.json"
IMAGES = ("data_set", "split", "files", "images")
"""What all models of an atlas have in common; the rest of `measured_on` is each model's own."""


class OtherImagesError(SystemExit):
    """The atlas in the output folder was measured on other images than those of this call."""


@dataclass
class Atlas:
    """The content of an atlas.json.

    Attributes:
        images: `IMAGES` of all its models; None before the first one.
        models: {name: record}. A record has its family; `identity`, what must be equal for its numbers to serve again;
            its architecture in words; its preprocessing; `random`, the name of the record with the initial weights of
            its architecture, None for that one itself; time and versions; and the `report` of analyze.py.
        not_measured: {name: reason} of the last call.
    """

    images: dict | None = None
    models: dict[str, dict] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path):
        write_json(asdict(self), folder / ATLAS)

    def known(self, identity: dict, measured_on: dict) -> list[str]:
        """The names of the records that have the numbers of a model."""
        return [
            name
            for name, record in self.models.items()
            if record["identity"] == identity and record["report"]["measured_on"] == measured_on
        ]

    def families(self) -> Iterator[tuple[str, dict[str, dict]]]:
        """Each family with {name: record} of its models, and initial weights after the first model they belong to."""
        trained = {name: record for name, record in self.models.items() if record["random"] != name}
        for family in dict.fromkeys(record["family"] for record in trained.values()):
            of_family = {}
            for name, record in trained.items():
                if record["family"] == family:
                    of_family[name] = record
                    if record["random"] in self.models:
                        of_family.setdefault(record["random"], self.models[record["random"]])
            yield family, of_family


def read_atlas(folder: Path) -> Atlas:
    """The atlas of a folder; an empty one if there is none.

    Raises:
        SystemExit: the file is damaged, or of another program.
    """
    path = folder / ATLAS
    if not path.exists():
        return Atlas()
    try:
        atlas = Atlas(**json.loads(path.read_text(encoding="utf-8")))
        for record in atlas.models.values():
            _ = record["family"], record["identity"], record["random"], record["report"]["measured_on"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise SystemExit(f"error: {path} cannot be read or is of another version; move it away") from None
    return atlas


def images_of(measured_on: dict) -> dict:
    """What the models of an atlas have in common, of the `measured_on` of a report."""
    return {name: measured_on[name] for name in IMAGES}


def images_line(images: dict) -> str:
    """On which images an atlas was measured."""
    return ", ".join(PROVENANCE[name].format(images[name]) for name in IMAGES)
