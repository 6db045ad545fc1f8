"""An open-vocabulary object detector, asked for the nouns of the question, as a localizer."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crop.geometry.region import Region
from crop.localizers.pretrained import load_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

# Words that name no thing one could point at: function words, question words, verbs and attributes questions are about.
NO_THINGS = frozenset(
    """
    a about above across after all am an and any are around as at attached away be been before behind being below beneath
    beside besides between both but by can carry carried carrying color colored colors colour colours come could cost
    costs count did direction do does doing done down drive driving each eat eating either facing few find for from front
    full get give given go going got had has have having he her here hers him his hold holding how if in inside into is
    it its itself just kind kinds large larger least left less like located location look looking looks made many
    material may me middle mine more most much my name named near next no not number of off old on one ones only onto
    open or other our out outside over part parts picture image photo photograph scene place placed play playing please
    position read reading right said same say saying says see seen shape shaped she should show showing shown shows side
    sit sitting size small smaller so some someone something stand standing tell than that the their them then there
    these they thing things this those through time to top toward towards type types under up upon us use used using
    very visible walking want was way we wear wearing were what whats when where which while who whom whose why will with
    within without would wrote write written year you your bottom center background foreground
    """.split()
)
MAX_WORDS = 4


def noun_phrases(question: str) -> list[str]:
    """What the question names: runs of words that are neither function words nor attributes asked for.

    Phrases in lower case, in order, each once and at most ``MAX_WORDS`` words (the last ones). Questions that are not
    English come out as one phrase.

    Source: own choice; a stop list instead of a tagger, so that nothing need be downloaded.
    """
    phrases: list[str] = []
    for clause in re.split(r"[^\w\s'-]+", question.lower()):
        run: list[str] = []
        for word in [*re.findall(r"[\w-]+", re.sub(r"'s?\b", " ' ", clause).replace("'", " the ")), "the"]:
            if word not in NO_THINGS:
                run.append(word)
            elif run:
                phrases.append(" ".join(run[-MAX_WORDS:]))
                run = []
    return list(dict.fromkeys(phrase for phrase in phrases if any(c.isalpha() for c in phrase)))


@dataclass(frozen=True)
class DetectorLocalizer:
    """Objects that the question names, found by an open-vocabulary detector ("detector").

    Args:
        model: zero-shot object detector of transformers, e.g. ``Owlv2ForObjectDetection`` or
            ``GroundingDinoForObjectDetection``, in evaluation mode.
        processor: its processor.
        threshold: score from which a detection counts, in (0, 1).
        max_boxes: boxes kept for each phrase, the surest first.
        margin: every box grows by this fraction of the image's sides.
        min_confidence: below it the whole image is returned; in [0, 1). The confidence is the lowest over the phrases of
            the best score for each; scores of detectors are low, so every detection counts by default.
    Raises:
        TypeError: a processor without transformers' interface for grounded detection. ValueError: a setting out of its
            range.
    Source: own choice.
    """

    model: nn.Module
    processor: Any
    threshold: float = 0.2
    max_boxes: int = 3
    margin: float = 0.02
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        op = "DetectorLocalizer"
        if not hasattr(self.processor, "post_process_grounded_object_detection"):
            raise TypeError(
                f"{op}: processor must have post_process_grounded_object_detection, got {type(self.processor).__name__}"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"{op}: threshold must be in (0, 1), got {self.threshold}")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"{op}: min_confidence must be in [0, 1), got {self.min_confidence}")
        if self.max_boxes < 1:
            raise ValueError(f"{op}: max_boxes must be >= 1, got {self.max_boxes}")
        if not self.margin >= 0:
            raise ValueError(f"{op}: margin must be >= 0, got {self.margin}")

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> DetectorLocalizer:
        """With model and processor from a folder or a name on the hub; see ``load_pretrained`` for what is raised."""
        kind = "AutoModelForZeroShotObjectDetection"
        return DetectorLocalizer(*load_pretrained("DetectorLocalizer.load", path, kind, device))

    @torch.no_grad()
    def __call__(self, image: Image, question: str) -> Region:
        phrases = noun_phrases(question)
        if not phrases:
            return Region.whole(0.0, "the question names nothing to look for")
        boxes, best = [], []
        for phrase in phrases:  # one pass each: detectors that read one joint text mix phrases up
            found = self.detect(image, phrase)
            boxes += [box for _, box in found]
            best += [score for score, _ in found[:1]]
        if not boxes:
            return Region.whole(0.0, f"no detection of {', '.join(phrases)}")
        confidence = min(best)
        if confidence < self.min_confidence:
            return Region.whole(confidence, f"the detector is unsure: {confidence:.2f} < {self.min_confidence}")
        return Region.from_pixels(boxes, image.size, confidence).dilate(self.margin)

    def detect(self, image: Image, phrase: str) -> list[tuple[float, tuple[float, ...]]]:
        """(score, pixel box x0, y0, x1, y1) of the surest detections of one phrase that lie on the image."""
        inputs = self.processor(images=image, text=[[phrase]], return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        post_process = self.processor.post_process_grounded_object_detection
        known = inspect.signature(post_process).parameters
        settings = {"threshold": self.threshold, "target_sizes": [image.size[::-1]]}
        if "input_ids" in known:  # detectors that ground a text in its tokens
            settings |= {"input_ids": inputs["input_ids"], "text_threshold": self.threshold}
        result = post_process(outputs, **settings)[0]
        width, height = image.size
        found = []
        for score, box in zip(result["scores"].tolist(), result["boxes"].tolist(), strict=True):
            x0, y0, x1, y1 = box
            if max(x0, 0) < min(x1, width) and max(y0, 0) < min(y1, height):
                found.append((min(max(score, 0.0), 1.0), (x0, y0, x1, y1)))
        return sorted(found, reverse=True)[: self.max_boxes]
