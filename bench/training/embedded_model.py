"""The embedded model as training sees it: built, run on packed questions, led by aids, and exported with its processor."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.embedded_data import NUM_PATCHES
from crop.embedded import things

SIZES = {  # tower width, tower layers, decoder width, decoder layers, decoder feed-forward
    "small": (128, 5, 128, 8, 320),
    "medium": (192, 6, 192, 8, 512),
    "large": (224, 6, 256, 8, 512),
}


def build(size: str, vocabulary: dict[str, int]):
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    tower, tower_layers, width, layers, inner = SIZES[size]
    vision = SiglipVisionConfig(
        hidden_size=tower, intermediate_size=2 * tower, num_hidden_layers=tower_layers, num_attention_heads=4,
        image_size=things.SIZE, patch_size=things.PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=vocabulary["<s>"], eos_token_id=vocabulary["</s>"], pad_token_id=vocabulary["<pad>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"], image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = 0.07 if "embed_tokens" in name else 0.8 / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)
    # Rows and columns in sines: neighbours are then a fixed rotation apart from the first step on.
    place = model.model.vision_tower.embeddings.position_embedding.weight
    axis = (
        torch.arange(things.GRID)[:, None]
        * 2
        * math.pi
        / torch.logspace(math.log2(3), math.log2(64), tower // 4, base=2)
    )
    wave = torch.cat((axis.sin(), axis.cos()), 1)
    grid = torch.cat((wave[:, None].expand(-1, things.GRID, -1), wave[None].expand(things.GRID, -1, -1)), 2)
    place.data.copy_(grid.reshape(NUM_PATCHES, tower) * 0.4)
    return model


class Aids:
    """What the attention of some decoder layers contributes to the loss (training only)."""

    mass_layers, mass_heads, blind_layers = (1, 3), 2, (0, 1)

    def __init__(self) -> None:
        self.on = False

    def start(self, prefix: int, region: Tensor, rows: Tensor) -> None:
        """region: (B, text, T) bool keys of each row's answer; rows: (B, text) bool rows to supervise."""
        self.on, self.prefix, self.region, self.rows = True, prefix, region, rows
        self.mass, self.value = {}, []

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        if self.on and module.layer_idx in self.mass_layers:
            heads = self.mass_heads
            logits = query[:, :heads, self.prefix :] @ key[:, :heads].transpose(2, 3) * scaling
            logits = logits.float().masked_fill(~mask[:, :, self.prefix :], -1e9)
            inside = logits.masked_fill(~self.region[:, None], -1e9).logsumexp(3) - logits.logsumexp(3)
            picked = inside.transpose(1, 2)[self.rows]
            self.mass[module.layer_idx] = -picked.clamp_min(-12).mean()
        if self.on and module.layer_idx in self.blind_layers:
            self.value.append(value[:, :, 1 : self.prefix].float().square().mean())
        return out.transpose(1, 2).contiguous(), None


AIDS = Aids()


def tower_features(model, patches: Tensor, keep: Tensor | None) -> Tensor:
    """Output of the stock tower's encoder for patches (B, n, 768) uint8 at grid places keep (B, n)."""
    tower = model.model.vision_tower
    kernel = tower.embeddings.patch_embedding
    pixels = patches.to(kernel.weight.device).float() / 127.5 - 1
    place = tower.embeddings.position_embedding.weight
    place = place if keep is None else place[keep]
    hidden = F.linear(pixels, kernel.weight.flatten(1), kernel.bias) + place
    return tower.encoder(inputs_embeds=hidden).last_hidden_state


def packed_mask(prefix: int, questions: int, length: int) -> Tensor:
    """(1, 1, T, T) bool: a causal prefix that every question sees, and questions that see nothing of each other."""
    total = prefix + questions * length
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :prefix] = True
    mask[:prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    block = torch.ones(length, length).tril().bool()
    mask[prefix:, prefix:] = torch.block_diag(*[block] * questions).bool()
    return mask[None, None]


def answer_logits(model, vision: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
    """Logits (B, Q, L, vocabulary) of packed questions ids (B, Q, L) behind vision features (B, n, d)."""
    batch, questions, length = ids.shape
    language, prefix = model.model.language_model, 1 + vision.shape[1]
    words = language.embed_tokens(ids.flatten(1))
    start = language.embed_tokens.weight[model.config.text_config.bos_token_id].expand(batch, 1, -1)
    embeds = torch.cat((start, model.model.multi_modal_projector(vision), words), 1)
    text = (1 + NUM_PATCHES + torch.arange(length)).repeat(questions).expand(batch, -1)
    position = torch.cat((torch.zeros(batch, 1, dtype=torch.long), 1 + keep, text), 1).to(ids.device)
    mask = packed_mask(prefix, questions, length).to(ids.device)
    hidden = language(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix:]).unflatten(1, (questions, length))


def spoken_words() -> tuple[str, ...]:
    """Every word of every question and answer, sorted; digits one by one."""
    words = (
        set(things.DRAWN_WORDS) | set(things.COLORS) | set(things.SHAPES) | set(things.PICTURES) | set("0123456789?")
    )
    words |= set("top middle bottom left center right yes no shapes sign receipt".split())
    words |= {f"{shape}s" for shape in things.SHAPES}
    words |= set(
        "what kind of picture is this a how many are there digit word on the color shape with has where does "
        "say price which item costs date shop an it in".split()
    )
    return tuple(sorted(words))


def vocabulary() -> dict[str, int]:
    words = ("<pad>", "<s>", "</s>", "<unk>", "<image>", *spoken_words())
    return {word: i for i, word in enumerate(words)}


def build_processor():
    """The processor that is saved beside the weights (Pillow only)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d|[^\w\s]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip
    images = SiglipImageProcessorPil(
        size={"height": things.SIZE, "width": things.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=things.PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )


def export(model, directory: Path) -> None:
    """Write weights (bfloat16) and processor; the directory is replaced in one move."""
    part, old = (
        directory.with_name(directory.name + ".part"),
        directory.with_name(directory.name + ".old"),
    )
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(part)
    build_processor().save_pretrained(part)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
