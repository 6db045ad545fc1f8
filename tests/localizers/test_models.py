"""Localizers with a second model: answers known because the embeddings, detections or words are set by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature

from crop import embedded
from crop.geometry.region import Region
from crop.localizers import ClipLocalizer, DetectorLocalizer, VLMLocalizer, get_localizer
from crop.localizers.detector import noun_phrases
from crop.localizers.vlm import block_prompt, parse_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, PATCH, DIM = 64, 8, 16
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


# ----------------------------------------------------------------------------------------------------------------- clip
class Words:
    """A tokenizer whose only token is the number of the first text's colour."""

    colors = ("red", "green", "blue")

    def __call__(self, texts, **_):
        ids = [next((i for i, color in enumerate(self.colors) if color in text), 3) for text in texts]
        return BatchFeature({"input_ids": torch.tensor(ids)[:, None]})


def colour_model(kind: str) -> tuple[nn.Module, SimpleNamespace]:
    """A CLIP or SigLIP whose patch embedding is the patch's mean colour and whose text embedding is the named one."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = dict(hidden_size=DIM, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIDE,
                  patch_size=PATCH)  # fmt: skip
    text = dict(hidden_size=DIM, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=200)
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=DIM)).eval()
        last, eye = model.vision_model.encoder.layers[-1], torch.eye(DIM)
        for linear in (last.self_attn.v_proj, last.self_attn.out_proj, model.visual_projection):
            linear.weight.data = eye.clone()
    else:
        model, eye = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval(), torch.eye(DIM)
        head = model.vision_model.head
        head.attention.in_proj_weight.data = eye.repeat(3, 1)
        head.attention.out_proj.weight.data = eye.clone()
        head.mlp.fc2.weight.data.zero_()
        layer = model.vision_model.encoder.layers[0]
        layer.self_attn.out_proj.weight.data.zero_()
        layer.mlp.fc2.weight.data.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "norm" not in name:
            parameter.data.zero_()
    embeddings = model.vision_model.embeddings
    embeddings.position_embedding.weight.data.zero_()
    kernel = torch.zeros_like(embeddings.patch_embedding.weight)
    for channel in range(3):
        kernel[channel, channel] = 1 / PATCH**2
    embeddings.patch_embedding.weight.data = kernel
    directions = torch.cat([torch.eye(3, DIM), torch.ones(1, DIM)])
    model.get_text_features = lambda input_ids, **_: directions[input_ids[:, 0]]
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=square, do_center_crop=False, **HALF)
    return model, SimpleNamespace(image_processor=processor, tokenizer=Words())


def painted(**boxes: tuple[int, int, int, int]) -> Image.Image:
    """Black, with boxes of colour given in patches."""
    image = Image.new("RGB", (SIDE, SIDE), "black")
    for color, box in boxes.items():
        image.paste(color, tuple(PATCH * side for side in box))
    return image


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_finds_the_patches_that_look_like_the_question(kind):
    image = painted(red=(1, 1, 3, 3), blue=(5, 4, 7, 6))
    find = ClipLocalizer(*colour_model(kind))
    for question, box in (("what is on the red sign", (1, 1, 3, 3)), ("where is blue", (5, 4, 7, 6))):
        region = find(image, question)
        assert region.boxes == (pytest.approx(tuple(side / 8 for side in box), abs=1e-6),)
        assert region.confidence > 0.9


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_that_sees_nothing_like_it_returns_the_whole_image(kind):
    find = ClipLocalizer(*colour_model(kind))
    for image, question in ((painted(), "red"), (painted(red=(0, 0, 2, 2)), "  ")):
        region = find(image, question)
        assert region.is_whole and region.confidence == 0 and region.reason


def test_clip_puts_a_cropped_picture_where_it_is():
    """A processor that crops the centre of a wide picture: the grid covers the middle half."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, processor = colour_model("clip")
    square = {"height": SIDE, "width": SIDE}
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, **HALF)
    wide = Image.new("RGB", (2 * SIDE, SIDE), "black")
    wide.paste(painted(red=(2, 2, 4, 4)), (SIDE // 2, 0))
    region = ClipLocalizer(model, processor)(wide, "red")
    assert region.boxes == (pytest.approx((0.25 + 1 / 8, 2 / 8, 0.25 + 2 / 8, 4 / 8), abs=1e-6),)


def test_clip_refuses_other_models():
    with pytest.raises(TypeError, match="must be a CLIP or SigLIP model, got Linear"):
        ClipLocalizer(nn.Linear(1, 1), None)


def test_clip_loads_from_a_folder(tmp_path):
    """Saved and loaded with a real tokenizer: the random model answers with some region and the times add up."""
    from transformers import CLIPProcessor

    model, processor = colour_model("clip")
    del model.get_text_features
    model.save_pretrained(tmp_path)
    CLIPProcessor(processor.image_processor, embedded.load()[1].tokenizer).save_pretrained(tmp_path)
    find = get_localizer("clip", path=tmp_path, min_confidence=0.01)
    assert find.min_confidence == 0.01 and isinstance(find(painted(red=(1, 1, 3, 3)), "what color"), Region)
    with pytest.raises(FileNotFoundError, match="path must be an existing folder"):
        get_localizer("clip", path=tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------------- detector
@pytest.mark.parametrize("question, phrases", [
    ("What color is the red car left of the tree?", ["red car", "tree"]),
    ("how many people are there", ["people"]),
    ("Is the man's hat on the table, or under it?", ["man", "hat", "table"]),
    ("What is this?", []), ("", []), ("12 ?", []),
    ("¿Dónde está el gato?", ["dónde está el gato"]),
    ("what does the old big wooden shop sign say", ["big wooden shop sign"]),
])  # fmt: skip
def test_noun_phrases(question, phrases):
    assert noun_phrases(question) == phrases


class Detections:
    """Processor and model in one: (phrase -> scores and pixel boxes) set by hand; grounded like Grounding DINO or not."""

    device = "cpu"

    def __init__(self, found, grounded):
        self.found = found
        if grounded:
            self.post_process_grounded_object_detection = self._grounded
        else:
            self.post_process_grounded_object_detection = self._plain

    def __call__(self, images=None, text=None, return_tensors=None, **inputs):
        if images is None:
            return inputs["phrase"]
        return BatchFeature({"phrase": text[0][0], "input_ids": torch.zeros(1, 1)})

    def _plain(self, outputs, threshold, target_sizes):
        assert target_sizes == [(60, 100)]  # height, width
        kept = [(score, box) for score, box in self.found.get(outputs, []) if score >= threshold]
        return [{"scores": torch.tensor([s for s, _ in kept]),
                 "boxes": torch.tensor([b for _, b in kept], dtype=torch.float32).reshape(-1, 4)}]  # fmt: skip

    def _grounded(self, outputs, input_ids, threshold, text_threshold, target_sizes):
        assert input_ids.shape == (1, 1) and text_threshold == threshold
        return self._plain(outputs, threshold, target_sizes)


@pytest.mark.parametrize("grounded", [True, False])
def test_detector_joins_what_it_finds_of_each_phrase(grounded):
    found = {
        "cup": [(0.5, (10, 6, 30, 24)), (0.9, (50, 30, 60, 36)), (0.1, (0, 0, 100, 60))],
        "table": [(0.4, (-5, 30, 120, 70)), (0.95, (200, 0, 240, 10))],  # the second lies beside the image
    }
    detections = Detections(found, grounded)
    find = DetectorLocalizer(detections, detections, margin=0.0)
    image = Image.new("RGB", (100, 60))
    region = find(image, "what is in the cup on the table")
    assert region.boxes == ((0.5, 0.5, 0.6, 0.6), (0.1, 0.1, 0.3, 0.4), (0.0, 0.5, 1.0, 1.0))
    assert region.confidence == pytest.approx(0.4)  # of the phrase found least surely
    one = DetectorLocalizer(detections, detections, margin=0.1, max_boxes=1)(image, "where is the cup")
    assert one.boxes == (pytest.approx((0.4, 0.4, 0.7, 0.7)),)
    for question, reason in (("what is it", "names nothing"), ("where is the dog", "no detection of dog")):
        region = find(image, question)
        assert region.is_whole and region.confidence == 0 and reason in region.reason
    unsure = DetectorLocalizer(detections, detections, min_confidence=0.45)(image, "the cup on the table")
    assert unsure.is_whole and unsure.confidence == pytest.approx(0.4)


def test_detector_runs_on_a_real_one():
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  patch_size=16)  # fmt: skip
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=200)
    torch.manual_seed(0)
    config = Owlv2Config(vision_config=vision, text_config=text, projection_dim=16)
    model = Owlv2ForObjectDetection(config).eval()
    pixels = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    tokenizer = embedded.load()[1].tokenizer
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    tokenizer.padding_side = "right"
    find = DetectorLocalizer(model, Owlv2Processor(pixels, tokenizer), threshold=1e-6)
    image = Image.new("RGB", (40, 24), "red")
    found = find.detect(image, "red circle")
    assert found == sorted(found, reverse=True) and 0 < len(found) <= 3
    assert isinstance(find(image, "where is the red circle"), Region)


def test_detector_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="must have post_process_grounded_object_detection, got object"):
        DetectorLocalizer(nn.Linear(1, 1), object())
    detections = Detections({}, False)
    for setting, message in (({"threshold": 0}, "threshold must be in"), ({"max_boxes": 0}, "max_boxes must be >= 1")):
        with pytest.raises(ValueError, match=message):
            DetectorLocalizer(detections, detections, **setting)


# ------------------------------------------------------------------------------------------------------------------ vlm
@pytest.mark.parametrize("text, blocks", [
    ("[1, 2, 3, 4]", (1, 2, 3, 4)), ("1 2 3 4", (1, 2, 3, 4)), ("(0,0,7,7)", (0, 0, 7, 7)),
    ("The region is [2, 1, 2, 1].", (2, 1, 2, 1)), ("In an 8 x 8 grid: [0, 1, 2, 3]", (0, 1, 2, 3)),
    ("[5, 6, 3, 4]", (3, 4, 5, 6)), ("[5, 1, 3, 4]", (3, 1, 5, 4)),  # reversed
    ("[0, 0, 8, 8]", (0, 0, 7, 7)), ("[1.0, 2.0, 3.0, 4.0]", (1, 2, 3, 4)),
    ("[0, 0, 1, 1] no, [2, 2, 3, 3]", (2, 2, 3, 3)),  # the last word counts
    ("2435", (2, 4, 3, 5)), (" 5432 ", (3, 2, 5, 4)),
])  # fmt: skip
def test_parse_blocks(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", [
    "", "the top left", "[1, 2, 3]", "1 2 3 4 5", "[1, 2, 3, 412]", "[-1, 2, 3, 4]", "[0.1, 0.2, 0.3, 0.4]", "[1, 2, 3, 9]", "2439", "24356",
    "[a, b, c, d]", "[[]]",
])  # fmt: skip
def test_parse_blocks_refuses(text):
    with pytest.raises(ValueError, match="parse_blocks: "):
        parse_blocks(text)


class Speaker:
    """A model and its processor that say what they are told to, each token with a given probability."""

    device, dtype, chat_template = "cpu", torch.float32, "template"

    def __init__(self, text, probability):
        self.text, self.probability = text, probability
        self.asked = []

    def apply_chat_template(self, conversation, add_generation_prompt):
        self.asked.append(conversation[0]["content"][1]["text"])
        return "text"

    def __call__(self, images, text, return_tensors):
        self.asked.append(text)
        return BatchFeature({"input_ids": torch.zeros(1, 3, dtype=torch.int64)})

    def generate(self, input_ids, **_):
        count = len(self.text.split())
        rest = (1 - self.probability) / 9
        logits = torch.full((1, 10), rest).log()
        logits[0, 4] = np.log(self.probability)
        sequences = torch.cat([input_ids, torch.full((1, count), 4)], 1)
        return SimpleNamespace(sequences=sequences, logits=(logits,) * count)

    def decode(self, ids, skip_special_tokens):
        return self.text


def test_vlm_names_blocks():
    speaker = Speaker("[1, 2, 3, 4]", 0.8)
    image = Image.new("RGB", (10, 10))
    region = VLMLocalizer(speaker, speaker)(image, "what is it")
    assert region == Region.from_blocks(1, 2, 3, 4, confidence=region.confidence)
    assert region.confidence == pytest.approx(0.8)
    assert speaker.asked == [block_prompt("what is it"), "text"] and "what is it" in speaker.asked[0]
    VLMLocalizer(speaker, speaker, prompt=lambda question: f"<image> {question}")(image, "hm")
    assert speaker.asked[2:] == ["<image> hm"]


@pytest.mark.parametrize("said, probability, reason", [
    ("", 0.9, "named no region"), ("somewhere", 0.9, "named no region: parse_blocks: text must hold four numbers"),
    ("[1, 2, 3, 99]", 0.9, "in [0, 8)"), ("[1, 2, 3, 4]", 0.2, "unsure: 0.20 < 0.3"),
])  # fmt: skip
def test_vlm_that_fails_means_the_whole_image(said, probability, reason):
    speaker = Speaker(said, probability)
    region = VLMLocalizer(speaker, speaker)(Image.new("RGB", (10, 10)), "what")
    assert region.is_whole and reason in region.reason
    assert region.confidence == pytest.approx(0.2 if probability == 0.2 else 0.0)
