"""evaluation.md: the tables of what evaluation.json contains, with the names of classes in words."""

from reports.evaluation_page import evaluation_page

CONTENT = {
    "weights": "runs/a/checkpoint.pth",
    "epoch": 299,
    "model": "deit_small_patch16_224",
    "preprocessing": "224 px",
    "sets": {
        "imagenet": {
            "notes": ["3 images of 2 classes"],
            "raw": {
                **{"images": 3000, "acc1": 200 / 3, "acc5": 100.0, "loss": 0.51239, "ece": 4.0},
                "classes": {
                    "n01440764": {"images": 2000, "acc1": 75.0},
                    **{f"class {i}": {"images": 40, "acc1": 100.0 - i} for i in range(25)},
                },
                "confusions": [{"label": "n01440764", "predicted": "n02077923", "count": 1500, "fraction": 75.0}],
            },
        },
        "real": {"notes": [], "ema": {"images": 2, "acc1": 50.0, "ece": 25.0, "mce": 76.7}},
    },
}

PAGE = """\
# Evaluation of runs/a/checkpoint.pth

deit_small_patch16_224, trained until epoch 299. 224 px.

| set      | weights | images | top-1, % | top-5, % | ECE, % | mCE, % | loss  |
| -------- | ------- | ------ | -------- | -------- | ------ | ------ | ----- |
| imagenet | raw     | 3,000  | 66.67    | 100.00   | 4.00   | -      | 0.512 |
| real     | EMA     | 2      | 50.00    | -        | 25.00  | 76.70  | -     |

## imagenet

- 3 images of 2 classes

Classes that are confused most often, raw weights:

| class                            | predicted as         | images | of the class, % |
| -------------------------------- | -------------------- | ------ | --------------- |
| n01440764 (tench, Tinca tinca)   | n02077923 (sea lion) | 1,500  | 75.0            |

The 20 of 26 classes with the lowest accuracy, raw weights:

"""


def squeezed(text):
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("| -")]


def test_the_page_has_the_tables_of_the_record():
    page = evaluation_page(CONTENT)
    head, rest = squeezed(page)[: len(squeezed(PAGE))], squeezed(page)[len(squeezed(PAGE)) :]
    assert head == squeezed(PAGE)
    assert rest[0] == "| class | images | top-1, % |"
    assert rest[1] == "| n01440764 (tench, Tinca tinca) | 2,000 | 75.00 |"
    assert rest[2] == "| class 24 | 40 | 76.00 |" and rest[20] == "| class 6 | 40 | 94.00 |"
    assert rest[21:] == ["", "## real"]


def test_columns_without_a_value_are_left_out_and_few_classes_are_all_listed():
    values = {"images": 2, "acc1": 50.0, "acc5": 100.0, "ece": 1.0, "loss": 0.1, "confusions": []}
    values["classes"] = {"bee": {"images": 2, "acc1": 50.0}}
    page = evaluation_page(CONTENT | {"epoch": None, "sets": {"a": {"raw": values}}})
    assert "mCE" not in page and "epoch" not in page and "confused" not in page
    assert squeezed(page)[-2:] == ["| class | images | top-1, % |", "| bee | 2 | 50.00 |"]
    assert "Accuracy of each class, raw weights:" in page
