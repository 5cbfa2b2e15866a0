"""Every exception that users of this package can meet.

    SmolVLMError
    ├── ConfigurationError (ValueError)      a configuration contradicts itself or asks for what the model cannot do
    ├── CheckpointError (ValueError)         a checkpoint's tensors are missing, unexpected, misshapen or unreadable
    │   └── UnsafeCheckpointError            a pickle, which can run code when it is opened
    ├── InputError (ValueError)              what the caller passed cannot be used
    │   ├── ImageError                       a picture that cannot be read, is damaged, too large or ambiguous
    │   ├── VideoError                       the same for a video
    │   ├── DocumentError                    the same for a document of pages (PDF, TIFF), or for one of its pages
    │   ├── PromptError                      messages, templates or placeholders that do not fit together
    │   └── TokenCountError                  image features and <image> placeholders differ in number
    ├── FetchError (OSError)                 a file, URL or hub model that could not be fetched
    ├── MissingDependencyError (ImportError) an optional package is needed; the message says which extra brings it
    ├── CapacityError (RuntimeError)         the request needs more memory, cache or context than there is
    └── TrainingError (RuntimeError)         a training run that cannot go on (no target tokens, NaN loss, disk full)

A message says what was wrong, what came and what to do. Each class also derives from the built-in exception that a
caller who does not know this package would expect, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigurationError",
    "DocumentError",
    "FetchError",
    "ImageError",
    "InputError",
    "MissingDependencyError",
    "PromptError",
    "SmolVLMError",
    "TokenCountError",
    "TrainingError",
    "UnsafeCheckpointError",
    "VideoError",
]


class SmolVLMError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(SmolVLMError, ValueError):
    """A configuration contradicts itself, or asks for something the model cannot honour; names the field."""


class CheckpointError(SmolVLMError, ValueError):
    """A checkpoint does not hold exactly the tensors that its configuration calls for; names the tensors."""


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint is a pickle, which can run code when opened. Only safetensors (and GGUF text weights) are read."""


class InputError(SmolVLMError, ValueError):
    """What the caller passed cannot be used; says what came and what is accepted."""


class ImageError(InputError):
    """A picture that cannot be decoded, is damaged, too large, or whose layout is ambiguous."""


class VideoError(InputError):
    """A video that cannot be decoded, is damaged, or has no frames."""


class DocumentError(InputError):
    """A document that cannot be read, is encrypted, damaged or has no pages, or a page of it that cannot be drawn."""


class PromptError(InputError):
    """Messages, template and media do not fit together."""


class TokenCountError(InputError):
    """Image features and ``<image>`` placeholders differ in number; names the row, both counts and the likely cause."""


class FetchError(SmolVLMError, OSError):
    """A file, URL or hub model could not be fetched (missing, refused, timed out, too large)."""


class MissingDependencyError(SmolVLMError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class CapacityError(SmolVLMError, RuntimeError):
    """A request needs more memory, cache or context than there is."""


class TrainingError(SmolVLMError, RuntimeError):
    """A training run that cannot go on; nothing already saved is harmed."""
