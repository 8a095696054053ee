"""Batches that go to the device as bytes, one ahead of the step."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class Prefetcher:
    """Sends the batches of a loader to a device while the batch before is used; on a GPU on a stream of its own.

    What timm's PrefetchLoader does, but images stay bytes: what follows them is in `batch_augmentation`.

    Args:
        loader: batches of images [B, S, S, 3] uint8 and labels [B]; whatever it raises passes through.
        transform: of images that have arrived; None = they are handed on as they are.

    Yields:
        Images as [B, 3, S, S], which in memory stay pixel by pixel (torch's channels_last), and labels.
    """

    def __init__(self, loader: Iterable, device: torch.device, transform: Callable | None = None):
        self.loader, self.device, self.transform = loader, device, transform
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ahead = None
        for batch in self.loader:
            sent = self._send(batch)
            if ahead is not None:
                yield ahead
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
            ahead = sent
        if ahead is not None:
            yield ahead

    def __len__(self):
        return len(self.loader)

    @property
    def dataset(self):
        return self.loader.dataset

    @property
    def batch_sampler(self):
        return self.loader.batch_sampler

    def over(self, batches: Iterable) -> "Prefetcher":
        """This, made to send other batches."""
        self.loader = batches
        return self

    def _send(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        context = contextlib.nullcontext()
        if self.stream is not None:
            # Memory that the step has given up may be written here: only once the step is done with it.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            context = torch.cuda.stream(self.stream)
        with context:
            images, labels = (tensor.to(self.device, non_blocking=self.stream is not None) for tensor in batch)
            images = images.permute(0, 3, 1, 2)
            return images if self.transform is None else self.transform(images), labels
