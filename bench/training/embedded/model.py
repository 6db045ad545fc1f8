"""The embedded model as training sees it: built, run on packed questions, led by aids, counted and exported."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.embedded import labels as dense
from bench.training.head import multiply_adds
from crop.embedded import scenes
from crop.localizers.head import Head

if TYPE_CHECKING:
    from bench.training.embedded.data import Item

NUM_PATCHES = scenes.GRID**2
QUESTION = 12  # tokens that the localizer is counted with
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class Geometry:
    """Sizes of tower and decoder; heads are 32 wide."""

    tower: int = 192
    tower_layers: int = 3
    tower_inner: int = 512
    width: int = 288
    layers: int = 12
    inner: int = 576


GEOMETRY = Geometry()
EARLY_LAYERS = 8  # decoder layers that learn first; the others join later as identities


def vocabulary() -> dict[str, int]:
    """Token ids: special tokens, then the words and characters of the pictures."""
    return {word: i for i, word in enumerate((*SPECIAL, *scenes.vocabulary()))}


def flops(geometry: Geometry = GEOMETRY, tokens: int = NUM_PATCHES) -> dict[str, float]:
    """Floating-point operations of the unpruned first token's parts; a causal decoder needs half of its attention."""
    g, pixels = geometry, 3 * scenes.PATCH**2
    layer = 2 * (4 * g.tower**2 + 2 * g.tower * g.tower_inner) + 4 * tokens * g.tower
    block = 2 * (4 * g.width**2 + 3 * g.width * g.inner) + 2 * tokens * g.width
    return {
        "tower": tokens * (2 * pixels * g.tower + g.tower_layers * layer),
        "projector": tokens * 2 * (g.tower * g.width + g.width**2),
        "localizer": 2 * multiply_adds(Head(g.width), 1, scenes.GRID, tokens // scenes.GRID, QUESTION),
        "decoder": tokens * g.layers * block,
    }


def build(geometry: Geometry = GEOMETRY) -> nn.Module:
    """A ``LlavaForConditionalGeneration`` with random weights."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    g, words = geometry, vocabulary()
    vision = SiglipVisionConfig(
        hidden_size=g.tower, intermediate_size=g.tower_inner, num_hidden_layers=g.tower_layers,
        num_attention_heads=g.tower // 32, image_size=scenes.SIZE, patch_size=scenes.PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=g.width, intermediate_size=g.inner, num_hidden_layers=g.layers,
        num_attention_heads=g.width // 32, num_key_value_heads=g.width // 32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=words["<s>"], eos_token_id=words["</s>"], pad_token_id=words["<pad>"],
        crop_layer=4,  # bench.accuracy.layers
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
    look_around(model.model.vision_tower)
    return model


AROUND = ((0, -1), (0, 1), (-1, 0), (1, 0))  # (rows, columns) that a head looks away from its own patch
WAVES = 16  # wave lengths per axis
RATES = 2 * math.pi / torch.logspace(math.log2(3), math.log2(96), WAVES, base=2)


def places() -> Tensor:
    """(576, 4 * WAVES) sines and cosines of each patch's row, then of its column."""
    angle = torch.arange(scenes.GRID)[:, None] * RATES
    wave = torch.stack((angle.sin(), angle.cos()), 2).flatten(1)
    rows, columns = wave[:, None].expand(-1, scenes.GRID, -1), wave[None].expand(scenes.GRID, -1, -1)
    return torch.cat((rows, columns), 2).reshape(NUM_PATCHES, 4 * WAVES)


def look_around(tower: nn.Module) -> None:
    """Start with places as sines in dimensions of their own, and with heads that look at the four neighbours.

    A letter lies across up to four patches.
    """
    embeddings = tower.embeddings
    embeddings.position_embedding.weight.data.zero_()[:, : 4 * WAVES] = places()
    embeddings.patch_embedding.weight.data[: 4 * WAVES] = 0
    for layer in tower.encoder.layers[:2]:
        query, key = layer.self_attn.q_proj.weight.data, layer.self_attn.k_proj.weight.data
        for head, offsets in enumerate(AROUND):
            at = slice(32 * head, 32 * head + 32)
            query[at], key[at] = 0, 0
            for axis, offset in enumerate(offsets):
                for i, rate in enumerate(RATES[1::2].tolist()):
                    to, source = 32 * head + 16 * axis + 2 * i, 2 * WAVES * axis + 2 * (2 * i + 1)
                    c, s = math.cos(rate * offset), math.sin(rate * offset)
                    key[to, source] = key[to + 1, source + 1] = 2.0
                    query[to : to + 2, source : source + 2] = 2.0 * torch.tensor([[c, s], [-s, c]])


def use_layers(model: nn.Module, count: int | None = None) -> list[nn.Parameter]:
    """Run only the first decoder layers from now on (None: all); returns the parameters of the others."""
    language = model.model.language_model
    language.config.num_hidden_layers = len(language.layers) if count is None else count
    return [p for layer in language.layers[language.config.num_hidden_layers :] for p in layer.parameters()]


class Aids:
    """Losses on the attention of a few heads (training only).

    Where the character before this one is, where the answer is, where a character of the question or the answer's next
    one is, and where things are that are called by a word of the question, as "red" or "circle".
    """

    before, regions, spots, words, heads = (0, 1), (3, 5), (2, 5, 7), (2,), 2  # decoder layers, and heads of each
    later = 3  # first head of a second kind in a layer

    def __init__(self) -> None:
        self.on = False

    def start(
        self, prefix: int, before: Tensor, region: Tensor, region_rows: Tensor, spot: Tensor, named: Tensor
    ) -> None:
        """Begin to collect.

        Args:
            prefix: tokens before the text. before: (B, prefix + text) key of the character before each row's, or -1.
            region: (B, text, prefix) bool keys of each row's answer. region_rows: (B, text) bool rows to supervise.
            spot: (B, text) key of each row's character, or -1. named: (B, text, prefix) bool keys of what each row's word calls.
        """
        self.on, self.prefix = True, prefix
        self.before_key, self.region, self.region_rows, self.spot = before, region, region_rows, spot
        self.named = named
        self.losses = {}

    def collect(self, layer: int, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> None:
        """The losses of a layer. query, key: (B, heads, rows, d). mask: (B, 1, rows, rows) bool."""

        def scores(heads: slice, first: int) -> Tensor:
            logits = query[:, heads, first:] @ key[:, heads].transpose(2, 3) * scaling
            return logits.masked_fill(~mask[:, :, first:], -1e9).transpose(1, 2)  # (B, rows, heads, keys)

        def named(logits: Tensor, key: Tensor) -> Tensor:
            logits, key = logits[key >= 0], key[key >= 0]
            return logits.logsumexp(2) - logits.gather(2, key[:, None, None].expand(-1, logits.shape[1], -1))[..., 0]

        def mass(first: int, keys: Tensor, rows: Tensor) -> Tensor:
            logits, keys = scores(slice(first, first + self.heads), self.prefix)[rows], keys[rows]
            inside = logits[..., : self.prefix].masked_fill(~keys[:, None], -1e9).logsumexp(2)
            return logits.logsumexp(2) - inside

        found = {}
        if layer in self.before:
            found["before"] = named(scores(slice(0, 1), 0), self.before_key)
        if layer in self.spots:
            first = self.later if layer in self.regions else 0
            found["spot"] = named(scores(slice(first, first + self.heads), self.prefix), self.spot)
        if layer in self.regions:
            found["mass"] = mass(0, self.region, self.region_rows)
        if layer in self.words:
            found["word"] = mass(self.later, self.named, self.named.any(2))
        for name, loss in found.items():
            self.losses[f"{name}{layer}"] = loss.clamp_max(12).mean() if loss.numel() else loss.sum()

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        if self.on and module.layer_idx in {*self.before, *self.regions, *self.spots, *self.words}:
            self.collect(module.layer_idx, query, key, mask, scaling)
        if self.on:  # the rows of the prefix need no more than themselves
            p = self.prefix
            first = F.scaled_dot_product_attention(
                query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True, scale=scaling
            )
            rest = F.scaled_dot_product_attention(query[:, :, p:], key, value, attn_mask=mask[:, :, p:], scale=scaling)
            out = torch.cat((first, rest), 2)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


AIDS = Aids()


class NamedPatches(nn.Module):
    """Embeddings of what each patch shows, as a perfect tower and projector would hand them out."""

    spread = 0.09  # mean square of an embedding

    def __init__(self, width: int) -> None:
        super().__init__()
        std = math.sqrt(self.spread / 2)
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in dense.HEADS.values())
        for table in self.tables:
            nn.init.normal_(table.weight, std=std / math.sqrt(len(dense.HEADS)))
        self.place = nn.Linear(4 * WAVES, width)
        nn.init.normal_(self.place.weight, std=std / math.sqrt(2 * WAVES))
        self.register_buffer("waves", places())

    def forward(self, labels: Tensor, keep: Tensor) -> Tensor:
        """(B, n, width) embeddings of labels (B, n, heads) at patches keep (B, n)."""
        seen = self.place(self.waves[keep])
        for i, table in enumerate(self.tables):
            seen = seen + table(labels[..., i])
        return seen

    def see(self, item: Item) -> Tensor:
        """(1, 576, width) embeddings of a whole picture."""
        return self(item.labels[None].long(), torch.arange(NUM_PATCHES)[None])


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
        vision: (B, n, d) projected features of patches keep (B, n).
        ids, block, place: (B, text) tokens, the question each belongs to, and its place in that question.
    """
    language, prefix = model.model.language_model, 1 + vision.shape[1]
    start = language.embed_tokens.weight[model.config.text_config.bos_token_id].expand(len(ids), 1, -1)
    embeds = torch.cat((start, vision, language.embed_tokens(ids)), 1)
    first = torch.zeros(len(ids), 1, dtype=torch.long)
    position = torch.cat((first, 1 + keep, 1 + NUM_PATCHES + place), 1)
    mask = packed_mask(prefix, block)
    out = language(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False)
    return out.last_hidden_state[:, prefix:]


CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{{ ' ' }}{%- endif -%}
{%- if part['type'] == 'text' -%}
{%- for word in part['text'].strip().rstrip('?').split() -%}{{ word if word == word|upper else word|lower }}{{ ' ' }}{%- endfor -%}?
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
"""


def build_processor():
    """The processor saved beside the weights (Pillow only); capitals, digits and full stops are tokens of their own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[A-Z0-9]|[^\w\s]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    joined = decoders.Replace(Regex(r"(?<=[A-Z0-9.]) (?=[A-Z0-9.])"), "")
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), joined])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )  # fmt: skip
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    return LlavaProcessor(
        images,
        fast,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
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
