"""Anatomical invariance (Alice): the same anatomy elsewhere looks alike, whatever part of it is hidden.

Jiang, Sun, Guo, Hou, Wang, Gao, Wang, Lu: "Anatomical Invariance Modeling and Semantic Alignment for Self-supervised
Learning in 3D Medical Image Analysis", ICCV 2023 (arXiv 2302.05615). A query crop Q and a key crop K show the same
anatomy of two visits or two subjects (:class:`lssl.correspondence.matched_views.MatchedViews`). The
online network sees them with three quarters of their blocks hidden, its teacher (a moving average, encoder only) sees
them whole.

============== ============================================================================================== ======
term           formula                                                                                        weight
============== ============================================================================================== ======
inter          ½ [D(z_Q, t_K) + D(z_K, t_Q)]: pooled embeddings of the two volumes, crossed                   1
intra          mean of D(S_x, T_x) over the crops and their visible encoder features x                        1
reconstruction mean squared difference of the decoder's image and the crop, over the hidden voxels            5
============== ============================================================================================== ======

``D(s, t)`` is DINO's cross-entropy over prototypes (:class:`lssl.losses.SelfDistillation`), or InfoNCE. *Conditional
anatomical semantic alignment* makes S and T. With V the encoder's features of the masked crop at its visible places,
H the decoder's of all places, Y the teacher encoder's of the whole crop, and φ, ψ projections::

    q = W_q ψ(V)      S = ζ(softmax(q (W_k φ(H))ᵀ / √d) W_v φ(H))      T = ζ'(softmax(q (W_k' ψ'(Y))ᵀ / √d) W_v' ψ'(Y))

Primes are the teacher's: what is visible asks, the completed and the whole crop must answer alike.

The paper's text could not be had; this follows its figures, and its code where the figures are silent. Where they
differ, the figures decide, and an option follows the code:

* the code's attention adds q to its output on both sides. Then S and T agree if both merely pass q on, and the term
  falls without the backbone learning; figure 3 has no such path (``residual``).
* in the code all encoder features ask, in the figures those of visible blocks (``condition``).
* the code averages the reconstruction over all voxels, of which a quarter was seen (``reconstruction``). The weight 5
  is its λ₃ / 2 = 10 / 2; an earlier state of the code has 1 / 2.
* in the code both sides share the attention, and Y comes from the teacher's decoder; in figure 3 keys, values, ζ and ψ
  are moving averages, and the teacher has no decoder. So here.
* in the code one mask of columns serves the whole batch; here every crop has its own mask of blocks. Hidden voxels are
  0 (in the figures, the encoder of a ViT skips hidden tokens; convolutions and Swin's windows cannot, so that their
  tokens are replaced: :class:`lssl.views.masking.BlockMasking`).

Left out of the code's recipe: a weight decay that rises from 0.04 to 0.4, and prototypes that rest for the first epoch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matched_views import MatchedViews
from lssl.correspondence.matchers import FrameMatcher, Matcher
from lssl.data.batch import PairBatch
from lssl.losses import DenseInfoNCE, Prototypes, QueueInfoNCE, SelfDistillation
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, mean_and_max, spread
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, rank, world_size
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.masking import BlockMasking
from lssl.views.sampler import View

__all__ = ["AnatomicalInvariance"]


class AnatomicalInvariance(Strategy):
    """Matched crops, masked and whole, agree in their pooled embedding and voxel by voxel (Alice, Jiang et al., 2023).

    Args:
        backbone: network and taps; transformers name their ``tokens``.
        encoder: tap of V and Y, which is also pooled.
        decoder: tap of H; Alice's is the first stage of the decoder.
        matcher: finds the query's anatomy in the key: by the frame that they share, or in a learned embedding.
        other_subject: probability that the key is of another subject of the batch. With the frame, all subjects must
            lie in one template's frame, and the datamodule must say so (``common_frame``).
        tries: places drawn per pair, of which the first that scores ``accept`` is taken, else the best that scores
            ``min_score``, else both crops are of one visit; the log says how many are. Alice's code draws 101 and takes
            the last one, whatever its score.
        accept: see tries (Alice: 0.7).
        min_score: see tries.
        mask_ratio: share of hidden blocks (Alice: 0.75).
        block: side(s) of a block in voxels (Alice: 16).
        objective: ``dino``, as Alice, or ``info_nce``: a crop finds its partner among the other pairs' crops, and a
            feature itself among the crop's others.
        condition: which features ask: the ``visible`` share of them that are hidden least, or ``all``.
        residual: adds q to what was looked up, as Alice's code does; see the module.
        reconstruction: of the ``hidden`` voxels, or of the ``whole`` crop.
        hidden: width of the heads' hidden layers (Alice: 2048).
        projection: width of the embeddings and of the attention (256; Alice: 256 and 512).
        heads: of the attention.
        prototypes: K (Alice: 512).
        norm: of the heads. Alice has none; without it their outputs nearly coincide in small batches (spread 0.02 after
            200 steps at 8 pairs, with batch norm 0.37; one seed).
        temperature: of the student's soft-max (0.1), or of InfoNCE.
        teacher_temperature: first and last of the teacher's.
        teacher_warmup: share of the training in which it moves.
        centre_momentum: of the centres.
        exclusion: mm around a feature within which ``info_nce`` takes no negatives.
        momentum: of the teacher at first; it rises to 1 by a cosine.
        weights: term → weight.
        **common: see :class:`lssl.strategy.Strategy`. ``views.overlap`` says how far the key may be off its match.
    """

    TERMS = ("inter", "intra", "reconstruction")
    WEIGHTS = {"inter": 1.0, "intra": 1.0, "reconstruction": 5.0}  # noqa: RUF012

    def __init__(
        self,
        backbone: Backbone,
        encoder: str = "bottleneck",
        decoder: str = "decoder.3",
        matcher: Matcher | None = None,
        other_subject: float = 0.0,
        tries: int = 20,
        accept: float = 0.7,
        min_score: float = 0.5,
        mask_ratio: float = 0.75,
        block: int | tuple[int, int, int] = 16,
        objective: Literal["dino", "info_nce"] = "dino",
        condition: Literal["visible", "all"] = "visible",
        residual: bool = False,
        reconstruction: Literal["hidden", "whole"] = "hidden",
        hidden: int = 2048,
        projection: int = 256,
        heads: int = 8,
        prototypes: int = 512,
        norm: Literal["batch", "layer", "none"] = "batch",
        temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.008, 0.01),
        teacher_warmup: float = 0.03,
        centre_momentum: float = 0.9,
        exclusion: float = 8.0,
        momentum: float = 0.996,
        weights: dict[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, weights={**self.WEIGHTS, **(weights or {})}, **common)
        positive(hidden=hidden, projection=projection, prototypes=prototypes, temperature=temperature)
        if projection % heads:
            raise InputError(f"heads: {heads} do not divide the projection of {projection}.")
        backbone.check_taps([encoder, decoder])
        self.encoder, self.objective = encoder, objective
        self.decoder = decoder if self.uses("intra") else None
        self.condition, self.whole_image = condition, reconstruction == "whole"
        frame = matcher or FrameMatcher()
        self.matched = MatchedViews(self.views, frame, other_subject, tries, accept, min_score)
        self.masking = BlockMasking(backbone, self.views.size, block, mask_ratio)
        backbone.freeze_unused(self._taps(), self.uses("reconstruction"))
        followed: dict[str, nn.Module] = {"backbone": backbone}

        def last() -> nn.Module:
            return Prototypes(projection, prototypes) if objective == "dino" else nn.Identity()

        channels = backbone.taps[encoder].channels
        if self.uses("inter"):
            self.pooled = Projector(2 * channels, hidden, projection, 3, norm)
            self.pooled_last = last()
            followed |= {"pooled": self.pooled, "pooled_last": self.pooled_last}
        if self.uses("intra"):
            self.psi = Projector(channels, hidden, projection, 3, norm)
            self.phi = Projector(backbone.taps[decoder].channels, hidden, projection, 3, norm)
            self.query = nn.Linear(projection, projection, bias=False)
            self.lookup = Lookup(projection, heads, last(), residual)
            followed |= {"psi": self.psi, "lookup": self.lookup}
        if self.uses("reconstruction"):
            self.to_image = nn.Conv3d(backbone.out_channels, backbone.in_channels, 1)
        # The online network's running statistics are those of masked crops, the teacher's of whole ones.
        self.teacher = Teacher(followed, momentum, buffers=False)
        self.losses = nn.ModuleDict(
            {
                term: SelfDistillation(prototypes, temperature, teacher_temperature, teacher_warmup, centre_momentum)
                for term in ("inter", "intra")
                if objective == "dino" and self.uses(term)
            }
        )
        self.among_pairs, self.among_places = QueueInfoNCE(temperature), DenseInfoNCE(temperature, exclusion)

    def sample(self, batch: PairBatch) -> tuple[View, View]:
        """Matched views; see :class:`lssl.correspondence.matched_views.MatchedViews`."""
        self.matched.matcher.to(batch.images.device)  # no part of this module: its weights are not saved again
        first, second, rates = self.matched(batch, self.generator)
        for name, value in rates.items():
            self.note(f"match/{name}", value)
        return first, second

    def advance(self, progress: float) -> None:
        """Teacher and temperatures."""
        super().advance(progress)
        for loss in self.losses.values():
            assert isinstance(loss, SelfDistillation)
            loss.anneal(progress)

    def setup(self, stage: str) -> None:
        """Refuses to pair subjects by a frame that they do not share."""
        super().setup(stage)
        shared = getattr(getattr(self.trainer, "datamodule", None), "common_frame", False)
        if self.matched.other_subject and isinstance(self.matched.matcher, FrameMatcher) and not shared:
            raise InputError(
                "other_subject: these subjects share no frame by which they could be matched; set it to 0, give an "
                "EmbeddingMatcher, or prepare them to a template (lssl prepare --template)."
            )

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        self._check_batch(len(batch))
        hidden = self.masking.draw(len(images), self.generator, images.device)
        online = self.masking(self.backbone, images, hidden, self._taps(), self.uses("reconstruction"))
        terms: dict[str, Tensor] = {}
        if self.teacher is not None and self._taps():
            with torch.no_grad():
                whole = self.teacher["backbone"](images, [self.encoder])[self.encoder]
            seen = 1 - F.adaptive_avg_pool3d(hidden.float(), whole.shape[2:])
            if self.uses("inter"):
                terms["inter"] = self._inter(online[self.encoder], whole, seen)
            if self.decoder is not None:
                terms["intra"] = self._intra(online[self.encoder], online[self.decoder], whole, seen, first, second)
        if self.uses("reconstruction"):
            error = (self.to_image(online["output"]).float() - images).square()
            share = torch.ones_like(hidden) if self.whole_image else hidden
            terms["reconstruction"] = (error * share).sum() / (share.sum() * images.shape[1])
        return terms

    def reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """A masked view, and what is made of it."""
        if not self.uses("reconstruction"):
            return None
        hidden = self.masking.draw(len(view.image), torch.Generator().manual_seed(0), view.image.device)
        made = self.to_image(self.masking(self.backbone, view.image, hidden, output=True)["output"])
        return view.image.masked_fill(hidden, 0), made

    def _inter(self, online: Tensor, whole: Tensor, seen: Tensor) -> Tensor:
        """Pooled embeddings; the teacher's of the other crop."""
        assert self.teacher is not None
        z = self.pooled(mean_and_max(online, seen))
        self.note("spread", spread(z))
        with torch.no_grad():
            target = self.teacher["pooled_last"](self.teacher["pooled"](mean_and_max(whole)))
        other = torch.cat(target.chunk(2)[::-1])
        if self.objective == "dino":
            return self._distil("inter", self.pooled_last(z), other)
        pairs = len(z) // 2
        pair = (rank() * pairs + torch.arange(pairs, device=z.device)).repeat(2)
        return self.among_pairs(z, other, pair, gather(target), gather(pair))

    def _intra(self, online: Tensor, decoded: Tensor, whole: Tensor, seen: Tensor, first: View, second: View) -> Tensor:
        """Conditional alignment within each crop."""
        assert self.teacher is not None
        cells = seen[0].numel()
        asked = cells if self.condition == "all" else max(1, cells - round(self.masking.ratio * cells))
        chosen = seen.flatten(1).topk(asked).indices[..., None]
        q = self.query(_each(self.psi, _rows(online).gather(1, chosen.expand(-1, -1, online.shape[1]))))
        answer = self.lookup(q, _each(self.phi, _rows(decoded)))
        with torch.no_grad():
            target = self.teacher["lookup"](q, _each(self.teacher["psi"], _rows(whole)))
        if self.objective == "dino":
            return self._distil("intra", answer, target)
        tap = self.backbone.taps[self.encoder]
        affine = geo.feature_affine(torch.cat([first.affine, second.affine]), tap.stride, tap.offset)
        places = geo.transform(affine, geo.lattice(whole.shape[2:], affine.device))
        return self.among_places(answer, target, places.gather(1, chosen.expand(-1, -1, 3)))

    def _distil(self, term: str, student: Tensor, teacher: Tensor) -> Tensor:
        """DINO's loss; the log says how many prototypes the batch takes, and how often the student takes the same."""
        criterion = self.losses[term]
        assert isinstance(criterion, SelfDistillation)
        value = criterion(student, teacher)
        with torch.no_grad():
            assigned = criterion.target(teacher).flatten(0, -2)
            mean = assigned.mean(0)
            self.note(f"{term}/prototypes", torch.exp(-(mean * mean.clamp_min(1e-12).log()).sum()))
            same = student.flatten(0, -2).argmax(1) == assigned.argmax(1)
            self.note(f"{term}/agreement", same.float().mean())
        if self.training:
            criterion.follow(teacher)
        return value

    def _taps(self) -> list[str]:
        if self.uses("intra"):
            return [self.encoder, *([self.decoder] if self.decoder else [])]
        return [self.encoder] if self.uses("inter") else []

    def _check_batch(self, pairs: int) -> None:
        if self.training and self.objective == "info_nce" and self.uses("inter") and pairs * world_size() < 2:
            raise InputError("info_nce compares pairs with one another: raise data.init_args.batch_size to 2 or more.")


class Lookup(nn.Module):
    """``ζ(softmax(q (W_k x)ᵀ / √d) W_v x)`` in several heads; ζ is a linear map, an MLP and the last layer.

    Args:
        width: of q, x and the attention.
        heads: of the attention.
        last: after ζ's MLP.
        residual: adds q to the attention's output.
    """

    def __init__(self, width: int, heads: int, last: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.zeta = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.last = last

    def forward(self, query: Tensor, rows: Tensor) -> Tensor:
        """What queries ``(B, K, width)`` find among ``rows (B, N, width)``: ``(B, K, prototypes)`` or ``width``."""
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, self.key(rows), self.value(rows)))
        found = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.last(self.zeta(query + found if self.residual else found))


def _rows(maps: Tensor) -> Tensor:
    """``(B, C, ...)`` as ``(B, N, C)``."""
    return maps.flatten(2).transpose(1, 2)


def _each(head: nn.Module, rows: Tensor) -> Tensor:
    """A head on ``(B, N, C)``."""
    return head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
