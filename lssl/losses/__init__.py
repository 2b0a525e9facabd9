"""Losses, one class per file: its formula, its paper, its shapes, an example that runs."""

from lssl.losses.covariance import Covariance
from lssl.losses.dense_info_nce import DenseInfoNCE
from lssl.losses.negative_cosine import NegativeCosine
from lssl.losses.orthogonality import Orthogonality
from lssl.losses.variance import Variance

__all__ = ["Covariance", "DenseInfoNCE", "NegativeCosine", "Orthogonality", "Variance"]
