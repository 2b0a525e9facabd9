"""Anatomical invariance (Alice): matched crops of the same anatomy get similar features, even when masked.

Jiang, Sun, Guo, Hou, Wang, Gao, Wang, Lu: "Anatomical Invariance Modeling and Semantic Alignment for Self-supervised
Learning in 3D Medical Image Analysis", ICCV 2023 (arXiv 2302.05615). A query crop Q and a key crop K show the same
anatomy of two visits or two subjects (:class:`lssl.correspondence.matched_views.MatchedViews`); matches between
subjects are the paper's core. The online network sees the crops with three quarters of their blocks masked. The
teacher, a moving average of the encoder, sees them in full.

============== ============================================================================================== ======
term           formula                                                                                        weight
============== ============================================================================================== ======
inter          ½ [D(z_Q, t_K) + D(z_K, t_Q)]: pooled embeddings of the two volumes, crossed                   1
intra          mean of D(S_x, T_x) over the crops and their visible encoder features x                        1
reconstruction mean squared difference of the decoder's image and the crop, over the masked voxels            5
============== ============================================================================================== ======

``D(s, t)`` is DINO's cross-entropy over prototypes (:class:`lssl.losses.SelfDistillation`), or InfoNCE. *Conditional
anatomical semantic alignment* gives S and T. V are the encoder's visible features of the masked crop, H the decoder's
features at all positions, Y the teacher encoder's features of the full crop, and φ, ψ projections::

    q = W_q ψ(V)      S = ζ(softmax(q (W_k φ(H))ᵀ / √d) W_v φ(H))      T = ζ'(softmax(q (W_k' ψ'(Y))ᵀ / √d) W_v' ψ'(Y))

Primes are the teacher's. Queries come from visible student features; student and teacher outputs must agree.

The paper's text was not available. This implementation follows its figures, and its code where the figures say
nothing. Where the two differ, the default follows the figures, and an option may follow the code:

* The code's attention adds q to its output on both sides. S and T then agree if both merely pass q on, and the loss
  falls while the backbone learns nothing. Figure 3 has no such path (``alignment.residual``).
* The code makes queries of all encoder features, the figures of the visible blocks (``alignment.condition``).
* The code averages the reconstruction over all voxels, a quarter of which are visible (``reconstruct``). The weight 5
  is its λ₃ / 2 = 10 / 2; an earlier state of the code has 1 / 2.
* In the code both sides share the attention, and Y comes from the teacher's decoder. Here, as in figure 3, keys,
  values, ζ and ψ are moving averages, and the teacher has no decoder.
* The code uses one mask of columns for the whole batch. Here every crop has its own mask of blocks.
* Alice pools the mean of the bottleneck, here mean and maximum (``pool``).
* Masked voxels are 0. In the figures a ViT's encoder skips masked tokens. Convolutions and Swin's windows cannot skip
  them, so masked tokens are replaced instead (:class:`lssl.views.masking.BlockMasking`).

Two parts of the code's recipe are left out: weight decay that rises from 0.04 to 0.4, and prototypes frozen for the
first epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matched_views import MatchedViews, Matching
from lssl.correspondence.matchers import FrameMatcher
from lssl.data.batch import PairBatch
from lssl.losses import DenseInfoNCE, Prototypes, QueueInfoNCE, SelfDistillation
from lssl.networks.attention import Alignment, ConditionalAttention
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, feature_std, mean_and_max, rowwise, to_rows
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, rank, weighted_mean, world_size
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.masking import BlockMasking
from lssl.views.sampler import View

__all__ = ["DINO", "Alignment", "AnatomicalInvariance", "InfoNCE", "Matching", "Objective"]

Compared = tuple[Tensor, dict[str, Tensor]]
"""A loss, and metrics for the log."""


class Objective(nn.Module, ABC):
    """Compares the online network's outputs with the teacher's."""

    #: Fewest pairs over all devices that the term ``inter`` can compare.
    MIN_PAIRS: ClassVar[int] = 1
    #: Whether the term ``intra`` needs the positions of its features.
    NEEDS_POINTS: ClassVar[bool] = False

    def last_layer(self, width: int) -> nn.Module:
        """A new last layer for a head of this width."""
        return nn.Identity()

    @abstractmethod
    def forward(self, term: str, student: Tensor, teacher: Tensor, points_mm: Tensor | None) -> Compared:
        """Loss, and metrics for the log.

        Args:
            term: ``inter`` or ``intra``.
            student: ``(2 B, D)`` outputs for both crops, all query crops before all key crops. In ``intra``,
                ``(2 B, K, D)`` outputs at K features of each crop.
            teacher: outputs of the same shape; in ``inter``, those of the other crop of each pair.
            points_mm: ``(2 B, K, 3)`` positions of the features in mm, if :attr:`NEEDS_POINTS`; else ``None``.
        """

    def on_step_end(self, progress: float) -> None:
        """Called after every optimizer step; ``progress`` is the share of the steps done."""


class DINO(Objective):
    """Self-distillation over prototypes, as Alice; see :class:`lssl.losses.SelfDistillation`.

    Args:
        prototypes: K (Alice: 512).
        student_temperature: temperature of the student's soft-max.
        teacher_temperature: first and last temperature of the teacher's soft-max.
        teacher_warmup: share of the training over which the teacher's temperature changes.
        centre_momentum: momentum of the centres.
    """

    def __init__(
        self,
        prototypes: int = 512,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.008, 0.01),
        teacher_warmup: float = 0.03,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        positive(prototypes=prototypes)
        self.prototypes = prototypes
        options = student_temperature, teacher_temperature, teacher_warmup, centre_momentum
        self.inter, self.intra = SelfDistillation(prototypes, *options), SelfDistillation(prototypes, *options)

    def last_layer(self, width: int) -> nn.Module:
        """Cosines with the prototypes."""
        return Prototypes(width, self.prototypes)

    def forward(self, term: str, student: Tensor, teacher: Tensor, points_mm: Tensor | None) -> Compared:
        """Also logs how many prototypes the batch uses, and how often student and teacher choose the same one."""
        criterion = self.inter if term == "inter" else self.intra
        assigned = criterion.target(teacher)
        value = criterion.against(student, assigned)
        with torch.no_grad():
            taken = torch.special.entr(assigned.flatten(0, -2).mean(0)).sum().exp()
            same = student.argmax(-1) == assigned.argmax(-1)
        if self.training:
            criterion.observe(teacher)
        return value, {"prototypes": taken, "agreement": same.mean(dtype=torch.float32)}

    def on_step_end(self, progress: float) -> None:
        """Moves the centres and the teacher's temperature."""
        self.inter.follow(progress)
        self.intra.follow(progress)


class InfoNCE(Objective):
    """``inter`` discriminates a crop's partner from other pairs; ``intra`` discriminates features within a crop.

    Args:
        temperature: temperature of the soft-max.
        exclusion: radius in mm around a feature; nothing inside it is a negative.
    """

    MIN_PAIRS = 2
    NEEDS_POINTS = True

    def __init__(self, temperature: float = 0.1, exclusion: float = 8.0) -> None:
        super().__init__()
        self.among_pairs, self.among_points = QueueInfoNCE(temperature), DenseInfoNCE(temperature, exclusion)

    def forward(self, term: str, student: Tensor, teacher: Tensor, points_mm: Tensor | None) -> Compared:
        """See :class:`lssl.losses.QueueInfoNCE` and :class:`lssl.losses.DenseInfoNCE`."""
        if points_mm is not None:
            return self.among_points(student, teacher, points_mm), {}
        pairs = len(student) // 2
        pair = (rank() * pairs + torch.arange(pairs, device=student.device)).repeat(2)
        keys = torch.cat(teacher.chunk(2)[::-1])
        return self.among_pairs(student, teacher, pair, gather(keys), gather(pair)), {}


class AnatomicalInvariance(Strategy):
    """Matched crops, masked and full, agree in their pooled embedding and voxel by voxel (Alice, Jiang et al., 2023).

    Args:
        backbone: network and taps; transformers name their ``tokens``.
        encoder: tap of V and Y; its features are also pooled.
        pool: features of ``inter``: the ``mean`` of each channel (Alice), or its maximum too, as after an instance norm
            the mean is the same for every crop.
        decoder: tap of H; Alice's is the first stage of the decoder.
        matching: how the key crop is matched to the query crop; ``None`` takes :class:`Matching` with its defaults.
            The log has the shares of matched pairs.
        mask_ratio: share of masked blocks (Alice: 0.75).
        block: side(s) of a block in voxels (Alice: 16).
        objective: DINO (as Alice), InfoNCE, or another :class:`Objective`.
        alignment: options of the attention; ``None`` takes :class:`Alignment` with its defaults.
        reconstruct: voxels in the reconstruction term: the ``masked`` ones, or the ``full`` crop.
        hidden: width of the heads' hidden layers (Alice: 2048).
        projection: width of the embeddings and of the attention (256; Alice: 256 and 512).
        norm: normalisation in the heads. Alice has none. Without it their outputs nearly coincide in small batches
            (feature_std 0.02 after 200 steps at 8 pairs, against 0.37 with batch norm; one seed).
        momentum: first momentum of the teacher; it rises to 1 by a cosine.
        **common: see :class:`lssl.task.Task`. ``views.overlap`` limits how far the key crop may lie from its match.
    """

    LOSS_WEIGHTS: ClassVar = {"inter": 1.0, "intra": 1.0, "reconstruction": 5.0}

    def __init__(
        self,
        backbone: Backbone,
        encoder: str = "bottleneck",
        decoder: str = "decoder.3",
        matching: Matching | None = None,
        mask_ratio: float = 0.75,
        block: int | tuple[int, int, int] = 16,
        objective: Callable[[], Objective] = DINO,
        alignment: Alignment | None = None,
        reconstruct: Literal["masked", "full"] = "masked",
        hidden: int = 2048,
        projection: int = 256,
        norm: Literal["batch", "layer", "none"] = "batch",
        momentum: float = 0.996,
        pool: Literal["mean_and_max", "mean"] = "mean_and_max",
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        self.objective, self.alignment = objective(), alignment or Alignment()
        positive(hidden=hidden, projection=projection)
        if projection % self.alignment.heads:
            raise InputError(f"alignment: {self.alignment.heads} heads do not divide the projection of {projection}.")
        backbone.check_taps([encoder, decoder])
        self.encoder, self.decoder, self.full, self.maximum = encoder, decoder, reconstruct == "full", pool != "mean"
        self.taps = self.taps_of({"inter": [encoder], "intra": [encoder, decoder]})
        self.matched = MatchedViews(self.views, matching)
        self.masking = BlockMasking(backbone, self.views.size, block, mask_ratio)
        backbone.freeze_unused(self.taps, self.uses("reconstruction"))
        followed: dict[str, nn.Module] = {"backbone": backbone}
        channels = backbone.taps[encoder].channels
        if self.uses("inter"):
            self.pooled = Projector((1 + self.maximum) * channels, hidden, projection, 3, norm)
            self.pooled_last = self.objective.last_layer(projection)
            followed |= {"pooled": self.pooled, "pooled_last": self.pooled_last}
        if self.uses("intra"):
            self.psi = Projector(channels, hidden, projection, 3, norm)
            self.phi = Projector(backbone.taps[decoder].channels, hidden, projection, 3, norm)
            self.query = nn.Linear(projection, projection, bias=False)
            last = self.objective.last_layer(projection)
            self.attention = ConditionalAttention(projection, self.alignment.heads, last, self.alignment.residual)
            followed |= {"psi": self.psi, "attention": self.attention}
        if self.uses("reconstruction"):
            self.to_image = nn.Conv3d(backbone.out_channels, backbone.in_channels, 1)
        # Running statistics differ: the online network sees masked crops, the teacher full ones.
        self.teacher = Teacher(followed, momentum, buffers=False)

    def draw_views(self, batch: PairBatch) -> tuple[View, View]:
        """Matched views; see :class:`lssl.correspondence.matched_views.MatchedViews`."""
        self.matched.matcher.to(batch.images.device)  # not a submodule, so its weights are not saved again
        first, second, shares = self.matched(batch, self.generator)
        for name, value in shares.items():
            self.log_metric(f"match/{name}", value)
        return first, second

    def on_step_end(self, progress: float) -> None:
        """Moves the teacher and the temperatures."""
        super().on_step_end(progress)
        self.objective.on_step_end(progress)

    def setup(self, stage: str) -> None:
        """Refuses other subjects as keys if the matcher uses a common frame and there is none."""
        super().setup(stage)
        by_frame = self.matched.other_subject and isinstance(self.matched.matcher, FrameMatcher)
        if by_frame and not self.data_source.common_frame:
            raise InputError(
                "other_subject: these subjects share no frame, so the frame cannot match them; set it to 0, give an "
                "EmbeddingMatcher, or prepare them to a template (lssl prepare --template)."
            )

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        self._check_batch(len(batch))
        masked = self.masking.draw(len(images), self.generator, images.device)
        online = self.masking(self.backbone, images, masked, self.taps, self.uses("reconstruction"))
        terms: dict[str, Tensor] = {}
        if self.taps:
            with torch.no_grad():
                full = self._slow("backbone")(images, [self.encoder])[self.encoder]
            seen = 1 - F.adaptive_avg_pool3d(masked.float(), full.shape[2:])
            if self.uses("inter"):
                terms["inter"] = self._inter(online[self.encoder], full, seen)
            if self.uses("intra"):
                terms["intra"] = self._intra(online[self.encoder], online[self.decoder], full, seen, first, second)
        if self.uses("reconstruction"):
            error = F.mse_loss(self.to_image(online["output"]).float(), images, reduction="none")
            counted = (torch.ones_like(masked) if self.full else masked).expand_as(error).float()
            terms["reconstruction"] = weighted_mean(error.flatten(), counted.flatten())
        return terms

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The masked view and its reconstruction."""
        if not self.uses("reconstruction"):
            return None
        masked = self.masking.draw(len(view.image), torch.Generator().manual_seed(0), view.image.device)
        made = self.to_image(self.masking(self.backbone, view.image, masked, output=True)["output"])
        return view.image.masked_fill(masked, 0), made

    def _inter(self, online: Tensor, full: Tensor, seen: Tensor) -> Tensor:
        """Compares pooled embeddings with the teacher's of the other crop."""
        z = self.pooled(self._pool(online, seen))
        self.log_metric("feature_std", feature_std(z))
        with torch.no_grad():
            target = self._slow("pooled_last")(self._slow("pooled")(self._pool(full)))
        return self._compare("inter", self.pooled_last(z), torch.cat(target.chunk(2)[::-1]))

    def _pool(self, features: Tensor, seen: Tensor | None = None) -> Tensor:
        return mean_and_max(features, seen)[:, : (1 + self.maximum) * features.shape[1]]

    def _intra(self, online: Tensor, decoded: Tensor, full: Tensor, seen: Tensor, first: View, second: View) -> Tensor:
        """Compares student and teacher by conditional alignment within each crop."""
        cells = seen[0].numel()
        visible = max(1, cells - round(self.masking.ratio * cells))
        asked = cells if self.alignment.condition == "all" else visible
        chosen = seen.flatten(1).topk(asked).indices[..., None]
        q = self.query(rowwise(self.psi, to_rows(online).gather(1, chosen.expand(-1, -1, online.shape[1]))))
        if not self.uses("inter"):
            self.log_metric("feature_std", feature_std(q.flatten(0, 1)))
        answer = self.attention(q, rowwise(self.phi, to_rows(decoded)))
        with torch.no_grad():
            target = self._slow("attention")(q, rowwise(self._slow("psi"), to_rows(full)))
        points_mm = None
        if self.objective.NEEDS_POINTS:
            tap = self.backbone.taps[self.encoder]
            affine = geo.feature_affine(torch.cat([first.affine, second.affine]), tap.stride, tap.offset)
            points_mm = geo.transform(affine, geo.lattice(full.shape[2:], affine.device))
            points_mm = points_mm.gather(1, chosen.expand(-1, -1, 3))
        return self._compare("intra", answer, target, points_mm)

    def _compare(self, term: str, student: Tensor, teacher: Tensor, points_mm: Tensor | None = None) -> Tensor:
        value, metrics = self.objective(term, student, teacher, points_mm)
        for name, metric in metrics.items():
            self.log_metric(f"{term}/{name}", metric)
        return value

    def _slow(self, name: str) -> nn.Module:
        """A module of the teacher."""
        assert self.teacher is not None
        return self.teacher[name]

    def _check_batch(self, pairs: int) -> None:
        if self.training and self.uses("inter") and pairs * world_size() < self.objective.MIN_PAIRS:
            raise InputError(
                f"{type(self.objective).__name__} compares pairs with one another: raise data.init_args.batch_size to "
                f"{self.objective.MIN_PAIRS} or more."
            )
