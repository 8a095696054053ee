"""Which files and folders of an image folder are images and classes."""

import pytest
from data_files import build
from helpers import FOLDER, TINY, make_image_folder, one_line, photo, run_main

from pipeline.image_folder import ImageFolder


def write_extra(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")


HIDDEN = [".DS_Store", ".cache/0.png", "cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/.git/a.txt"]
OTHERS = ["cat/list.txt", "cat/notes.TXT", "dog/README", "dog/0.png.part", "classes.csv", "dog/more/x.json"]
NOTE = "files left out for their extension in {}: 5 (.txt 2, .part 1, no extension 1, .json 1)"


@pytest.mark.parametrize("name", ["IMNET", "torch/image_folder"])
@pytest.mark.parametrize("parent", ["images", ".images"])
def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path, parent, name):
    root = make_image_folder(tmp_path / parent)
    for split in ("train", "val"):
        write_extra(root / split, HIDDEN)
    write_extra(root / "train", OTHERS)
    (root / "train/dog/more").mkdir(exist_ok=True)
    photo(50).save(root / "train/dog/more/deep.PNG")
    data = build("--data-set", name, "--data-path", root)
    paths = [path.removeprefix(f"{root}/train/") for path, _ in data.train.dataset.source.samples]
    images = [f"{animal}/{number}.png" for animal in ("cat", "dog") for number in range(4)]
    assert paths == [*images, "dog/more/deep.PNG"]
    assert data.num_val == 8
    assert data.lines() == ["2 classes: cat, dog", NOTE.format(root / "train")]


def test_many_kinds_of_files_are_named_on_one_short_line(tmp_path):
    make_image_folder(tmp_path, splits=("train",))
    write_extra(tmp_path / "train" / "cat", [f"{kind}.{kind}" for kind in "abcdefg"])
    line = ImageFolder(tmp_path / "train").note
    assert line == f"files left out for their extension in {tmp_path}/train: 7 (.a 1, .b 1, .c 1, .d 1, .e 1, ...)"


def test_a_class_without_images_is_named_with_what_it_has(refused, tmp_path):
    make_image_folder(tmp_path)
    write_extra(tmp_path / "train", ["fish/0.heic", "fish/1.heic", "fish/._2.png"])
    line = refused(*FOLDER, tmp_path)
    assert f"no valid file for the classes fish. files left out for their extension in {tmp_path}/train: 2" in line
    assert line.endswith("(.heic 2)")


def test_a_folder_with_hidden_classes_alone(tmp_path):
    write_extra(tmp_path, ["train/.cat/0.png", "val/.cat/0.png"])
    with pytest.raises(SystemExit) as caught:
        build("--data-set", "IMNET", "--data-path", tmp_path)
    one_line(caught, "no class folder", tmp_path)


def test_a_run_prints_its_classes_and_what_was_left_out(tmp_path, capsys):
    names = [f"class {number}" for number in range(12)]
    make_image_folder(tmp_path, classes=names, n=1)
    write_extra(tmp_path / "train", ["class 1/a.txt"])
    run_main(*TINY, *FOLDER, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "12 classes: class 0, class 1, class 10, ..." in lines
    assert f"files left out for their extension in {tmp_path}/train: 1 (.txt 1)" in lines
