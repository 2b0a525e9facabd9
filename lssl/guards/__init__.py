"""What watches over a run: losses, gradients, weights and voxels that are not finite, and visits that were skipped."""

from lssl.guards.evaluation import EvaluationGuard
from lssl.guards.reading import SkippedReads
from lssl.guards.training import FiniteGuard

__all__ = ["EvaluationGuard", "FiniteGuard", "SkippedReads"]
