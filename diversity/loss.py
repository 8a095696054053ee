"""DiverseLoss: the model, the mixing of images and labels, and the objective as one module."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch._dynamo.exc
import torch._inductor
from torch import nn

from .backbones import TapError
from .gradient_norms import gradient_norms
from .mixing import PatchMixup
from .objective import DiversityObjective
from .tapped_vit import TappedViT

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


class DiverseLoss(nn.Module):
    """A model of timm or transformers that returns its loss in train mode and class logits in eval mode.

    In your own loop, with the images and labels of any loader:

        model = timm.create_model("deit_small_patch16_224")
        loss_fn = DiverseLoss(model, {"mixing": 1.0, "emb_cos_within": 0.5}, mixup=PatchMixup(), smoothing=0.1)
        loss, terms = loss_fn(images, labels)
        loss.backward()
        logits = loss_fn.eval()(images)

    Wrap this module, not the model, in DistributedDataParallel or torch.compile. A deep copy, such as an average of the
    weights, has its own model and hooks. Give the optimizer, the average of the weights and the checkpoint
    `loss_fn.model`, which is the stock model. A model with a distillation head trains it where there is a teacher, and
    otherwise trains the mean of its two heads.

    Args:
        model: a model of timm, or of transformers for image classification, on its device; see `TappedViT`.
        coefs: {name of a term, or "mixing": coefficient}, see `DiversityObjective`.
        mixup: a `PatchMixup`, or another object with the same `draw`, `__call__` and `with_grid`. Without a grid, it
            gets the model's patch grid where mixing is on. None = images and labels stay as they are.
        smoothing, distillation, mixing_balance, mixing_where, options: see `DiversityObjective`.
        diversity_warmup, diversity_until: see `DiversityObjective`; with one of them, call `set_epoch` in each epoch.
        emb_layers, attn_layers, weight_groups: see `TappedViT`.
        frozen: modules of the model that stay in eval mode, such as a backbone that is not trained.

    Raises:
        ValueError: arguments that `DiversityObjective` or `TappedViT` cannot take.
        TapError: the model lacks what a term reads; its `terms` are the names of the terms that read it.
        TypeError: an unknown option.

    Source: the training step of The Principle of Diversity.
    Differs: one module around timm's stock model.

    Attributes:
        tapped: the `TappedViT` around the model.
        objective: the `DiversityObjective`.
        mixup: the mixup, with a grid.
    """

    def __init__(
        self,
        model: nn.Module,
        coefs: Mapping[str, float],
        mixup: PatchMixup | None = None,
        smoothing: float = 0.0,
        distillation: Callable[..., torch.Tensor] | None = None,
        mixing_balance: str = "tokens",
        mixing_where: str = "always",
        diversity_warmup: int = 0,
        diversity_until: int | None = None,
        emb_layers: str | Sequence[int] = "last",
        attn_layers: str | Sequence[int] = "first",
        weight_groups: str | Sequence[str] = "qkv",
        frozen: Sequence[nn.Module] = (),
        **options,
    ):
        super().__init__()
        self.frozen = (*frozen,)  # a tuple, in which torch does not look for modules
        schedule = {"diversity_warmup": diversity_warmup, "diversity_until": diversity_until}
        self.objective = DiversityObjective(
            coefs, smoothing, distillation, mixing_balance, mixing_where, **schedule, **options
        )
        reads, patch_logits = self.objective.reads, self.objective.patch_logits
        try:
            self.tapped = TappedViT(model, reads, patch_logits, emb_layers, attn_layers, weight_groups)
        except TapError as error:
            is_unknown_model = error.argument == "model"
            error.terms = [*self.objective.coefs] if is_unknown_model else self.objective.readers(error.tap)
            raise
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(distillation is not None)
        self.tapped.distilled_training = distillation is not None
        mixup = PatchMixup(mixup_alpha=0, cutmix_alpha=0) if mixup is None else mixup
        self.mixup = mixup.with_grid(self.tapped.grid) if patch_logits else mixup
        self.compiled: Callable | None = None
        self.has_cuda_graphs = False
        self.on_compile_error: Callable[[str], None] | None = None

    @property
    def model(self) -> nn.Module:
        """The stock model."""
        return self.tapped.model

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the terms that `forward` returns, in their order: "loss", then `DiversityObjective.names`."""
        return ("loss", *self.objective.names)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor | None = None, draws=None, call: Callable | None = None
    ):
        """The loss of a batch in train mode, class logits in eval mode.

        Args:
            images: [B, 3, H, W], as `mixup` takes them: normalised floats for a `PatchMixup`.
            labels: [B], integer classes; not read in eval mode.
            draws: what `mixup.draw` returned for this batch, on the device of the images; None = draw now, from numpy's
                global generator.
            call: what calls the model, where something else than this module is wrapped around it; see
                `TappedViT.forward`.

        Returns:
            In train mode the 0-dim loss and {name: detached 0-dim tensor} for every name in `names`. In eval mode the
            logits [B, C].

        Raises:
            ValueError: in train mode, labels that are not B integers, or a batch that `mixup` cannot mix.
        """
        if not self.training:
            return self.tapped(images, call)
        if labels is None or labels.shape != images.shape[:1] or labels.is_floating_point():
            found = "none" if labels is None else f"{labels.dtype} of shape {[*labels.shape]}"
            raise ValueError(f"a batch of {len(images)} images needs as many integer labels in train mode; got {found}")
        if draws is None:
            draws = self.draw(images)
        loss, values = self._compiled_or_eager(images, labels, draws, call)
        return loss, dict(zip(self.names, values.unbind(), strict=True))

    def train(self, mode: bool = True):
        """Set train mode or eval mode, except of the frozen modules, which stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def set_epoch(self, epoch: int):
        """Set the coefficients to those of an epoch, counted from 0, where they follow a schedule."""
        self.objective.set_epoch(epoch)

    def gradient_norms(self, images: torch.Tensor, labels: torch.Tensor, draws=None) -> dict[str, torch.Tensor]:
        """The norm of the gradient of each summand of a batch's loss; see `gradient_norms.gradient_norms`."""
        return gradient_norms(self, images, labels, draws)

    def compile_step(self, on_error: Callable[[str], None] | None = None, **options):
        """Compute the loss in one compiled graph from now on.

        With CUDA graphs (`mode="reduce-overhead"`), each call begins a step, whose memory is that of the step before:
        call `backward` before the next call. What is returned, and gradients that accumulate, are copied out of it.

        Args:
            on_error: called with the reason where torch.compile fails; the step then runs in eager mode. None = raise
                the error.
            options: of torch.compile.
        """
        self.compiled = torch.compile(self._loss, fullgraph=True, dynamic=False, **options)
        self.on_compile_error = on_error
        chosen = torch._inductor.list_mode_options(options.get("mode") or "default") | (options.get("options") or {})
        self.has_cuda_graphs = bool(chosen.get("triton.cudagraphs"))

    @torch.compiler.disable
    def draw(self, images: torch.Tensor):
        """Draws for a batch, on its device."""
        draws = self.mixup.draw(len(images), images.shape[-2:])
        return draws.to(images.device) if torch.is_tensor(draws) else draws

    def __deepcopy__(self, memo):
        if self.compiled is not None:
            raise TypeError("a DiverseLoss that is compiled cannot be copied: copy it before compile_step")
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def _compiled_or_eager(self, images, labels, draws, call) -> tuple[torch.Tensor, torch.Tensor]:
        if self.compiled is None:
            return self._loss(images, labels, draws, call)
        try:
            if not self.has_cuda_graphs:
                return self.compiled(images, labels, draws, call)
            self._begin_step()
            loss, values = self.compiled(images, labels, draws, call)
            return loss.clone(), values.clone()
        except COMPILE_ERRORS as error:
            if self.on_compile_error is None:
                raise
            cause = getattr(error, "inner_exception", error)
            reason = " ".join([f"{type(cause).__name__}:", *str(cause).split("\n\n")[0].split()])[:500]
        result = self._loss(images, labels, draws, call)  # raises the model's or a term's own error
        self.on_compile_error(reason)
        self.compiled = None
        return result

    def _begin_step(self):
        """Let CUDA graphs write over all that they returned before, after a copy of gradients that accumulate."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        torch.compiler.cudagraph_mark_step_begin()

    def _loss(self, images, labels, draws, call) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the values of `names` as one tensor [n]; see `DiversityObjective.loss_and_values`."""
        samples, target = self.mixup(images, labels, draws)
        loss, values = self.objective.loss_and_values(self.tapped(samples, call), target, samples)
        return loss, torch.cat([loss.detach()[None], values])
