"""Every family that vLLM can serve pruned, tiny: a folder with random weights, a processor and a tokenizer of 80 words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

WORDS = [f"w{n}" for n in range(80)]
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
NAMED = {  # attributes of a tokenizer that processors ask for -> tokens
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<|video_pad|>",
}
SPECIAL = ["<pad>", "<unk>", "<image>", "[IMG]", "<|image_pad|>", *NAMED.values(),
           "<|vision_start|>", "<|vision_end|>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>",
           "<|begin_of_video|>", "<|end_of_video|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
           "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", *TILES, "\n", "\n\n"]  # fmt: skip
ID = {token: number for number, token in enumerate([*WORDS, *SPECIAL])}
VOCAB = 192
PATCH = 4  # pixels
SIDE = 8 * PATCH  # of a square tower, pixels

TEXT = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
            pad_token_id=ID["<pad>"], head_dim=32, tie_word_embeddings=False)  # fmt: skip
MROPE = dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]))
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH)
QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2)
QWEN_IDS = dict(image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
                vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"])  # fmt: skip
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2))]
SQUARE = {"height": SIDE, "width": SIDE}


@dataclass(frozen=True)
class Model:
    """A family as vLLM meets it.

    Args:
        classes: the transformers class. config: () -> its configuration.
        processor: tokenizer -> its processor.
        image: what a prompt says for one image.
        size: (width, height) of pictures; others are made from it.
        published: what checkpoints say in config.json other than transformers does.
        image_token: what its tokenizer says that is, where the processor asks.
        half: vLLM's kernels for the CPU run it in bfloat16 alone.
    """

    classes: str
    config: Callable[[], Any]
    processor: Callable[[Any], Any]
    image: str = "<image>"
    size: tuple[int, int] = (72, 48)
    published: Mapping[str, Any] = field(default_factory=dict)
    image_token: str = ""
    half: bool = False


def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=ID["<image>"],
    )  # fmt: skip


def llava_processor(tokenizer: Any) -> Any:
    image = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return transformers.LlavaProcessor(image, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
                                       num_additional_image_tokens=1)  # fmt: skip


def pixtral_tower() -> Any:
    return transformers.PixtralVisionConfig(**TOWER, image_size=64)


def pixtral() -> Any:
    return transformers.LlavaConfig(
        vision_config=pixtral_tower(), text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=ID["[IMG]"], vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip


def mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=pixtral_tower(), text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=ID["[IMG]"], spatial_merge_size=2,
    )  # fmt: skip


def pixtral_processor(merge: int) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        patch = {"height": PATCH * merge, "width": PATCH * merge}
        image = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch)
        return transformers.PixtralProcessor(image, tokenizer, patch_size=PATCH, spatial_merge_size=merge)

    return build


def llava_next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=ID["<image>"], image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def llava_next_processor(tokenizer: Any) -> Any:
    image = transformers.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE,
                                                 image_grid_pinpoints=PINPOINTS)  # fmt: skip
    return transformers.LlavaNextProcessor(image, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
                                           num_additional_image_tokens=1)  # fmt: skip


def onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=SIDE, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT), image_token_index=ID["<image>"],
        video_token_index=ID["<|video_pad|>"], image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def onevision_processor(tokenizer: Any) -> Any:
    image = transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    video = transformers.LlavaOnevisionVideoProcessor(size=SQUARE)
    return transformers.LlavaOnevisionProcessor(image, tokenizer, video, num_image_tokens=(SIDE // PATCH) ** 2,
                                                vision_feature_select_strategy="full", video_token="<|video_pad|>")  # fmt: skip


def qwen2_vl() -> Any:
    vision = dict(QWEN_TOWER, embed_dim=32, hidden_size=64, mlp_ratio=2)
    return transformers.Qwen2VLConfig(text_config=MROPE, vision_config=vision, **QWEN_IDS)


def qwen2_5_vl() -> Any:
    vision = dict(QWEN_TOWER, hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=4 * 2 * PATCH,
                  fullatt_block_indexes=[1])  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=MROPE, vision_config=vision, **QWEN_IDS)


QWEN3_TOWER = dict(QWEN_TOWER, hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=64)


QWEN3_TEXT = dict(MROPE, rope_parameters=dict(MROPE["rope_parameters"], mrope_interleaved=True))


def qwen3_vl() -> Any:
    vision = dict(QWEN3_TOWER, depth=3, deepstack_visual_indexes=[0, 1, 2])
    return transformers.Qwen3VLConfig(text_config=QWEN3_TEXT, vision_config=vision, **QWEN_IDS)


def qwen3_vl_moe() -> Any:
    vision = dict(QWEN3_TOWER, depth=3, deepstack_visual_indexes=[0, 1, 2])
    text = dict(QWEN3_TEXT, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def qwen3_5() -> Any:
    rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25, mrope_section=[2, 1, 1],
                mrope_interleaved=True)  # fmt: skip
    text = dict(TEXT, rope_parameters=rope, layer_types=["linear_attention", "full_attention"] * 2,
                linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=2,
                linear_num_value_heads=4)  # fmt: skip
    return transformers.Qwen3_5Config(text_config=text, vision_config=QWEN3_TOWER, **QWEN_IDS)


def qwen_processor(kind: str, video: str) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        size = {"shortest_edge": 16 * PATCH**2, "longest_edge": 1024 * PATCH**2}
        sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
        image = transformers.Qwen2VLImageProcessor(**sizes)
        return getattr(transformers, kind)(image, tokenizer, getattr(transformers, video)(**sizes))

    return build


def glm_config(classes: str, text: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        vision = dict(QWEN_TOWER, hidden_size=32, intermediate_size=48, out_hidden_size=64, image_size=64)
        ids = dict(image_token_id=ID["<|image|>"], video_token_id=ID["<|video|>"],
                   image_start_token_id=ID["<|begin_of_image|>"], image_end_token_id=ID["<|end_of_image|>"],
                   video_start_token_id=ID["<|begin_of_video|>"], video_end_token_id=ID["<|end_of_video|>"])  # fmt: skip
        return getattr(transformers, classes)(text_config=text, vision_config=vision, **ids)

    return build


GLM_TEXT = dict(
    MROPE, rope_parameters=dict(MROPE["rope_parameters"], partial_rotary_factor=0.5, mrope_section=[4, 2, 2])
)
GLM_MOE = dict(GLM_TEXT, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, first_k_dense_replace=1,
               use_qk_norm=False)  # fmt: skip


def glm_processor(tokenizer: Any) -> Any:
    tokenizer.video_token = "<|video|>"
    size = {"shortest_edge": 16 * PATCH**2, "longest_edge": 2048 * PATCH**2}
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    image = transformers.Glm4vImageProcessor(**sizes)
    return transformers.Glm4vProcessor(image, tokenizer, transformers.Glm4vVideoProcessor(**sizes))


def glm_ocr() -> Any:
    rope = dict(MROPE["rope_parameters"], partial_rotary_factor=1.0)
    # vLLM takes the width of the tower's last layer from here, transformers from the tower: they agree in checkpoints.
    text = dict(MROPE, rope_parameters=rope, intermediate_size=3 * MROPE["hidden_size"])
    return glm_config("GlmOcrConfig", text)()


def paddleocr_vl() -> Any:
    vision = dict(TOWER, image_size=SIDE, spatial_merge_size=2)
    ids = dict(QWEN_IDS, image_token_id=ID["<|IMAGE_PLACEHOLDER|>"])
    return transformers.PaddleOCRVLConfig(text_config=MROPE, vision_config=vision, **ids, tie_word_embeddings=False)


def paddle_processor(tokenizer: Any) -> Any:
    size = {"shortest_edge": 16 * PATCH**2, "longest_edge": 1024 * PATCH**2}
    image = transformers.PaddleOCRVLImageProcessor(patch_size=PATCH, merge_size=2, size=size)
    return transformers.PaddleOCRVLProcessor(image, tokenizer)


def lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        vision_config=pixtral_tower(), text_config=transformers.Qwen3Config(**TEXT), image_token_id=ID["[IMG]"],
        tie_word_embeddings=False,
    )  # fmt: skip


def lighton_processor(tokenizer: Any) -> Any:
    patch = {"height": 2 * PATCH, "width": 2 * PATCH}
    image = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch)
    return transformers.LightOnOcrProcessor(image, tokenizer, patch_size=PATCH, spatial_merge_size=2)


def internvl() -> Any:
    vision = {key: value for key, value in TOWER.items() if key != "patch_size"}
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        text_config=transformers.Qwen2Config(**TEXT), image_token_id=ID["<IMG_CONTEXT>"], image_seq_length=16,
    )  # fmt: skip


def internvl_processor(tokenizer: Any) -> Any:
    image = transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    video = transformers.InternVLVideoProcessor(size=SQUARE)
    return transformers.InternVLProcessor(image, tokenizer, video, image_seq_length=16)


def idefics_config(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        vision = getattr(transformers, f"{kind}VisionConfig")(**TOWER, image_size=SIDE)
        return getattr(transformers, f"{kind}Config")(
            vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=ID["<image>"],
            scale_factor=2, pad_token_id=ID["<pad>"], tie_word_embeddings=False,
        )  # fmt: skip

    return build


def idefics_processor(kind: str) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        sizes = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        image = getattr(transformers, f"{kind}ImageProcessor")(**sizes)
        more = [transformers.SmolVLMVideoProcessor(**sizes)] if kind == "SmolVLM" else []
        return getattr(transformers, f"{kind}Processor")(image, tokenizer, *more, image_seq_len=16)

    return build


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = "<|begin_of_image|><|image|><|end_of_image|>"
QWEN2 = qwen_processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor")
QWEN3 = qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
MODELS: dict[str, Model] = {
    "llava": Model("LlavaForConditionalGeneration", llava, llava_processor),
    "qwen2_5_vl": Model("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl,
                        qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"), QWEN),
    "qwen3_vl": Model("Qwen3VLForConditionalGeneration", qwen3_vl, QWEN3, QWEN),
    "llava_next": Model("LlavaNextForConditionalGeneration", llava_next, llava_next_processor),
    "pixtral": Model("LlavaForConditionalGeneration", pixtral, pixtral_processor(1), "[IMG]"),
    "qwen2_vl": Model("Qwen2VLForConditionalGeneration", qwen2_vl, QWEN2, QWEN),
    "internvl": Model("InternVLForConditionalGeneration", internvl, internvl_processor, "<IMG_CONTEXT>"),
    "idefics3": Model("Idefics3ForConditionalGeneration", idefics_config("Idefics3"), idefics_processor("Idefics3")),
    "smolvlm": Model("SmolVLMForConditionalGeneration", idefics_config("SmolVLM"), idefics_processor("SmolVLM")),
    "mistral3": Model("Mistral3ForConditionalGeneration", mistral3, pixtral_processor(2), "[IMG]"),
    "onevision": Model("LlavaOnevisionForConditionalGeneration", onevision, onevision_processor),
    "glm4v": Model("Glm4vForConditionalGeneration", glm_config("Glm4vConfig", dict(GLM_TEXT, attention_bias=True)), glm_processor, GLM),
    "glm4v_moe": Model("Glm4vMoeForConditionalGeneration", glm_config("Glm4vMoeConfig", GLM_MOE), glm_processor, GLM),
    "glm_ocr": Model("GlmOcrForConditionalGeneration", glm_ocr, glm_processor, GLM),
    "paddleocr_vl": Model("PaddleOCRVLForConditionalGeneration", paddleocr_vl, paddle_processor,
                          "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>",
                          size=(SIDE, SIDE)),  # as its position table: vLLM and transformers stretch that differently
    "lighton_ocr": Model("LightOnOcrForConditionalGeneration", lighton_ocr, lighton_processor, "[IMG]",
                         image_token="[IMG]", published={
        "architectures": ["LightOnOCRForConditionalGeneration"], "model_type": "mistral3",
        "image_token_index": ID["[IMG]"],
    }),
    "qwen3_5": Model("Qwen3_5ForConditionalGeneration", qwen3_5, QWEN3, QWEN, half=True),
    "qwen3_vl_moe": Model("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe, QWEN3, QWEN),
}  # fmt: skip


def tokenizer(image_token: str = "") -> Any:
    """Words and all special tokens."""
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    named = NAMED | ({"image_token": image_token} if image_token else {})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens=named, pad_token="<pad>", unk_token="<unk>"
    )


@torch.no_grad()
def build(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Write a model's folder; the model and its processor as they come from there."""
    torch.manual_seed(0)
    family = MODELS[name]
    model = getattr(transformers, family.classes)(family.config()).eval()
    for weight_name, weight in model.named_parameters():
        if weight.dim() > 1:  # wide, so that what is dropped is missed
            weight.normal_(0.0, 0.1)
        elif weight_name.endswith("bias"):
            weight.normal_(0.0, 0.1)
    for weight_name, weight in model.named_parameters():
        if "visual" not in weight_name and "vision" not in weight_name:
            if weight_name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(2.0)
    model.get_input_embeddings().weight.mul_(3.0)
    model.lm_head.weight[len(WORDS) :] = 0.0  # only words are ever generated
    model.generation_config = transformers.GenerationConfig(pad_token_id=ID["<pad>"])
    model.to(dtype).save_pretrained(folder)
    if family.published:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | family.published))
    if name == "qwen3_vl_moe":  # experts lie the other way round in checkpoints
        weights = load_file(Path(folder) / "model.safetensors")
        for weight_name in [one for one in weights if ".experts." in one]:
            weights[weight_name] = weights[weight_name].transpose(1, 2).contiguous()
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    family.processor(tokenizer(family.image_token)).save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return model, processor
