"""Model types of transformers that read images and are not supported, with what is in the way."""

from __future__ import annotations

_REASONS = {
    "its image tokens are answers to learned queries, which lie nowhere in the picture": (
        "aria", "blip-2", "deepseek_ocr2", "idefics2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5",
    ),
    "images are no tokens of its decoder, which looks at them by cross-attention": (
        "blip", "florence2", "idefics", "mllama", "pix2struct", "pp_formulanet", "t5gemma2", "udop",
        "vision-encoder-decoder",
    ),
    "its pictures become words of its vocabulary, so that no tower or projector makes features of tokens": (
        "apertus1p5", "chameleon", "emu3",
    ),
    "an index picks what its layers attend to, so that attention does not tell what a token is worth": (
        "dots3_note", "glm5_next", "hy_v4_vl", "minimax_m3_vl", "mistral_large4", "qwen4_exp",
    ),
    "short convolutions stand inside its attention layers, which a cut would tear apart": (
        "inkling2", "inkling2_loop", "inkling_mm_model",
    ),
    "every layer is told of every token whether it is text or image, to choose its experts": ("ernie4_5_vl_moe",),
    "its hidden states run in several streams (AltUp)": ("gemma3n",),
    "image features stand before its text, where the prompt has no token for them": ("git",),
    "layers without angles scale a query by its number among the tokens that are left, which a cut would change": ("llama4",),
    "its images are no part of the embeddings, but added in many of its layers, each another part": ("granite4_vision",),
    "its cache keeps the prompt apart from what is written (reference sliding window)": ("unlimited_ocr",),
    "its layers are mixers of one kind each, of which most carry a state, and none has both attention and experts": (
        "nemotron_h_omni",
    ),
    "all images of a prompt see each other, and their features are added to those of placeholders": ("molmo2",),
    "it writes blocks of tokens by diffusion": ("diffusion_gemma",),
    "images and frames have a tower each": ("video_llava",),
    "it reads proteins": ("evolla",),
    "it writes the movements of a robot": ("pi0",),
    "it judges an image and writes no text": ("shieldgemma2",),
    "transformers' class of it has no vision tower": ("mistral4",),
    "it wraps the model that reads images; give its `thinker`": ("qwen2_5_omni", "qwen3_omni_moe"),
    "no layout of its images has been written": ("fuyu", "muse_glimmer", "muse_spark", "phi4_multimodal", "step3p7"),
}  # fmt: skip
REFUSED: dict[str, str] = {model_type: reason for reason, found in _REASONS.items() for model_type in found}
