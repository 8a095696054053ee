"""Run folders as main.py and analyze.py leave them, and the tables that table.py prints of them."""

import json
import re

import pytest
import yaml

import table
from reports import chosen_measures


def make_run(folder, seed=0, acc1=90.0, ema=None, epochs=2, done=None, finished=True, last=None, step0=None, **flags):
    """A run folder as main.py leaves it: accuracy rises by one point an epoch up to `acc1`, 100 images/s and more.

    Args:
        done: epochs in log.txt; None = all, 0 = no log.txt.
        last: changes of the last record.
        step0: the values of the first step.
    """
    folder.mkdir(parents=True)
    args = {"seed": seed, "epochs": epochs, "cooldown_epochs": 0, "output_dir": str(folder), "num_workers": seed}
    args |= {"lr": 5e-4, "data_set": "DIGITS", "val_split": None, "input_size": 32}
    (folder / "args.yaml").write_text(yaml.safe_dump(args | flags, sort_keys=False))
    done = epochs if done is None else done
    records = []
    for epoch in range(done):
        behind = done - 1 - epoch
        record = {"epoch": epoch, "train_loss": 1.0 + behind, "train_images_per_s": 100.0 + epoch, "test_loss": 0.5}
        record |= {"test_acc1": acc1 - behind} | ({} if ema is None else {"test_acc1_ema": ema - behind})
        records.append(record)
    if done:
        records[0] |= {"step0": step0} if step0 else {}
        records[-1] |= last or {}
        (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"epochs": done or epochs, "test_acc1": acc1}))
    return folder


def start(folder, data=None, **values):
    """Add a start of a run to its environment.json: one process on the images of `cifar`, or on other `data`."""
    images = {"name": "cifar", "path": "/data/cifar", "classes": 10, "train_images": 500, "val_images": 100}
    images |= {"train_digest": "aaaa", "val_digest": "bbbb"} | (data or {})
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    entry = {
        "processes": 1,
        "global_batch": 64,
        "learning_rate": 0.001,
        "torch": "2.11",
        "commit": "abc",
        "data": images,
    }
    path.write_text(json.dumps([*starts, entry | values]))
    return folder


def redundancy(*values):
    """The first of the default measures, as a record of log.txt has them."""
    measures = {
        f"redundancy_{name}": value for name, value in zip(chosen_measures.DEFAULT_MEASURES, values, strict=False)
    }
    return measures | {"redundancy_images": 64}


def report(folder, value=0.25, measure=chosen_measures.DEFAULT_MEASURES[0], **measured_on):
    """A redundancy.json as analyze.py leaves it in a run folder of two epochs."""
    on = {"data_set": "CIFAR10", "split": "test", "input_size": 224, "images": 512, "weights": "EMA", "epoch": 1}
    content = {"summary": {measure: value}, "measured_on": on | measured_on}
    (folder / "redundancy.json").write_text(json.dumps(content))
    return folder


def tabulated(capsys, *words):
    """What `python table.py *words` prints to stdout and to stderr."""
    table.main([str(word) for word in words])
    return capsys.readouterr()


def squeezed(text):
    """A text whose spaces follow each other no more: the rows of a table whatever the widths of its columns."""
    return re.sub(" +", " ", text)


def error_of(*words):
    with pytest.raises(SystemExit) as stop:
        table.main([str(word) for word in words])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message
