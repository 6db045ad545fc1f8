"""The hooks of a ``patch`` block, in the order in which a call meets them.

* ``Calls``: ``generate()`` and the multimodal model; plans the call.
* ``PoolingDoor``, at the language model: Pre-LLM Compression pools the image tokens' embeddings; position ids, mask and
  cache follow; outputs come back at the unpruned length.
* ``PruningDoor``, at decoder layer L: Inner-LLM Pruning drops tokens by scores read from the query and key of layer
  L - 1's attention call.

No model code is copied and attention is left as it is. What the three share is the ``Block``.
"""

from crop.patching.context import Block
from crop.patching.hooks.entry import Calls
from crop.patching.hooks.pooling import PoolingDoor
from crop.patching.hooks.pruning import PruningDoor

__all__ = ["Block", "Calls", "PoolingDoor", "PruningDoor"]
