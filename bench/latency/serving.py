"""A server under load: requests a second, time to the first token and KV blocks, pruned against whole, on vLLM.

    python -m bench.latency.serving [--concurrency 1 8 32] [--rounds 2] [--json bench/results/serving.json]

Needs the extra ``vllm``. The model is a random LLaVA of about 113 M parameters (12 layers, width 768, 576 vision tokens);
its tower is a stub of two narrow layers, so that the times are the language model's and the server's. Every request brings a
picture of its own (nothing is found in a cache), one region, a question of 24 words, and gets 8 tokens. The arms take turns in
one engine, round after round; before anything is timed each is checked to leave the number of tokens it says.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import header, save, table

WORDS, SIDE, PATCH, TOKENS = 1000, 336, 14, 576
QUESTION, NEW, BLOCK = 24, 8, 32
REGION = [0.30, 0.25, 0.70, 0.55]
ARMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "22 %": {"crop_region": REGION, "crop_keep": 0.22},
    "11 %": {"crop_region": REGION, "crop_keep": 0.11},
}


def write_model(folder: str) -> None:
    """Configuration, tokenizer and processor; vLLM makes the weights up."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=WORDS + 8, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0")
    size = {"height": SIDE, "width": SIDE}
    image = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    transformers.LlavaProcessor(
        image, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def request(seed: int, wishes: dict[str, Any]) -> dict[str, Any]:
    """A picture and a question that no other request has."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    words = " ".join(f"w{number}" for number in rng.integers(1, WORDS, QUESTION))
    return {"prompt": f"<image> {words}", "multi_modal_data": {"image": pixels}, "mm_processor_kwargs": wishes}


class Load:
    """Requests against one engine; remembers how much of its KV cache was in use."""

    def __init__(self, folder: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        load, self.usage, self.seeds = self, 0.0, itertools.count(1)

        class Watch(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self.config = vllm_config

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    load.usage = max(load.usage, scheduler_stats.kv_cache_usage)

            def log_engine_initialized(self) -> None:
                load.blocks = self.config.cache_config.num_gpu_blocks

        self.blocks = 0
        arguments = AsyncEngineArgs(
            model=folder, load_format="dummy", dtype="float32", enforce_eager=True, max_model_len=1024, seed=0,
            block_size=BLOCK, max_num_seqs=64, max_num_batched_tokens=2048, limit_mm_per_prompt={"image": 1},
        )  # fmt: skip
        self.engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[Watch])

    async def one(self, arm: str) -> tuple[float, float, int]:
        """Seconds to the first token and to the last, length of the prompt."""
        from vllm import SamplingParams

        number = next(self.seeds)
        how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        begin, first, length = time.perf_counter(), 0.0, 0
        async for out in self.engine.generate(request(number, ARMS[arm]), how, str(number)):
            first = first or time.perf_counter() - begin
            length = len(out.prompt_token_ids)
        return first, time.perf_counter() - begin, length

    async def many(self, arm: str, concurrency: int, count: int) -> dict[str, Any]:
        """``count`` requests, ``concurrency`` of them at any time."""
        left, found = iter(range(count)), []

        async def client() -> None:
            for _ in left:
                found.append(await self.one(arm))

        self.usage, begin = 0.0, time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        took = time.perf_counter() - begin
        return {"first": [one[0] for one in found], "rate": count / took, "blocks": self.usage * self.blocks}


async def measure(folder: str, concurrencies: list[int], rounds: int, per_client: int) -> list[dict[str, Any]]:
    """A row per concurrency and arm."""
    load = Load(folder)
    lengths = {arm: (await load.one(arm))[2] for arm in ARMS}
    wanted = {"whole": TOKENS, "22 %": round(0.22 * TOKENS), "11 %": round(0.11 * TOKENS)}
    if lengths != {arm: count + QUESTION for arm, count in wanted.items()}:
        raise RuntimeError(f"bench: prompts must hold {wanted} vision tokens and {QUESTION} words, got {lengths}")
    rows = []
    for concurrency in concurrencies:
        count = max(4, concurrency * per_client)
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for number in range(rounds):
            for arm in list(ARMS)[:: 1 if number % 2 == 0 else -1]:
                runs[arm].append(await load.many(arm, concurrency, count))
        rows += [row(concurrency, arm, runs, count) for arm in ARMS]
        print(table(rows[-len(ARMS) :]), flush=True)
    load.engine.shutdown()
    return rows


def row(concurrency: int, arm: str, runs: dict[str, list[dict[str, Any]]], count: int) -> dict[str, Any]:
    """One arm; ratios are medians over rounds, each against the whole images of the same round."""
    first = sorted(itertools.chain(*(run["first"] for run in runs[arm])))
    ratios = [run["rate"] / whole["rate"] for run, whole in zip(runs[arm], runs["whole"], strict=True)]
    return {
        "concurrency": concurrency,
        "arm": arm,
        "requests": count * len(runs[arm]),
        "requests/s": statistics.median(run["rate"] for run in runs[arm]),
        "times as many": statistics.median(ratios),
        "TTFT p50, s": first[len(first) // 2],
        "TTFT p95, s": first[min(len(first) - 1, int(0.95 * len(first)))],
        "KV blocks": round(max(run["blocks"] for run in runs[arm])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.latency.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-client", type=int, default=1, help="requests of each client in a round (default 1)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        rows = asyncio.run(measure(folder, options.concurrency, options.rounds, options.per_client))
    if options.json:
        import vllm

        rows = [{**one, "vllm": vllm.__version__} for one in rows]
        save(options.json, rows)


if __name__ == "__main__":
    main()
