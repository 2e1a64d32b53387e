"""sgp in models and trainers of Hugging Face transformers."""

from sgp.huggingface.patching import Handle, UnsupportedModelError, patch

__all__ = ["Handle", "UnsupportedModelError", "patch"]
