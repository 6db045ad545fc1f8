"""The second embedded model as training sees it: built, run on packed questions, led by aids, counted and exported."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.model2 import pages

NUM_PATCHES = pages.GRID**2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class Geometry:
    """Sizes of tower and decoder; heads are 32 wide."""

    tower: int = 160
    tower_layers: int = 4
    tower_inner: int = 320
    width: int = 288
    layers: int = 12
    inner: int = 576


GEOMETRY = Geometry()
EARLY_LAYERS = 8  # decoder layers that learn first; the others join later as identities


def vocabulary() -> dict[str, int]:
    """Token ids: special tokens, then the words and characters of the pictures."""
    return {word: i for i, word in enumerate((*SPECIAL, *pages.vocabulary()))}


def flops(geometry: Geometry = GEOMETRY, tokens: int = NUM_PATCHES) -> dict[str, float]:
    """Floating-point operations of the unpruned first token's parts; a causal decoder needs half of its attention."""
    g, pixels = geometry, 3 * pages.PATCH**2
    layer = 2 * (4 * g.tower**2 + 2 * g.tower * g.tower_inner) + 4 * tokens * g.tower
    block = 2 * (4 * g.width**2 + 3 * g.width * g.inner) + 2 * tokens * g.width
    return {
        "tower": tokens * (2 * pixels * g.tower + g.tower_layers * layer),
        "projector": tokens * 2 * (g.tower * g.width + g.width**2),
        "localizer": tokens * 4 * g.tower * 128,  # the head that scores patches: two products, 128 wide
        "decoder": tokens * g.layers * block,
    }


def build(geometry: Geometry = GEOMETRY) -> nn.Module:
    """A ``LlavaForConditionalGeneration`` with random weights."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    g, words = geometry, vocabulary()
    vision = SiglipVisionConfig(
        hidden_size=g.tower, intermediate_size=g.tower_inner, num_hidden_layers=g.tower_layers,
        num_attention_heads=g.tower // 32, image_size=pages.SIZE, patch_size=pages.PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=g.width, intermediate_size=g.inner, num_hidden_layers=g.layers,
        num_attention_heads=g.width // 32, num_key_value_heads=g.width // 32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=words["<s>"], eos_token_id=words["</s>"], pad_token_id=words["<pad>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words["<image>"], image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = 0.07 if "embed_tokens" in name else 0.8 / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)
    for layer in model.model.language_model.layers[EARLY_LAYERS:]:  # they pass on what they get until they are trained
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    # Rows and columns in sines: neighbours are then a fixed rotation apart from the first step on.
    place = model.model.vision_tower.embeddings.position_embedding.weight
    periods = torch.logspace(math.log2(3), math.log2(96), g.tower // 4, base=2)
    axis = torch.arange(pages.GRID)[:, None] * 2 * math.pi / periods
    wave = torch.cat((axis.sin(), axis.cos()), 1)
    rows, columns = wave[:, None].expand(-1, pages.GRID, -1), wave[None].expand(pages.GRID, -1, -1)
    place.data.copy_(torch.cat((rows, columns), 2).reshape(NUM_PATCHES, g.tower) * 0.4)
    return model


def use_layers(model: nn.Module, count: int | None = None) -> list[nn.Parameter]:
    """Run only the first decoder layers from now on (None: all); returns the parameters of the others."""
    language = model.model.language_model
    language.config.num_hidden_layers = len(language.layers) if count is None else count
    return [p for layer in language.layers[language.config.num_hidden_layers :] for p in layer.parameters()]


class Aids:
    """Losses on the attention of a few heads (training only): where the answer is, and where its next character is."""

    regions, spots, heads = (1, 3), (4, 6), 2  # decoder layers, and heads of each

    def __init__(self) -> None:
        self.on = False

    def start(self, prefix: int, region: Tensor, region_rows: Tensor, spot: Tensor, spot_rows: Tensor) -> None:
        """Begin to collect.

        Args:
            prefix: tokens before the text. region: (B, text, prefix) bool keys of each row's answer.
            region_rows, spot_rows: (B, text) bool rows to supervise. spot: (B, text) key of each row's character.
        """
        self.on, self.prefix = True, prefix
        self.region, self.region_rows, self.spot, self.spot_rows = region, region_rows, spot, spot_rows
        self.losses = {}

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        if self.on and module.layer_idx in (*self.regions, *self.spots):
            logits = query[:, : self.heads, self.prefix :] @ key[:, : self.heads].transpose(2, 3) * scaling
            logits = logits.float().masked_fill(~mask[:, :, self.prefix :], -1e9).transpose(1, 2)
            if module.layer_idx in self.regions:
                logits, region = logits[self.region_rows], self.region[self.region_rows][:, None]
                inside = logits[..., : self.prefix].masked_fill(~region, -1e9).logsumexp(2)
            else:
                logits, spot = logits[self.spot_rows], self.spot[self.spot_rows][:, None, None]
                inside = logits.gather(2, spot.expand(-1, self.heads, 1))[..., 0]
            loss = (logits.logsumexp(2) - inside).clamp_max(12)
            name = "mass" if module.layer_idx in self.regions else "spot"
            self.losses[f"{name}{module.layer_idx}"] = loss.mean() if loss.numel() else logits.sum()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


AIDS = Aids()


def tower_features(model: nn.Module, patches: Tensor, keep: Tensor | None = None) -> Tensor:
    """Output (B, n, d) of the stock tower's encoder for patches (B, n, 768) uint8 at grid places keep (B, n)."""
    tower = model.model.vision_tower
    kernel = tower.embeddings.patch_embedding
    place = tower.embeddings.position_embedding.weight
    hidden = F.linear(patches.float() / 127.5 - 1, kernel.weight.flatten(1), kernel.bias)
    return tower.encoder(inputs_embeds=hidden + (place if keep is None else place[keep])).last_hidden_state


def packed_mask(prefix: int, block: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a causal prefix that every question sees, and questions that see nothing of each other.

    Args:
        prefix: tokens before the text. block: (B, text) number of the question that a token belongs to, -1: padding.
    """
    batch, length = block.shape
    total = prefix + length
    mask = torch.zeros(batch, total, total, dtype=torch.bool)
    mask[:, prefix:, :prefix] = True
    mask[:, :prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None]
    mask[:, prefix:, prefix:] = same & torch.ones(length, length, dtype=torch.bool).tril()
    return mask[:, None]


def text_hidden(model: nn.Module, vision: Tensor, keep: Tensor, ids: Tensor, block: Tensor, place: Tensor) -> Tensor:
    """Last hidden states (B, text, d) of packed questions behind a picture.

    Args:
        vision: (B, n, d) tower features at patches keep (B, n).
        ids, block, place: (B, text) tokens, the question each belongs to, and its place in that question.
    """
    language, prefix = model.model.language_model, 1 + vision.shape[1]
    start = language.embed_tokens.weight[model.config.text_config.bos_token_id].expand(len(ids), 1, -1)
    embeds = torch.cat((start, model.model.multi_modal_projector(vision), language.embed_tokens(ids)), 1)
    first = torch.zeros(len(ids), 1, dtype=torch.long)
    position = torch.cat((first, 1 + keep, 1 + NUM_PATCHES + place), 1)
    mask = packed_mask(prefix, block)
    out = language(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False)
    return out.last_hidden_state[:, prefix:]


def build_processor():
    """The processor saved beside the weights (Pillow only); capitals, digits and full stops are tokens of their own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[A-Z0-9]|[^\w\s]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip
    size = {"height": pages.SIZE, "width": pages.SIZE}
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    return LlavaProcessor(
        images, fast, patch_size=pages.PATCH, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )


def export(model: nn.Module, directory: Path) -> None:
    """Write weights (bfloat16) and processor; the directory is replaced in one move."""
    part, old = (directory.with_name(directory.name + end) for end in (".part", ".old"))
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    used = model.model.language_model.config.num_hidden_layers
    use_layers(model)  # the files hold every layer, those that still pass on what they get as well
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(part)
    build_processor().save_pretrained(part)
    use_layers(model, used)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
