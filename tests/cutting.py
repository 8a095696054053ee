"""What a run feeds its model, and a signal to it after some step.

As a program, for torchrun: python cutting.py OUT EPOCH STEP RANK FLAGS of main.py...; that rank sends itself SIGTERM
after that step (-1: none does), and every rank leaves the sample indices of its steps as OUT/<rank>.json.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import engine
import main


class Fed:
    """Digests of the batches that went into the model, {(epoch, batch): digest}.

    Args:
        replace: monkeypatch.setattr, or setattr.
        stop_after: (epoch, step) after which this process sends itself SIGTERM.
    """

    def __init__(self, replace: Callable, stop_after: tuple[int, int] | None = None):
        self.digests, self.indices, self.last = {}, {}, None
        train, mix = engine.train_one_epoch, engine.PatchMixup.__call__

        def watched_train(model, objective, loader, mixup_fn, state, *args, **kwargs):
            self.state, self.batch = state, state.step * kwargs["accum_steps"]
            after_step, images = kwargs["after_step"], kwargs["images"]

            def stop():
                self.last = (state.epoch, state.step)
                numbers = images(state.step - 1).removeprefix("images number ").split(", ")
                self.indices[f"{state.epoch} {state.step}"] = sorted(map(int, numbers))
                if self.last == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                after_step()

            return train(model, objective, loader, mixup_fn, state, *args, **kwargs | {"after_step": stop})

        def watched_mix(mixup, samples, labels):
            mixed, target = mix(mixup, samples, labels)
            content = [t.contiguous().numpy().tobytes() for t in (mixed, target.labels, target.lam, target.patch_lam)]
            key, digest = (self.state.epoch, self.batch), hashlib.sha256(b"".join(content)).hexdigest()
            assert self.digests.setdefault(key, digest) == digest
            self.batch += 1
            return mixed, target

        replace(main, "train_one_epoch", watched_train)
        replace(engine.PatchMixup, "__call__", watched_mix)


if __name__ == "__main__":
    out, epoch, step, rank, *flags = sys.argv[1:]
    own = os.environ.get("RANK", "0")
    fed = Fed(setattr, (int(epoch), int(step)) if rank == own else None)
    try:
        main.command_line(flags)
    finally:
        Path(out, f"{own}.json").write_text(json.dumps(fed.indices))
