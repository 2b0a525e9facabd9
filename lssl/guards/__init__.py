"""What watches over a run's numbers: losses, gradients, weights and voxels that are not finite."""

from lssl.guards.evaluation import EvaluationGuard
from lssl.guards.training import FiniteGuard

__all__ = ["EvaluationGuard", "FiniteGuard"]
