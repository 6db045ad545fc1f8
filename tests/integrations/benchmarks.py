"""Real tasks of lmms-eval over generated data: each task's own file, its data set replaced by a small local one.

The columns are those that the task's functions read, and the other ones of its data set that decide what they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crop.embedded.scenes import Question, Scene

Asked = tuple[Scene, Question]


def yes_no(asked: Asked, number: int) -> dict[str, Any]:
    """POPE, MME: one statement that holds, one that does not, by turns."""
    _, question = asked
    holds = number % 2 == 0
    thing = question.answer if holds else "zebra"
    return {"question": f"Is it {thing}?", "answer": "yes" if holds else "no", "question_id": str(number // 2)}


def choices(asked: Asked, number: int) -> list[str]:
    """Four options; the right one stands at ``number`` modulo 4."""
    options = ["zebra", "piano", "river", "cloud"]
    options[number % 4] = asked[1].answer
    return options


def mmbench(asked: Asked, number: int) -> dict[str, Any]:
    options = dict(zip("ABCD", choices(asked, number), strict=True))
    return {"index": number, "question": asked[1].text, "hint": "nan", "answer": "ABCD"[number % 4], **options,
            "category": "ocr", "source": "crop", "L2-category": "finegrained_perception", "comment": "nan",
            "split": "dev"}  # fmt: skip


def box(asked: Asked) -> list[float]:
    """x, y, width, height of what the question is about, in pixels."""
    x0, y0, x1, y1 = asked[1].region.boxes[0]
    width, height = asked[0].image.size
    return [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]


def ten(asked: Asked) -> list[str]:
    """The answers of ten people."""
    return [asked[1].answer] * 10


# task -> (its file, its split, a row but for the image)
TASKS: dict[str, tuple[str, str, Callable[[Asked, int], dict[str, Any]]]] = {
    "gqa": ("gqa/gqa.yaml", "testdev", lambda asked, number: {
        "id": str(number), "imageId": f"n{number}", "question": asked[1].text, "answer": asked[1].answer,
        "fullAnswer": f"It is {asked[1].answer}."}),
    "mmbench_en_dev_static": ("mmbench/mmbench_en_dev_static.yaml", "dev", mmbench),
    "mme": ("mme/mme.yaml", "test", lambda asked, number: {**yes_no(asked, number), "category": "existence"}),
    "pope": ("pope/pope.yaml", "test", lambda asked, number: {
        **yes_no(asked, number), "id": str(number), "image_source": f"n{number}", "category": "random"}),
    "scienceqa_img": ("scienceqa/scienceqa_img.yaml", "test", lambda asked, number: {
        "question": asked[1].text, "choices": choices(asked, number), "answer": number % 4, "hint": "", "lecture": ""}),
    "textvqa_val": ("textvqa/textvqa_val.yaml", "validation", lambda asked, number: {
        "image_id": f"n{number}", "question_id": number, "question": asked[1].text, "ocr_tokens": [asked[1].answer],
        "answers": ten(asked)}),
    "vqav2_val": ("vqav2/vqav2_val.yaml", "validation", lambda asked, number: {
        "question_type": "what is", "multiple_choice_answer": asked[1].answer, "answer_type": "other", "image_id": number,
        "question_id": number, "question": asked[1].text, "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(ten(asked))]}),
    "docvqa_val": ("docvqa/docvqa_val.yaml", "validation", lambda asked, number: {
        "questionId": str(number), "question": asked[1].text, "question_types": ["form"], "docId": number,
        "answers": [asked[1].answer]}),
    "ocrbench": ("ocrbench/ocrbench.yaml", "test", lambda asked, number: {
        "dataset": "crop", "question": asked[1].text, "question_type": "Doc-oriented VQA", "answer": [asked[1].answer]}),
    "refcoco_bbox_rec_val": ("refcoco/refcoco_bbox_rec_val.yaml", "val", lambda asked, number: {
        "question_id": str(number), "question": "describe", "answer": [asked[1].answer], "bbox": box(asked),
        "file_name": f"{number}.jpg"}),
    "refcoco_grounding_testA": ("refcoco_grounding/refcoco_grounding_testA.yaml", "testA", lambda asked, number: {
        "question_id": str(number), "question": "describe", "answer": [asked[1].answer], "bbox": box(asked),
        "file_name": f"{number}.jpg"}),
}  # fmt: skip


PLAIN = {
    "default": {"pre_prompt": "", "post_prompt": "", "format": "default"}
}  # the embedded model knows the bare question


def write(names: Sequence[str], asked: Sequence[Asked], folder: Path) -> None:
    """Task files and data sets; the tasks are called ``local_NAME`` and ask without the words around the question."""
    import datasets
    import lmms_eval.tasks
    import yaml

    own = Path(lmms_eval.tasks.__file__).parent
    for name in names:
        file, split, row = TASKS[name]
        rows = [{**row(entry, number), "image": entry[0].image} for number, entry in enumerate(asked)]
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(folder / f"{name}.parquet")
        config = {
            "include": str(own / file),
            "task": f"local_{name}",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{name}.parquet")}},
            "process_docs": None if name == "gqa" else ...,  # joins two data sets, of which this one is the whole
            "lmms_eval_specific_kwargs": ... if name.startswith("refcoco") else PLAIN,  # whose functions take none
        }
        text = yaml.safe_dump({key: value for key, value in config.items() if value is not ...})
        (folder / f"local_{name}.yaml").write_text(text)


OWN = {
    # Scores the words themselves; older form only.
    "choices": """
task: local_choices
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function own.to_visual
doc_to_text: !function own.to_text
doc_to_choice: !function own.to_choice
doc_to_target: target
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""",
    # Asks twice about every picture; the second round knows the first answer.
    "rounds": """
task: local_rounds
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until_multi_round
doc_to_visual: !function own.to_visual
doc_to_text: !function own.to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 13, until: ["\\n"]}}
process_results: !function own.process_results
metric_list:
  - {{metric: both_right, aggregation: mean, higher_is_better: true}}
""",
}
OWN_FUNCTIONS = """
def to_visual(doc):
    return [doc["image"]]

def to_text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    assert len(previous_output) == round_idx
    return [doc["image"]], doc["question"], round_idx == 2, previous_output, None

def to_choice(doc):
    return list(doc["choices"])

def process_results(doc, results):
    rounds = results[0]
    return {"both_right": float(rounds == [doc["answer"]] * 2)}
"""


def write_own(asked: Sequence[Asked], folder: Path) -> None:
    """Tasks of the two kinds that none of ``TASKS`` is of: ``local_choices`` and ``local_rounds``."""
    import datasets

    rows = [{"image": entry[0].image, "question": entry[1].text, "answer": entry[1].answer,
             "choices": choices(entry, number), "target": number % 4} for number, entry in enumerate(asked)]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(folder / "own.parquet")
    (folder / "own.py").write_text(OWN_FUNCTIONS)
    for name, text in OWN.items():
        (folder / f"local_{name}.yaml").write_text(text.format(data=folder / "own.parquet"))


def results_of(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What lmms-eval wrote below a folder: results, and the samples of each task."""
    (file,) = folder.glob("embedded/*_results.json")
    samples = {}
    for path in folder.glob("embedded/*_samples_*.jsonl"):
        name = path.stem.partition("_samples_")[2]
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(file.read_text()), samples
