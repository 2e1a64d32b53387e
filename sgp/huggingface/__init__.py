"""sgp in models and trainers of Hugging Face transformers."""

from typing import Any

from sgp.huggingface.patching import Handle, UnsupportedModelError, patch

__all__ = ["AuditCallback", "AuditError", "Handle", "UnsupportedModelError", "patch"]


def __getattr__(name: str) -> Any:
    """AuditCallback needs transformers, which takes seconds to import."""
    if name in ("AuditCallback", "AuditError"):
        from sgp.huggingface import callback  # noqa: PLC0415

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
