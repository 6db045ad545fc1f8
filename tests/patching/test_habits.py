"""What people do with a model inside a block beside asking it: works as outside, or is refused in one sentence."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from crop.methods import Compose, InnerLLMPruning, PreLLMCompression
from crop.patching.current import CALL, GENERATION
from crop.patching.patch import patch
from tests.support.batches import standard_batch
from tests.support.cases import METHODS, as_argument, get_model, greedy, patched, regions_of
from tests.support.families.entry import text_tokens
from tests.support.tiny_families import THOROUGH, build_model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.fast]
families = pytest.mark.parametrize("family", THOROUGH)
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
}


@pytest.mark.parametrize("method", [None, METHODS["compose"]], ids=["none", "compose"])
@pytest.mark.parametrize("way", COPIES)
@families
def test_copies_of_the_model_are_refused_inside(family, way, method):
    model = build_model(family)
    with patch(model, method):
        with pytest.raises(
            RuntimeError, match="must not be inside a patch block to be copied or saved; leave the block"
        ):
            COPIES[way](model)
        assert model.state_dict()  # weights alone may be saved
    assert COPIES["deepcopy"](model) is not model and not {"__deepcopy__", "__reduce_ex__"} & vars(model).keys()


@pytest.mark.parametrize("name", ["plc", "compose"])
def test_a_pruned_cache_is_copied_saved_and_refused_outside(name, family="llava"):
    """A copy and a file go on as the cache itself; outside of a block nobody would follow what was pruned."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    rows = len(batch.inputs["input_ids"])
    step = {
        "input_ids": torch.tensor([text_tokens(1, 3)] * rows),
        "attention_mask": torch.cat([batch.inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.int64)], 1),
    }
    with patched(model, METHODS[name], batch, regions_of(batch)):
        cache, file = model(**batch.inputs, use_cache=True).past_key_values, io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        caches = copy.deepcopy(cache), torch.load(file, weights_only=False), copy.deepcopy(cache), cache
        logits = [model(**step, **as_argument(model, one)).logits for one in (caches[0], caches[1], caches[3])]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])
    with pytest.raises(RuntimeError, match="must be used inside a patch block .method=None prunes nothing more."):
        model(**step, **as_argument(model, caches[2]))


@families
def test_an_interrupt_leaves_nothing_behind(family):
    """Ctrl-C in the middle of a call: neither the block nor what follows it sees that call."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patch(model, METHODS["compose"]) as stats:
        wanted = model(**batch.inputs).logits
        handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(**batch.inputs)
        finally:
            handle.remove()
        assert torch.equal(model(**batch.inputs).logits, wanted) and len(stats.prefills) == 2
        raise KeyboardInterrupt
    assert CALL.get() is None and GENERATION.get() is None


@families
def test_a_uniform_cache_and_training(family):
    """Gradient checkpointing fills no cache."""
    model, batch = build_model(family).train().requires_grad_(True), standard_batch(family, "left", 1)
    model.gradient_checkpointing_enable()
    with patch(model, METHODS["compose"], cache="uniform"):
        try:
            loss = model(**batch.inputs).logits.float().square().mean()
        except ValueError as error:
            assert "gradient checkpointing must be off" in str(error)  # transformers 5.17
            return
    loss.backward()
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@families
def test_scores_without_positions_and_a_static_cache(family):
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    method = InnerLLMPruning(0.3, layer=2, rope=False)
    with patch(model, method, cache="uniform"):
        wanted = greedy(model, batch)
        found = greedy(model, batch, cache_implementation="static")
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@families
def test_what_prunes_nothing_refuses_nothing(family):
    """Caches, drafts and embeddings that a method could not follow are the model's own business without one."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    plain = greedy(model, batch)
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    text = {"inputs_embeds": embeds, "attention_mask": batch.inputs["attention_mask"]}
    with patch(model, None):
        assert torch.equal(greedy(model, batch, cache_implementation="static").sequences, plain.sequences)
        assert torch.equal(greedy(model, batch, prompt_lookup_num_tokens=2).sequences, plain.sequences)
        model(**text)
    with patch(model, METHODS["plc"]), pytest.raises(ValueError, match="must not use assisted generation"):
        greedy(model, batch, prompt_lookup_num_tokens=2)


def test_a_default_that_generate_drops_is_no_reason_to_refuse():
    """Gemma 3's checkpoints name a hybrid cache, which generate() itself takes back; asked for by name it is refused."""
    model, batch = build_model("gemma3"), standard_batch("gemma3", "single", 1)
    wanted = {}
    for kind in (None, "hybrid"):
        model.generation_config.cache_implementation = kind
        with patched(model, METHODS["budget"], batch, regions_of(batch)):
            wanted[kind] = greedy(model, batch).sequences
            with pytest.raises(ValueError, match="cache_implementation must be None, 'dynamic' or"):
                greedy(model, batch, cache_implementation="hybrid")
    assert torch.equal(wanted[None], wanted["hybrid"])


def test_stages_the_wrong_way_round_are_refused():
    with pytest.raises(TypeError, match="plc must pool before the language model .* ilp prune inside it"):
        Compose(InnerLLMPruning(0.1), PreLLMCompression(keep=0.5))


@families
def test_a_call_that_fails_before_it_begins_leaves_the_outer_one_alone(family):
    """A hook calls the model with too many arguments and goes on."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)

    def wrong(*_):
        with pytest.raises(TypeError):
            model.model(*range(99))

    with patch(model, METHODS["compose"]) as stats:
        wanted = model(**batch.inputs).logits
        handle = model.model.language_model.layers[0].register_forward_hook(wrong)
        found = model(**batch.inputs).logits
        handle.remove()
    assert torch.equal(found, wanted) and len(stats.prefills) == 2


@pytest.mark.parametrize("name", ["plc", "budget"])
@families
def test_a_hook_of_the_users_that_changes_the_prompt(family, name):
    """The plan is made from what the model gets, not from what its caller gave."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    ids = batch.inputs["input_ids"]
    moved = torch.cat([ids[:, 1:2], ids[:, :1], ids[:, 2:]], 1)
    with patch(model, METHODS[name]):
        wanted = model(**{**batch.inputs, "input_ids": moved}).logits

    def change(module, args, kwargs):
        return args, kwargs | {"input_ids": moved}

    handle = model.model.register_forward_pre_hook(change, with_kwargs=True)
    try:
        with patch(model, METHODS[name]):
            assert torch.equal(model(**batch.inputs).logits, wanted)
    finally:
        handle.remove()


@families
def test_a_uniform_block_on_a_ragged_cache_is_refused(family):
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    with patch(model, METHODS["budget"]):
        cache = model(**batch.inputs, use_cache=True).past_key_values
    mask = torch.ones(1, 2 * batch.inputs["input_ids"].shape[1], dtype=torch.int64)
    with patch(model, METHODS["budget"], cache="uniform"):
        with pytest.raises(ValueError, match="cache must be 'ragged' for a cache whose layers hold different tokens"):
            model(**{**batch.inputs, "attention_mask": mask}, **as_argument(model, cache))


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "qwen3_vl_video", "idefics3", "ovis2"])
def test_compact_positions_of_videos_and_of_text_among_tokens_are_refused(family):
    model, batch = get_model(family, "sdpa"), standard_batch(family, "single", 1)
    with patched(model, METHODS["plc"], batch, regions_of(batch), positions="compact"):
        with pytest.raises(ValueError, match="positions must be 'original' for videos and for images with text among"):
            model(**batch.inputs)


class Longer(InnerLLMPruning):
    def merge(self, hidden, view):
        return torch.cat([hidden[:, :1], hidden], 1)


class InPlace(InnerLLMPruning):
    def merge(self, hidden, view):
        hidden[:, :2] = 0
        return hidden


@families
def test_what_a_method_merges_is_checked_and_its_own(family):
    """Hidden states of another length would shift every token; what is written in place reaches the kept tokens alone."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    with patch(model, Longer(0.3, layer=2)), pytest.raises(TypeError, match="hidden states of the shape and dtype"):
        model(**batch.inputs)
    with patch(model, InnerLLMPruning(0.3, layer=2)):
        wanted = model(**batch.inputs, output_hidden_states=True).hidden_states
    with patch(model, InPlace(0.3, layer=2)):
        found = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(found[2], wanted[2]) and not torch.equal(found[3], wanted[3])


def test_defaults_of_device_and_dtype_are_the_users_own(family="llava"):
    """Planning is the host's, whatever device new tensors go to and whatever dtype they have."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    for name in ("plc", "strict", "compose"):
        with patched(model, METHODS[name], batch, regions_of(batch)):
            wanted = model(**batch.inputs).logits
            torch.set_default_dtype(torch.bfloat16)
            try:
                assert torch.equal(model(**batch.inputs).logits, wanted)
            finally:
                torch.set_default_dtype(torch.float32)
