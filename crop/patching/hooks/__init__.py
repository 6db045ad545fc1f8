"""The hooks of a ``patch`` block, in the order in which a call meets them.

* ``EntryHook``: ``generate()``, the vision tower, the multimodal model; plans the call.
* ``PoolingHook``, at the language model: Pre-LLM Compression pools the image tokens' embeddings; position ids, mask and
  cache follow; outputs come back at the unpruned length.
* ``PruningHook``, at the decoder layers: Inner-LLM Pruning drops tokens at the input of layer L by scores read from the
  query and key of layer L - 1's attention call.

No model code is copied and attention is left as it is. What the three share is the ``PatchContext`` and the
``ForwardState`` of the call.
"""

from crop.patching.hooks.entry import EntryHook
from crop.patching.hooks.pooling import PoolingHook
from crop.patching.hooks.pruning import PruningHook

__all__ = ["EntryHook", "PoolingHook", "PruningHook"]
