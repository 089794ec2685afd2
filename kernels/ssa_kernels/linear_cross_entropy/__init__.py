"""The output layer and its cross entropy as one operator, over a vocabulary that may be split over ranks: api.py explains how."""

from .api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
