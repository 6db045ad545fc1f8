"""Every way to use a model inside a block, as a table of data: how it is done, and where it is refused, by what words.

`tests/patching/test_ways.py` runs it, `tests/support/readme_table.py` writes it into crop/patching/README.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from tests.support.cases import get_model
from tests.support.tiny_families import FAMILIES, build_model
from tests.support.uses import (
    Use,
    adapted,
    asking_for,
    behind_a_text,
    compiled,
    continued,
    continuous,
    copied,
    copied_inside,
    generate,
    given_cache,
    guided,
    in_inference_mode,
    offloaded,
    on_embeddings,
    prompt_tuned,
    saved,
    saved_whole,
    step,
    streamed,
    trainable,
    trainer,
)

SIX = ("llava", "llava_next", "qwen2_5_vl", "qwen3_5", "gemma3", "idefics3")


@dataclass(frozen=True)
class Way:
    """One way of use.

    Attributes:
        title: in the table. use: (model, batch, block) -> what comes out; enters the block where one does.
        make: family -> model; default: the shared one.
        single: a batch of one sample. cache: of the block.
        again: every step is a prefill, decided anew.
        exact: equal bits where everything is kept; False: up to rounding; None: not asked, since it takes long.
        refused: what the error says. why: the same for the table.
        unable: family -> why transformers itself cannot, without a block either; "all" of them.
    """

    title: str
    use: Use
    make: Callable[[str], Any] = get_model
    single: bool = False
    cache: str = "ragged"
    again: bool = False
    exact: bool | None = True
    refused: str = ""
    why: str = ""
    unable: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, family: str) -> str:
        """What the error says for this family; empty: it is right."""
        return FAMILIES[family].refuses.get("uniform", "") if self.cache == "uniform" else self.refused


ASSISTED = "must not use assisted generation, got {}"
DRAFTS = "the tokens of a draft would take part in the scoring"
OTHER_CACHE = "cache_implementation must be None, 'dynamic' or, with cache='uniform', 'static', got '{}'"
NOT_TESTED = "needs an accelerator or a further package, so it could not be tested"
EMBEDDED = "`inputs_embeds` do not say which of them are vision tokens; give `input_ids`"
COPIES = "a copy would hold the block's hooks; leave the block first"
NO_ENTRY = "every layer has them for the tokens that it holds; ask outside of the block"
POSITIONS = "its processor for guidance forgets the third axis of positions"
# Older versions number and mask what stands behind a cached text as if nothing stood before it.
OLD = Version(transformers.__version__) < Version("5.24.0.dev0")
BEHIND = dict.fromkeys(("qwen2_5_vl", "qwen3_5", "gemma3"), "wrong positions behind a cached text") if OLD else {}

WAYS = {
    "greedy": Way("greedy, padded on the left", generate()),
    "sampling": Way("sampling", generate(do_sample=True)),
    "beams": Way("beams", generate(num_beams=3, num_return_sequences=2, output_scores=True)),
    "sampled beams": Way("beams, sampled", generate(num_beams=2, do_sample=True, top_k=0, output_scores=True)),
    "sequences": Way("several sequences", generate(do_sample=True, num_return_sequences=2)),
    "guidance": Way(
        "classifier-free guidance", guided, unable=dict(qwen2_5_vl=POSITIONS, qwen3_5=POSITIONS)
    ),
    "streamer": Way("a streamer, `generate()` in a thread of its own", streamed, single=True),
    "inference mode": Way("`torch.inference_mode`", in_inference_mode),
    "no cache": Way("`use_cache=False`", generate(use_cache=False), again=True),
    "cache": Way("a `DynamicCache` of one's own", given_cache(lambda config: DynamicCache(config=config))),
    "prefix": Way("an image prompt behind a cached text", behind_a_text, single=True, unable=BEHIND),
    "own loop": Way("`custom_generate`", generate(custom_generate=lambda model: type(model)._sample)),
    "second turn": Way("a second turn on its cache", continued(blocks=1)),
    "second block": Way("a second turn in another block", continued(blocks=2)),
    "static": Way(
        "static cache in a block with `cache=\"uniform\"`", generate(cache_implementation="static"), cache="uniform"
    ),
    "static object": Way(
        "a `StaticCache` of one's own in such a block",
        given_cache(lambda config: StaticCache(config=config, max_cache_len=260)),
        cache="uniform",
    ),
    "static, ragged": Way(
        "static cache in any other block", generate(cache_implementation="static"),
        refused="got 'static': a static cache needs layers of equal length; use patch.*cache='uniform'",
        why="layers would be of different lengths; use `patch(..., cache=\"uniform\")`",
    ),
    "quantized": Way(
        "quantized cache", generate(cache_implementation="quantized"), refused=OTHER_CACHE.format("quantized"),
        why=NOT_TESTED,
    ),
    "offloaded": Way(
        "offloaded cache", generate(cache_implementation="offloaded"), refused=OTHER_CACHE.format("offloaded"),
        why=NOT_TESTED,
    ),
    "assistant": Way(
        "a draft model", generate(assistant_model=copy.deepcopy), single=True,
        refused=ASSISTED.format("assistant_model"), why=DRAFTS,
    ),
    "prompt lookup": Way(
        "prompt lookup", generate(prompt_lookup_num_tokens=2), single=True,
        refused=ASSISTED.format("prompt_lookup_num_tokens=2"), why=DRAFTS,
    ),
    "early exit": Way(
        "early exit", generate(assistant_early_exit=2), single=True,
        refused=ASSISTED.format("assistant_early_exit=2"), why=DRAFTS,
    ),
    "drafts of its own": Way(
        "multi-token prediction", generate(use_mtp=True), single=True, refused=ASSISTED.format("use_mtp=True"), why=DRAFTS,
    ),
    "chunks": Way(
        "chunked prefill", generate(prefill_chunk_size=10),
        refused="must prefill in one piece, got prefill_chunk_size=10", why="the question would not be seen yet",
    ),
    "continuous": Way(
        "`generate_batch`", continuous, refused="run continuous batching; use generate",
        why="its paged caches hold all tokens; use `generate()`",
    ),
    "embeddings": Way(
        "`inputs_embeds`", on_embeddings,
        refused="input_ids must be given, got inputs_embeds alone|doesn't have its forwarding implemented", why=EMBEDDED,
    ),
    "attentions": Way(
        "`output_attentions`", asking_for("output_attentions"), refused="output_attentions must be off", why=NO_ENTRY
    ),
    "router logits": Way(
        "`output_router_logits`", asking_for("output_router_logits"), refused="output_router_logits must be off",
        why=NO_ENTRY,
    ),
    "disk": Way(
        "a device map, weights on the disk", offloaded, build_model,
        unable=dict(llava_next="it reads a weight that is not there yet", idefics3="it reads a value that is not there yet"),
    ),
    "compiled": Way("compiled layers", compiled, build_model, exact=None),
    "copy": Way("a deep copy made before", copied),
    "copy inside": Way(
        "a deep copy made inside", copied_inside, refused="to be copied or saved; leave the block first", why=COPIES
    ),
    "saved": Way("`save_pretrained` inside", saved, build_model),
    "saved whole": Way(
        "`torch.save(model)` inside", saved_whole, refused="to be copied or saved; leave the block first", why=COPIES
    ),
    "LoRA": Way("PEFT: LoRA", generate(), adapted),
    "prompt tuning": Way(
        "PEFT: prompt tuning", step(), prompt_tuned, refused="input_ids must be given, got inputs_embeds alone",
        why=EMBEDDED,
    ),
    "training": Way("`loss.backward()`", step(), trainable),
    "checkpointing": Way("gradient checkpointing", step(checkpointing=True), trainable, exact=False),
    "Trainer": Way("`Trainer`: `train`, `evaluate`, checkpoints", trainer, trainable, exact=False),
}  # fmt: skip
