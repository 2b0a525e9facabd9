"""Self-distillation over prototypes, the loss of DINO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from lssl.utils.distributed import world_size
from lssl.utils.errors import InputError, positive

__all__ = ["Prototypes", "SelfDistillation"]


class Prototypes(nn.Module):
    """Cosines of rows ``(..., D)`` with K learned directions: DINO's weight-normalised last layer with norm 1.

    Args:
        in_features: channels D of a row.
        count: number of directions K.
    """

    length: Tensor

    def __init__(self, in_features: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, in_features) * 0.02)
        self.register_buffer("length", torch.ones(count, 1), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """``(..., D) → (..., K)`` in [-1, 1], float32."""
        with torch.autocast(rows.device.type, enabled=False):
            directions = torch._weight_norm(self.weight.float(), self.length)  # as torch's weight_norm does
            return F.linear(F.normalize(rows.float(), dim=-1), directions)


class SelfDistillation(nn.Module):
    """Cross-entropy between the teacher's and the student's soft-max over K prototypes; the teacher's is centred.

    ``-Σ_k P_k log softmax(s/τ_s)_k`` with ``P = sg softmax((t - c)/τ_t)``, averaged over rows (DINO, Caron et al., ICCV
    2021; Alice's ``Loss``). The centre c follows the teacher's mean output over the batches of all ranks,
    ``c ← m c + (1 - m) mean(t)``. Centring keeps a single prototype from taking all rows; sharpening (a small τ_t)
    keeps the assignment from becoming uniform. The centre moves once per optimizer step (:meth:`follow`), by the mean
    over all batches since the last step (:meth:`observe`), so accumulated gradients use one centre. τ_t changes
    linearly from its first to its last value. Centre and τ_t are buffers, so checkpoints hold them.

    Papers: https://arxiv.org/abs/2104.14294 and https://arxiv.org/abs/2302.05615. Reference code:
    https://github.com/facebookresearch/dino and https://github.com/alibaba-damo-academy/alice.

    Args:
        prototypes: number of prototypes K.
        student_temperature: τ_s.
        teacher_temperature: first and last τ_t.
        warmup: share of the training over which τ_t changes (Alice: 30 epochs of 1000).
        momentum: momentum m of the centre.

    Example:
        >>> import torch
        >>> loss = SelfDistillation(2, student_temperature=1.0, teacher_temperature=(0.01, 0.01))
        >>> sure = torch.tensor([[1.0, -1.0]])
        >>> round(loss(sure, sure).item(), 4)  # the teacher is certain: -log of the student's share, 1 / (1 + e^-2)
        0.1269
    """

    centre: Tensor
    temperature: Tensor
    observed: Tensor

    def __init__(
        self,
        prototypes: int,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.008, 0.01),
        warmup: float = 0.03,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        first, last = teacher_temperature
        positive(
            student_temperature=student_temperature,
            **{"first teacher_temperature": first, "last teacher_temperature": last},
        )
        if not 0 <= warmup <= 1 or not 0 <= momentum < 1:
            raise InputError(f"warmup, momentum: give shares of 1, not {warmup:g} and {momentum:g}.")
        self.student_temperature, self.range = student_temperature, (first, last)
        self.warmup, self.momentum = warmup, momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("temperature", torch.tensor(float(first)))
        self.register_buffer("observed", torch.zeros(prototypes), persistent=False)  # sum of the batches' means
        self.batches = 0  # how many these are

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss over rows ``(..., K)``; the teacher's get no gradient."""
        return self.against(student, self.target(teacher))

    def against(self, student: Tensor, target: Tensor) -> Tensor:
        """The same against :meth:`target`."""
        with torch.autocast(student.device.type, enabled=False):
            likelihood = target * F.log_softmax(student.float() / self.student_temperature, dim=-1)
            return likelihood.sum() * (-likelihood.shape[-1] / likelihood.numel())

    def target(self, teacher: Tensor) -> Tensor:
        """``P (..., K)``: the teacher's soft assignment of each row."""
        return ((teacher.detach().float() - self.centre) / self.temperature).softmax(-1)

    @torch.no_grad()
    def observe(self, teacher: Tensor) -> None:
        """Records the mean of the teacher's rows ``(..., K)`` for the centre's next move; call it after the loss."""
        self.observed += teacher.float().flatten(0, -2).mean(0)
        self.batches += 1

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Moves the centre towards the recorded means of all ranks and sets τ_t; call it after an optimizer step.

        Args:
            progress: share of the steps done.
        """
        mean = self.observed / max(1, self.batches)
        if world_size() > 1:
            distributed.all_reduce(mean)
            mean = mean / world_size()
        self.centre.lerp_(mean, (1 - self.momentum) * min(1, self.batches))
        self.observed.zero_()
        self.batches = 0
        first, last = self.range
        share = min(1.0, progress / self.warmup) if self.warmup else 1.0
        self.temperature.fill_(first + (last - first) * share)
