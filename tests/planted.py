"""Files with code, which would write a file where it runs."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import torch
from helpers import model_of

CONTAINS_CODE = "contains pickled code (builtins.eval), which this program does not run"


class Code:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def change_pickle(path, change):
    """Replace the pickle in a file of torch by `change(pickle)`."""
    with zipfile.ZipFile(path) as old:
        members = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def write_zip(path, code, new=True):
    torch.save({"model": model_of().state_dict(), "args": code}, path, _use_new_zipfile_serialization=new)


def write_legacy(path, code):
    write_zip(path, code, new=False)


def write_pickle(protocol):
    return lambda path, code: path.write_bytes(pickle.dumps({"model": {"head.weight": code}}, protocol))


def write_swapped(path, code):
    """Torch's file, its pickle replaced by one that torch would not write."""
    torch.save({"model": model_of().state_dict()}, path)
    change_pickle(path, lambda old: pickle.dumps(code, 2))


def write_npy(path, code):
    np.save(path, np.array([code], dtype=object), allow_pickle=True)


def write_npz(path, code):
    """Every name under which timm looks for Flax's weights of a ViT."""
    array = np.array([code], dtype=object)
    np.savez(path, **{f"{prefix}embedding/kernel": array for prefix in ("", "opt/target/", "params/")})


def write_tar(path, code):
    """The format of torch before 0.2."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            add_member(tar, name, pickle.dumps(code, 2))


def add_member(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def unpickle(path):
    pickle.loads(path.read_bytes())


def load_with_torch(path):
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)


def load_with_numpy(path):
    loaded = np.load(path, allow_pickle=True)
    assert loaded["embedding/kernel"] if path.suffix == ".npz" else loaded


PLANTED = {
    "new.pth": (write_zip, load_with_torch),
    "legacy.pth": (write_legacy, load_with_torch),
    "swapped.pth": (write_swapped, load_with_torch),
    **{f"protocol{number}.pth": (write_pickle(number), unpickle) for number in range(6)},
    "new.safetensors": (write_zip, load_with_torch),
    "pickle.safetensors": (write_pickle(4), unpickle),
    "tar.pth": (write_tar, load_with_torch),
    "array.npy": (write_npy, load_with_numpy),
    "flax.npz": (write_npz, load_with_numpy),
}
"""{file name: (how it is written, what would run its code)}."""

NAMED = [name for name in PLANTED if name not in ("tar.pth", "array.npy", "flax.npz")]
"""Files of which the message says what code they contain; the others are no checkpoints."""
