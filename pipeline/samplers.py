"""Which images form which batch."""

from collections.abc import Iterator

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from pipeline.images import Sample
from utils import World


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's repeated augmentation with a seed; seed 0 draws the same order as DeiT."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int):
        super().set_epoch(epoch + 1_000_003 * self.seed)


class ResumableBatches(Sampler):
    """Batches of `Sample`, from any of an epoch's batches on.

    Batch k of all W ranks together has the positions k * W * B to (k + 1) * W * B of the epoch's order. So a global
    batch has the same samples for any number of ranks, batch size and accumulated batches that give the same size. The
    ranks take its positions in turns, as in timm's and torch's samplers, or each takes B positions in a row.

    Args:
        sampler: the epoch's order, of all ranks.
        batch_size: samples of a batch, B.
        num_batches: of an epoch; the remaining samples are dropped.
        repeats: times that an index is repeated in a row in the epoch's order.
        in_runs: whether a rank takes positions in a row, and so all repeats of an index.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, num_batches: int, repeats: int, world: World, in_runs: bool = False
    ):
        self.sampler, self.batch_size, self.num_batches, self.repeats = sampler, batch_size, num_batches, repeats
        self.world, self.in_runs = world, in_runs
        self.epoch = self.first = 0

    def start(self, epoch: int, batch: int = 0):
        """Start the next iteration at a batch of an epoch."""
        self.epoch, self.first = epoch, batch
        self.sampler.set_epoch(epoch)

    def batches(self, first: int, end: int) -> Iterator[list[Sample]]:
        """The batches first to end - 1 of the epoch."""
        order = list(self.sampler)
        size, rank = self.batch_size, self.world.rank
        of_all = size * self.world.size
        mine = slice(rank * size, (rank + 1) * size) if self.in_runs else slice(rank, None, self.world.size)
        for batch in range(first, end):
            positions = range(batch * of_all, (batch + 1) * of_all)[mine]
            yield [Sample(order[position], self.epoch, position % self.repeats) for position in positions]

    def __iter__(self):
        return self.batches(self.first, self.num_batches)

    def __len__(self):
        return self.num_batches - self.first
