"""Batches that are sent to the device as bytes, one ahead of the step."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class Prefetcher:
    """Sends the batches of a loader to a device while the batch before is used; on a GPU in a separate stream.

    It does what timm's PrefetchLoader does, but images stay bytes; `batch_augmentation` normalises them.

    Args:
        loader: batches of images [B, S, S, 3] uint8 and labels [B]; its errors are not caught.
        transform: of the images on the device; None = they are returned as they are.
        has_stream: whether a GPU gets them in a separate stream; false for batches that it already has.

    Yields:
        Images as [B, 3, S, S], whose memory format stays torch's channels_last, and labels.
    """

    def __init__(
        self, loader: Iterable, device: torch.device, transform: Callable | None = None, has_stream: bool = True
    ):
        self.loader, self.device, self.transform = loader, device, transform
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and has_stream else None

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

    def with_batches(self, batches: Iterable) -> "Prefetcher":
        """This prefetcher, which sends these batches from now on."""
        self.loader = batches
        return self

    def _send(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        context = contextlib.nullcontext()
        if self.stream is not None:
            # The copy may reuse memory that the step has freed, and so waits until the step has used it.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            context = torch.cuda.stream(self.stream)
        with context:
            images, labels = (tensor.to(self.device, non_blocking=self.stream is not None) for tensor in batch)
            images = images.permute(0, 3, 1, 2)
            return images if self.transform is None else self.transform(images), labels
