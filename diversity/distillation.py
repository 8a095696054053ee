"""Distillation from a teacher (DeiT, section 4)."""

import torch
from torch import nn
from torch.nn import functional as F


class DistillationLoss(nn.Module):
    """Cross-entropy towards a teacher, soft or hard.

    soft: tau^2 * KL(teacher / tau || student / tau), summed over classes and averaged over images and classes as DeiT
    does. hard: cross-entropy against the teacher's top class.

    Args:
        teacher: a classifier, images -> [B, C]; frozen and put into eval mode here.
        kind: "soft" or "hard".
        alpha: fraction of this loss in the classification loss, in [0, 1].
        tau: temperature of the soft loss.
    """

    def __init__(self, teacher: nn.Module, kind: str, alpha: float, tau: float = 1.0):
        super().__init__()
        assert kind in ("soft", "hard"), f"unknown kind of distillation {kind!r}"
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def train(self, mode: bool = True):
        """Switch the mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, samples: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """samples [B, 3, S, S] as the student saw them, student logits [B, C] -> 0-dim loss in float32."""
        with torch.no_grad():
            teacher = self.teacher(samples)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            teacher = teacher.to(logits.dtype)
            if self.kind == "hard":
                return F.cross_entropy(logits, teacher.argmax(dim=1))
            student = F.log_softmax(logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher / self.tau, dim=1)
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            return divergence * self.tau**2 / logits.numel()
