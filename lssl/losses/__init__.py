"""Losses, one class per file, each with its formula, paper, shapes and an example."""

from lssl.losses.aligned_cosine import AlignedCosine
from lssl.losses.consistency import Consistency
from lssl.losses.covariance import Covariance
from lssl.losses.deep_supervision import deep_supervision
from lssl.losses.dense_info_nce import DenseInfoNCE
from lssl.losses.dice_ce import DiceCE
from lssl.losses.mined_info_nce import MinedInfoNCE
from lssl.losses.negative_cosine import NegativeCosine
from lssl.losses.nt_xent import NTXent
from lssl.losses.orthogonality import Orthogonality
from lssl.losses.queue_info_nce import QueueInfoNCE
from lssl.losses.self_distillation import Prototypes, SelfDistillation
from lssl.losses.supervised_contrast import SupervisedContrast
from lssl.losses.variance import Variance

__all__ = [
    "AlignedCosine",
    "Consistency",
    "Covariance",
    "DenseInfoNCE",
    "DiceCE",
    "MinedInfoNCE",
    "NTXent",
    "NegativeCosine",
    "Orthogonality",
    "Prototypes",
    "QueueInfoNCE",
    "SelfDistillation",
    "SupervisedContrast",
    "Variance",
    "deep_supervision",
]
