"""Checkpoint files of small states, written in a test."""

import os

import torch

from training import checkpoint_files as files


def state_of(number):
    return {"model": {"weight": torch.full((3, 5), float(number)), "bias": torch.arange(4)}, "epoch": number}


def epoch_in(path):
    files.verify(path)
    return torch.load(path, weights_only=True)["epoch"]


def folder_of(tmp_path):
    """Name and content of every file."""
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def written(tmp_path, count, keep):
    """checkpoint.pth after `count` writes; the epochs start with 1."""
    path = tmp_path / "checkpoint.pth"
    for epoch in range(1, count + 1):
        files.write(state_of(epoch), path, keep)
    return path


def refuse(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call
