"""Trained models that may be here: the repository's own, and larger ones beside the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_MODELS = ROOT.parent / "shared" / "models"


def real_models(*patterns: str) -> list[Path]:
    """Return the models of examples/tiny and ../shared/models whose names match one of `patterns`."""
    folders = (ROOT / "examples" / "tiny", SHARED_MODELS)
    return [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
