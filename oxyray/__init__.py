"""OxyRay: distributed training for generative recommendation on Ray. `from oxyray import Recommender` for recommendations in code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxyray.recommend import Recommender

__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    """`Recommender` is imported when first asked for: importing a part of OxyRay must not import all of it."""
    if name == "Recommender":
        from oxyray.recommend import Recommender

        return Recommender
    raise AttributeError(f"module 'oxyray' has no attribute {name!r}")
