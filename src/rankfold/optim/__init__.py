"""What an optimizer keeps for a parameter, and how that follows the parameter's changes."""

from .state import adam_options, first_moments, moments, reset, resize, second_moments, transform, unwrapped

__all__ = [
    "adam_options",
    "first_moments",
    "moments",
    "reset",
    "resize",
    "second_moments",
    "transform",
    "unwrapped",
]
