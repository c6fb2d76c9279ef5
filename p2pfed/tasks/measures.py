"""Figures of merit that several tasks have."""

from __future__ import annotations

from torch import Tensor

__all__ = ["area_under_curve"]


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """The chance that a positive record scores higher than a negative one (Mann and Whitney).

    Args:
        scores: Shape (N,).
        labels: 1 or 0, shape (N,).

    Returns:
        0 to 1, where ties count one half; NaN without both kinds.
    """
    positive, negative = scores[labels == 1][:, None], scores[labels == 0]
    return float(((positive > negative).float() + 0.5 * (positive == negative).float()).mean())
