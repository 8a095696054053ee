"""`evaluate_both` of a model whose running statistics differ between ranks; run by tests/test_distributed.py.

Each rank writes its statistics and loss after it to the file RANK.json in a folder.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from training.evaluation import evaluate_both
from utils import joined_world

if __name__ == "__main__":
    with joined_world("cpu", "env://") as world:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
        average = SimpleNamespace(module=copy.deepcopy(model))
        for number, module in enumerate((model, average.module), 1):
            module[1].running_mean.fill_(10 * world.rank + number)
        batch = torch.arange(6.0).view(2, 3, 1, 1), torch.tensor([0, 1])
        data = SimpleNamespace(val=[batch], val_is_shared=True, num_val=4, common_val_batches=lambda among: 1)
        stats = evaluate_both(model, average, data, world)
        means = [module[1].running_mean.tolist() for module in (model, average.module)]
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps([means, stats]))
