"""The hooks of a ``patch`` block, in the order in which a call meets them: entry, pooling, pruning.

No model code is copied and attention is left as it is; they share a ``PatchContext`` and the call's ``ForwardState``.
"""

from crop.patching.hooks.entry import EntryHook
from crop.patching.hooks.pooling import PoolingHook
from crop.patching.hooks.pruning import PruningHook

__all__ = ["EntryHook", "PoolingHook", "PruningHook"]
