"""The data set of the quickstart and the tests, which needs no download."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset):
    """The 1,797 scanned digits of scikit-learn, 8 x 8 pixels; a fifth of each class is for validation."""

    classes = tuple("0123456789")

    def __init__(self, is_training: bool):
        from sklearn.datasets import load_digits  # here, as scikit-learn takes a second to import
        from sklearn.model_selection import train_test_split

        scans, labels = load_digits(return_X_y=True)
        train, val = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        chosen = train if is_training else val
        self.scans = (scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = labels[chosen]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int):
        return Image.fromarray(self.scans[index]), int(self.labels[index])
