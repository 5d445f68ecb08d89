"""How models are spread over ranks. Knows no Trainer.

`attention` and `positions` are what a model asks for when its sequences may be in parts.
"""

from paceline.parallel.context_parallel import attention, positions

__all__ = ["attention", "positions"]
