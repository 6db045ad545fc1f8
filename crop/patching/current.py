"""What runs now in this thread and task: the innermost call of a model, the innermost ``generate()``."""

from contextvars import ContextVar
from typing import Any

CALL: ContextVar[Any] = ContextVar("crop_call", default=None)  # a ForwardState
GENERATION: ContextVar[Any] = ContextVar("crop_generation", default=None)  # a GenerationState
