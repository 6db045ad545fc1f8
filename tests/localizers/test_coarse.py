"""A small copy is looked at first; overview and region as two pictures."""

from __future__ import annotations

import pytest
from PIL import Image

import crop
from crop import embedded
from crop.localizers.coarse import small_copy
from crop.localizers.head import HeadLocalizer

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "size,times,wanted",
    [
        ((1600, 800), 4, (400, 200)),
        ((1600, 300), 4, (597, 112)),
        ((100, 90), 4, (100, 90)),
        ((640, 480), 1, (640, 480)),
    ],
)
def test_sides_of_the_copy(size, times, wanted):
    assert small_copy(Image.new("RGB", size), times, 112).size == wanted


def test_the_region_found_in_the_copy_is_one_of_the_picture():
    seen = []

    def look(image, question):
        seen.append((image.size, question))
        return crop.Region.box(0.25, 0.5, 0.75, 1.0, 0.7)

    image = Image.new("RGB", (1000, 2000))
    assert crop.CoarseLocalizer(look)(image, "where") == crop.Region.box(0.25, 0.5, 0.75, 1.0, 0.7)
    assert seen == [((250, 500), "where")]
    with pytest.raises(ValueError, match="CoarseLocalizer: times must be >= 1, got 0"):
        crop.CoarseLocalizer(look, times=0)


def test_by_name():
    model, processor = embedded.load()
    given = dict(model=model, processor=processor, prompt=embedded.prompt)
    found = crop.get_localizer("head", **given, path=embedded.HEAD, coarse=2, min_confidence=0.3)
    assert isinstance(found, crop.CoarseLocalizer) and found.times == 2
    assert isinstance(found.localizer, HeadLocalizer) and found.localizer.min_confidence == 0.3
    scene = embedded.scene(2)
    question = next(question for question in scene.questions if question.local)
    assert found(scene.image, question.text) == found.localizer(small_copy(scene.image, 2, 112), question.text)
    assert crop.get_localizer("attention", **given, coarse=4).localizer.overview
    assert isinstance(crop.get_localizer("attention", **given), crop.AttentionLocalizer)
    with pytest.raises(ValueError, match="coarse must be left out for 'whole', got 4"):
        crop.get_localizer("whole", coarse=4)


def test_zoom_shows_all_of_the_region():
    image = Image.new("RGB", (801, 603), "white")
    image.paste("red", (200, 300, 410, 371))
    region = crop.Region.from_pixels((200, 300, 410, 371), image.size)
    overview, cut = crop.zoom(image, region, margin=0.0)
    assert overview.size == (200, 151)
    assert cut.size == (210, 71) and cut.getcolors() == [(210 * 71, (255, 0, 0))]
    two = region.union(crop.Region.box(0.9, 0.9, 1.0, 1.0))
    assert crop.zoom(image, two, margin=0.0)[1].size == (601, 303)
    assert crop.zoom(image, crop.Region.whole()) == [image]
    with pytest.raises(ValueError, match="zoom: times must be >= 1, got 0"):
        crop.zoom(image, region, times=0)


def test_two_pictures_are_encoded_as_two():
    model, processor = embedded.load()
    scene = embedded.scene(2)
    pictures = crop.zoom(scene.image, crop.Region.box(0.2, 0.6, 0.9, 0.8))
    inputs = crop.encode(processor, pictures, "what", lambda question: f"<image> <image> {question} ?")
    assert len(inputs["pixel_values"]) == 2 and int((inputs["input_ids"] == model.config.image_token_id).sum()) == 1152
    assert model(**inputs).logits.isfinite().all()
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    )
    assert len(crop.encode(processor, pictures, "what ?")["pixel_values"]) == 2
