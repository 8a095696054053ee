"""Training batches of cached images: gathered, sent to the device and augmented there as a batch."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.batch_transform import BatchTransform
from pipeline.image_cache import CachedImages
from pipeline.images import Sample
from pipeline.samplers import ResumableBatches

Batch = tuple[torch.Tensor, torch.Tensor]


class CachedLoader:
    """The batches of an epoch; on a GPU each is made in another thread and stream during the step before.

    So the step waits for neither the random numbers, nor the copy, nor the launches of the augmentation. Nothing in the
    thread uses a global generator of random numbers.

    Args:
        dataset: the images, on the host or on the device.
        batch_sampler: lists of `Sample`.
        transform: bytes [B, 3, C, C] on the device and their draws -> normalised images.
        device: where batches are used.

    Yields:
        Normalised images [B, 3, S, S] in float32 and labels [B], on the device.
    """

    def __init__(
        self, dataset: CachedImages, batch_sampler: ResumableBatches, transform: BatchTransform, device: torch.device
    ):
        self.dataset, self.batch_sampler, self.transform, self.device = dataset, batch_sampler, transform, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_ahead = self.stream is not None

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batch_sampler)
        return self._made_ahead(batches) if self.is_ahead else map(self._make, batches)

    def _made_ahead(self, batches: Iterator[list[Sample]]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "cached images") as thread:  # its end waits for the batch that is being made
            ahead = thread.submit(self._make_next, batches, self._used())
            while (batch := ahead.result()) is not None:
                if self.stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self.stream)
                ahead = thread.submit(self._make_next, batches, self._used())
                yield batch

    def _used(self) -> torch.cuda.Event | None:
        """When the GPU has used the batches before: their memory is then free for another one."""
        return self.stream and torch.cuda.current_stream(self.device).record_event()

    def _make_next(self, batches: Iterator[list[Sample]], used: torch.cuda.Event | None) -> Batch | None:
        """The next batch; None at the end."""
        samples = next(batches, None)
        if samples is None:
            return None
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if used is not None:
                self.stream.wait_event(used)
            return self._make(samples)

    def _make(self, samples: Sequence[Sample]) -> Batch:
        indices = np.array([sample.index for sample in samples])
        images, labels = self.dataset.__getitems__(indices)
        draws = self.transform.draw(samples, self.dataset.sizes[indices])
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        return self.transform(images, draws.to(self.device)), labels
