"""A data set that fails, and ways to fail."""

import os
import signal
import time

from torch.utils.data import Dataset


class Failing(Dataset):
    """16 items, of which number 5 fails.

    Args:
        fail: called for number 5.
        item: returns the others, from their number.
    """

    def __init__(self, fail, item):
        self.fail, self.item = fail, item

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 5:
            self.fail()
        return self.item(index)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(1000)
