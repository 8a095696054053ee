"""The folders of evaluation sets, and their classes among the outputs of a model. No image is read."""

import json
import pkgutil

import pytest
from helpers import one_line

from pipeline.classes import match_outputs
from pipeline.evaluation_set_classes import Outputs, name_outputs, open_sets
from pipeline.evaluation_sets import CORRUPTIONS, EVALUATION_SETS, EXTRA_CORRUPTIONS
from training.classification_metrics import ALEXNET_ERRORS

INFO = "_info/imagenet_{}.txt"
SYNSETS = pkgutil.get_data("timm.data", INFO.format("synsets")).decode().split()
SYNSETS_A = pkgutil.get_data("timm.data", INFO.format("a_synsets")).decode().split()
REAL = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
PUBLISHED = Outputs(SYNSETS, [])


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def opened(word, outputs=PUBLISHED):
    [each] = open_sets([word], outputs, None).sets
    return each


def labelled(each):
    """{path in the set: name of the class that its label stands for}"""
    labels = (each.classes[label] for _, label in each.images.samples)
    return dict(zip(each.images.names(), labels, strict=True))


def refusal(word, *named, outputs=PUBLISHED):
    with pytest.raises(SystemExit) as caught:
        open_sets([word], outputs, None)
    return one_line(caught, f"error: --eval-sets {word}: ", *named)


# Classes


def test_numbered_folders_are_classes_in_the_order_of_numbers(tmp_path):
    known = {0: "n01440764", 1: "n01443537", 2: "n01484850", 10: "n01530575", 100: "n01860187", 999: "n15075141"}
    touch(tmp_path, *(f"{number}/a.jpeg" for number in known), "README.txt", ".DS_Store/x.jpeg")
    each = opened(f"imagenet-v2={tmp_path}")
    assert labelled(each) == {f"{number}/a.jpeg": synset for number, synset in known.items()}
    assert sorted(label for _, label in each.images.samples) == [*known]
    by_synset = touch(tmp_path / "other", *(f"{synset}/a.jpeg" for synset in known.values()))
    assert {*labelled(opened(f"imagenet-v2={by_synset}")).values()} == {*known.values()}


@pytest.mark.parametrize("name", ["1000", "007", "-1"])
def test_a_number_that_is_no_class_is_refused(tmp_path, name):
    touch(tmp_path, "0/a.jpeg", f"{name}/a.jpeg")
    assert name in refusal(f"imagenet-v2={tmp_path}")


def test_numbered_folders_in_the_order_of_text_are_warned_of():
    names = sorted(map(str, range(1000)))
    labels, outputs, notes = match_outputs(names, [], is_training=False)
    assert not labels and outputs == names and "--eval-sets imagenet-v2=PATH" in notes[0]
    assert (
        match_outputs(names, [], is_training=True) == match_outputs(names, names, is_training=False) == ([], names, [])
    )


def test_only_the_published_classes_of_a_small_set_are_compared(tmp_path):
    touch(tmp_path, f"{SYNSETS_A[3]}/a.jpg", f"{SYNSETS_A[199]}/b.jpg")
    each = opened(f"imagenet-a={tmp_path}")
    assert each.classes == SYNSETS_A and [SYNSETS[output] for output in each.outputs] == SYNSETS_A
    assert [label for _, label in each.images.samples] == [3, 199] and each.num_classes == 2
    assert any("2 of 200 compared classes" in line for line in each.lines)
    assert any("only the 200 outputs" in line for line in each.lines)
    assert opened(f"imagenet-sketch={tmp_path}").outputs is None
    other = next(synset for synset in SYNSETS if synset not in SYNSETS_A)
    touch(tmp_path, f"{other}/c.jpg")
    assert other in refusal(f"imagenet-a={tmp_path}", "is not among the 200 synsets of ImageNet-A")


def test_outputs_in_another_order_are_found_by_name(tmp_path):
    names = [*reversed(SYNSETS)]
    touch(tmp_path, f"{SYNSETS_A[0]}/a.jpg", f"{SYNSETS_A[7]}/b.jpg")
    each = opened(f"imagenet-a={tmp_path}", Outputs(names, []))
    assert {names[each.outputs[label]] for _, label in each.images.samples} == {SYNSETS_A[0], SYNSETS_A[7]}
    each = opened(f"imagenet={tmp_path}", Outputs(names, []))
    assert {names[label] for _, label in each.images.samples} == {SYNSETS_A[0], SYNSETS_A[7]}


def test_images_of_classes_that_the_model_lacks_are_left_out_of_a_published_set_only(tmp_path):
    v2 = touch(tmp_path / "v2", "0/a.jpeg", "0/b.jpeg", "10/c.jpeg", "999/d.jpeg")
    outputs = Outputs([SYNSETS[999], "cat", SYNSETS[0]], [])
    each = opened(f"imagenet-v2={v2}", outputs)
    assert [label for _, label in each.images.samples] == [2, 2, 0]
    line = "1 images of 1 classes that the model does not have are left out: n01530575"
    assert f"warning: imagenet-v2: {line}" in each.lines
    refusal(f"imagenet-v2={v2}", "none of its classes, n01440764", "the model's: cat", outputs=Outputs(["cat"], []))
    some = touch(tmp_path / "some", f"{SYNSETS[0]}/a.png", "cat/a.png")
    assert any("2 of 3 compared classes" in line for line in opened(f"folder={some}", outputs).lines)
    touch(some, "dog/a.png")
    refusal(f"folder={some}", "dog is no class of the model, which has n15075141, cat, n01440764", outputs=outputs)
    note = "x.pth does not name its classes, so its outputs are taken for the 1000 synsets"
    touch(tmp_path / "pets", "cat/a.jpeg", "dog/b.jpeg")
    for folder in (tmp_path / "pets", touch(tmp_path / "pets", f"{SYNSETS[0]}/c.jpeg")):
        refusal(f"folder={folder}", "; " + note, outputs=name_outputs([], None, "x.pth"))


def test_outputs_have_the_names_of_the_file_or_of_imagenet():
    assert name_outputs(["cat", "dog"], None, "f.pth") == (["cat", "dog"], [])
    assert name_outputs(["cat", "dog"], 4, "f.pth").names == ["cat", "dog", "output 2", "output 3"]
    for number in (None, 1000):
        names, notes = name_outputs([], number, "f.pth")
        assert names == SYNSETS and "f.pth does not name its classes" in notes[0]
    with pytest.raises(SystemExit) as caught:
        name_outputs([], 6, "f.pth")
    one_line(caught, "f.pth does not name its 6 classes")


# Folders


def test_a_wrong_folder_ends_in_one_line(tmp_path):
    refusal(f"imagenet={tmp_path / 'none'}", "is not a folder")
    refusal(f"imagenet={tmp_path}", "has nothing in place of a folder for each class")
    touch(tmp_path / "flat", "ILSVRC2012_val_00000001.JPEG")
    refusal(f"imagenet={tmp_path / 'flat'}", "has images in place of a folder for each class")
    touch(tmp_path / "up", "train/n01440764/a.JPEG", "val/n01440764/a.JPEG")
    refusal(f"imagenet={tmp_path / 'up'}", "none of the 2 folders is among the 1000 synsets", "(found: train, val)")
    touch(tmp_path / "empty", "n01440764/a.JPEG", "n01443537/notes.txt")
    refusal(f"imagenet={tmp_path / 'empty'}", "n01443537", "has no image", ".txt 1")
    touch(tmp_path / "unknown", "n01440764/a.JPEG", "n99999999/a.JPEG")
    refusal(f"imagenet-sketch={tmp_path / 'unknown'}", "n99999999 is")
    refusal(f"imagenet-c={tmp_path / 'up'}", "has no folder of a corruption", "(found: train, val)")


def test_names_of_sets_are_unique_and_numbers_are_compared_with_the_published(tmp_path):
    roots = [touch(tmp_path / name, "0/a.jpeg") for name in ("first", "second")]
    sets = open_sets([f"imagenet-v2={root}" for root in roots], PUBLISHED, None)
    assert [each.label for each in sets.sets] == ["imagenet-v2", "imagenet-v2-2"]
    assert "warning: imagenet-v2: the folder has 1 images, and 10,000 are published" in sets.lines()
    assert sets.num_classes == 1000


# ReaL labels


def test_real_labels_are_those_of_the_number_in_the_name(tmp_path):
    several, none, one = 2, 1, 4
    assert [len(REAL[number - 1]) for number in (several, none, one)] == [2, 0, 1]
    numbers = {several: "ILSVRC2012_val_00000002.JPEG", none: "ILSVRC2012_val_00000001.JPEG"}
    numbers |= {one: "ILSVRC2012_val_00000004.png"}  # a resized copy, for example
    touch(tmp_path, *(f"n01440764/{name}" for name in numbers.values()))
    each = opened(f"imagenet-real={tmp_path}", Outputs([*reversed(SYNSETS)], []))
    right = dict(zip(each.images.names(), each.right, strict=True))
    for number, name in numbers.items():
        assert [999 - label for label in right[f"n01440764/{name}"]] == REAL[number - 1]
    assert any("2 of them with ReaL labels" in line for line in each.lines)


@pytest.mark.parametrize("name", ["cat.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"])
def test_real_labels_need_the_names_of_validation_images(tmp_path, name):
    touch(tmp_path, f"n01440764/{name}")
    refusal(f"imagenet-real={tmp_path}", f"not for n01440764/{name}")
    refusal(f"imagenet-real={tmp_path}", "the model lacks 999 of the 1000", outputs=Outputs(["n01440764"], []))


# ImageNet-C


def corrupted(root, skip=(), extra=(), group=""):
    parts = [f"{name}/{severity}" for name in CORRUPTIONS for severity in range(1, 6)]
    touch(root, *(f"{group}{part}/n01440764/{part[0]}.JPEG" for part in [*parts, *extra] if part not in skip))
    return root


@pytest.mark.parametrize("group", ["", "noise/"])
def test_every_corruption_and_severity_is_read(tmp_path, group):
    each = opened(f"imagenet-c={corrupted(tmp_path, group=group)}")
    assert [*each.images.parts] == [f"{name}/{severity}" for name in ALEXNET_ERRORS for severity in range(1, 6)]
    names = each.images.names()
    for part, images in each.images.parts.items():
        assert names[images] == [f"{group}{part}/n01440764/{part[0]}.JPEG"]
    assert not any("missing" in line for line in each.lines)
    assert each.entry.whole_image


def test_a_missing_severity_and_other_corruptions_are_listed(tmp_path):
    corrupted(tmp_path, skip=("fog/3", "snow/5"), extra=(f"{EXTRA_CORRUPTIONS[0]}/1",))
    each = opened(f"imagenet-c={tmp_path}")
    assert len(each.images) == 73 and "fog/3" not in each.images.parts
    line = "imagenet-c: 2 of 75 severities are missing: snow/5, fog/3; "
    assert f"{line}left out, as they are not in its mean: gaussian_blur" in each.lines


def test_corruptions_of_other_layouts_are_refused(tmp_path):
    touch(corrupted(tmp_path / "a"), "fog/6/n01440764/a.JPEG")
    refusal(f"imagenet-c={tmp_path / 'a'}", "fog has 6 in place of severities 1 to 5")
    touch(corrupted(tmp_path / "b"), "fog/5/n01443537/a.JPEG")
    refusal(f"imagenet-c={tmp_path / 'b'}", "fog/5 has other classes than the first severity: n01443537")
    touch(corrupted(tmp_path / "c"), "weather/fog/1/n01440764/a.JPEG")
    refusal(f"imagenet-c={tmp_path / 'c'}", "fog is at ")


def test_parts_count_the_images_of_the_models_classes(tmp_path):
    touch(tmp_path, *(f"fog/{s}/{synset}/a.JPEG" for s in (1, 2) for synset in ("n01440764", "n01443537", "n01484850")))
    touch(tmp_path, "fog/2/n01443537/b.JPEG")
    each = opened(f"imagenet-c={tmp_path}", Outputs(["n01484850", "n01443537"], []))
    assert each.images.parts == {"fog/1": slice(0, 2), "fog/2": slice(2, 5)}
    assert each.images.names()[2:] == [f"fog/2/{name}.JPEG" for name in ("n01443537/a", "n01443537/b", "n01484850/a")]


def test_the_registry_is_complete():
    assert {*CORRUPTIONS} == {*ALEXNET_ERRORS}
    sizes = {name: len(entry.classes()) for name, entry in EVALUATION_SETS.items()}
    small = {"imagenet-a": 200, "imagenet-r": 200, "folder": 0, "val": 0}
    assert sizes == {name: small.get(name, 1000) for name in EVALUATION_SETS}
