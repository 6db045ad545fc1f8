"""Every way of use for every family: several cuts, no cache, beams, static caches, other questions, training, wrappers.

The batch of `test_families.py`: two samples with different images and one of text alone, padded on the left. The ways have
deeper tests of their own on two families (`test_patch_*.py`); here each is one row per family.
"""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model

from crop.geometry.region import Region
from crop.methods import Pyramid

pytestmark = pytest.mark.usefixtures("one_thread")

OWN_MASKS = ("gemma3", "paligemma")  # masks that are more than causal: what they cannot do is refused
CUTS = {family: Pyramid.steps((1, 3), keep=0.5) for family in FAMILIES}
# A scoring layer must see the whole prompt: of its four layers, in turn sliding and full, that leaves one.
CUTS["gemma3"] = Pyramid.steps((2,), keep=0.5)


def decoder(model):
    return getattr(model.model, "language_model", None) or model.model.text_model


def run(model, batch, name="both", steps=2):
    """Logits of every step and kept tokens."""
    with patched(model, METHODS[name], batch, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, steps)
    return torch.stack(out.logits), [kept.tolist() for kept in stats.kept]


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=ATOL, rtol=0)
    assert one[1] == other[1]


def assert_refused(family, reason, **more):
    """By name, before anything runs, and nothing is changed."""
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason):
        patched(model, METHODS["ilp"], batch, batch, regions_of(batch), **more).__enter__()
    assert_unchanged(before, model)


@families
def test_several_cuts(family):
    model, batch, cuts = get_model(family, "sdpa"), get_batch(family, "left", 1), CUTS[family]
    with patched(model, cuts, batch, batch, regions_of(batch)) as stats:
        out = greedy(model, batch, 2)
    kept = iter(stats.kept)
    for row, sample in enumerate(batch.samples):
        oracle, decision = get_oracle(family), get_oracle(family).keep_all(sample)
        if sample.images:
            regions = regions_for(row, sample)
            oracle, decision = decide(oracle, sample, cuts, regions, sample.layouts())
        assert all(next(kept).tolist() == decision.kept_original(image) for image in range(len(sample.images)))
        for got, wanted in zip(out.logits, oracle.greedy(sample, decision, 2).logits, strict=True):
            torch.testing.assert_close(got[row], wanted, atol=ATOL, rtol=0)


@families
def test_without_a_cache(family):
    """Every step is a prefill, decided anew."""
    model, oracle, batch = get_model(family, "sdpa"), get_oracle(family), get_batch(family, "left", 1)
    plain = [greedy(model, batch, 2).logits[1]]
    plain.append(model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, use_cache=False, output_logits=True,
                                return_dict_in_generate=True).logits[1])  # fmt: skip
    if not torch.allclose(*plain, atol=ATOL, rtol=0):
        pytest.skip("this transformers answers otherwise without a cache, without a patch, too")
    with patched(model, METHODS["ilp"], batch, batch, regions_of(batch)):
        out = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, use_cache=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
    for row, sample in enumerate(batch.samples):
        steps = Steps()
        for number in range(2):
            decision = oracle.keep_all(sample)
            if sample.images:
                regions = regions_for(row, sample)
                decision = oracle.decide(sample, METHODS["ilp"], regions, sample.layouts())
                assert not decision.near_tie, "the test's own data is too close to call: change a seed"
            steps.logits.append(oracle.forward(sample, decision)[0][-1])
            torch.testing.assert_close(out.logits[number][row], steps.logits[-1], atol=ATOL, rtol=0)
            sample = sample.extended([int(steps.logits[-1].argmax())])


@families
def test_beams(family):
    """The score of the best beam, recomputed by the oracle along its tokens."""
    model, oracle, batch = get_model(family, "sdpa"), get_oracle(family), get_batch(family, "left", 1)
    try:
        model.generate(**batch.inputs, max_new_tokens=1, do_sample=False, num_beams=2)
    except (RuntimeError, ValueError, IndexError) as error:
        pytest.skip(f"this transformers has no beams for it without a patch either: {error}")
    if family == "internvl" and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers repeats the tiles of an image one by one: wrong without a patch, too")
    with patched(model, METHODS["plc"], batch, batch, regions_of(batch)):
        out = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, num_beams=2, output_scores=True,
                             return_dict_in_generate=True)  # fmt: skip
    prompt = batch.inputs["input_ids"].shape[1]
    for row, sample in enumerate(batch.samples):
        decision = oracle.keep_all(sample)
        if sample.images:
            regions = regions_for(row, sample)
            decision = oracle.decide(sample, METHODS["plc"], regions, sample.layouts())
        total, tokens = 0.0, out.sequences[row, prompt:].tolist()
        for number, token in enumerate(tokens):
            logits = oracle.forward(sample.extended(tokens[:number]), decision)[0][-1]
            total += float(logits.log_softmax(-1)[token])
        assert abs(total / len(tokens) - float(out.sequences_scores[row])) < ATOL


@families
def test_static_cache(family):
    if family in OWN_MASKS:
        assert_refused(family, "ragged", cache="uniform")
        return
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 1)
    found = []
    for more in ({}, {"cache_implementation": "static"}):
        with patched(model, METHODS["both"], batch, batch, regions_of(batch), cache="uniform"):
            out = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                                 return_dict_in_generate=True, **more)  # fmt: skip
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(found[1], found[0], atol=ATOL, rtol=0)
    for row, steps in enumerate(greedy_steps(family, "left", 1, "both")):
        torch.testing.assert_close(found[0][0, row], steps.logits[0], atol=ATOL, rtol=0)


@families
def test_another_question(family):
    """About other regions: tokens that were pruned come back, and all is as in a run from the start."""
    if family in OWN_MASKS:
        reason = {"gemma3": "masks of its own and for new tokens only", "paligemma": "images see the questions"}[family]
        assert_refused(family, f"readmit must be False for '{family}', .*{reason}.*fresh cache", readmit=True)
        return
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 1)
    regions = regions_of(batch)
    elsewhere = [Region.box(1 - x1, 1 - y1, 1 - x0, 1 - y0) for r in regions for x0, y0, x1, y1 in r.boxes[:1]]
    more = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with patched(model, METHODS["ilp"], batch, regions, readmit=True) as stats:
        out = model.generate(**batch.inputs, **more)
    first = stats.kept
    ids = torch.cat([out.sequences, torch.tensor([(7, 21, 3, 40)] * len(batch.samples))], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch.inputs["attention_mask"].shape[1]] = batch.inputs["attention_mask"]
    with patched(model, METHODS["ilp"], batch, elsewhere, readmit=True) as stats:
        again = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **more)
    kept = [index.tolist() for index in stats.kept]
    assert any(set(b) - set(a.tolist()) for a, b in zip(first, kept, strict=True))
    grown = [
        sample.extended(ids[row, batch.inputs["input_ids"].shape[1] :].tolist())
        for row, sample in enumerate(batch.samples)
    ]
    fresh = zoo.make_batch(grown, "left")
    with patched(model, METHODS["ilp"], batch, elsewhere) as stats:
        wanted = model.generate(**fresh.inputs, **more)
    assert kept == [index.tolist() for index in stats.kept]
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(wanted.logits), atol=ATOL, rtol=0)


@families
def test_training(family):
    """The loss is the oracle's; gradients reach the vision tower, with checkpointing the same ones."""
    batch, labels = get_batch(family, "left", 1), 3
    target = torch.full_like(batch.inputs["input_ids"], -100)
    wanted = []
    for row, sample in enumerate(batch.samples):
        end = batch.offsets[row] + len(sample.ids)
        target[row, end - labels : end] = torch.tensor(sample.ids[-labels:])
        decision = get_oracle(family).keep_all(sample)
        if sample.images:
            regions = regions_for(row, sample)
            decision = get_oracle(family).decide(sample, METHODS["plc"], regions, sample.layouts())
        logits = get_oracle(family).forward(sample, decision)[0][-labels - 1 : -1]
        wanted.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.ids[-labels:])))
    found = []
    for checkpointing in (False, True)[: 1 if HOOKS_INSIDE else 2]:
        model = zoo.build_model(family, "sdpa").requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        with patched(model, METHODS["plc"], batch, batch, regions_of(batch)):
            logits = model(**batch.inputs).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())
            loss.backward()
        torch.testing.assert_close(loss.detach(), torch.stack(wanted).mean(), atol=ATOL, rtol=0)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("vis" in name and grad.abs().max() > 0 for name, grad in found[0].items())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0)


@families
def test_adapters(family):
    """As the model with the adapters merged into it."""
    torch.manual_seed(0)
    model, batch = zoo.build_model(family, "sdpa"), get_batch(family, "left", 1)
    names = [n for n, m in decoder(model).layers.named_modules() if isinstance(m, torch.nn.Linear)]
    leaves = {name.rpartition(".")[2] for name in names if "proj" in name and "attn" in name}
    model = get_peft_model(model, LoraConfig(r=2, target_modules=sorted(leaves), init_lora_weights=False)).eval()
    found, merged = run(model, batch), run(copy.deepcopy(model).merge_and_unload(), batch)
    torch.testing.assert_close(found[0], merged[0], atol=5 * ATOL, rtol=0)  # the merged weights are rounded
    assert found[1] == merged[1]


@families
def test_quantised(family):
    """No weight is read: as the model whose weights were rounded alike."""
    model, batch = zoo.build_model(family, "sdpa"), get_batch(family, "left", 1)
    rounded = copy.deepcopy(model)
    for path, module in list(decoder(model).layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            owner, _, leaf = path.rpartition(".")
            stand_in = Quantised(module, 8)
            setattr(decoder(model).layers.get_submodule(owner), leaf, stand_in)
            decoder(rounded).layers.get_submodule(path).weight.copy_(stand_in.full())
    assert_same(run(model, batch), run(rounded, batch))


@families
def test_two_devices(family):
    """The last layers on a device that holds no data, as a device map has them: kept tokens are those of one device."""
    batch = get_batch(family, "left", 1)
    wanted, model = run(get_model(family, "sdpa"), batch)[1], zoo.build_model(family, "sdpa")
    for module in (*decoder(model).layers[NUM_LAYERS - 1 :], decoder(model).norm, model.lm_head):
        module.to("meta")

        def forward(*args, original=module.forward, **kwargs):
            return original(*send_to_device(args, "meta"), **send_to_device(kwargs, "meta"))

        module.forward = forward
    with patched(model, METHODS["both"], batch, batch, regions_of(batch)) as stats:
        out = model(**batch.inputs)
    assert [kept.tolist() for kept in stats.kept] == wanted
    assert out.logits.is_meta and out.logits.shape[:2] == batch.inputs["input_ids"].shape


@families
@torch._dynamo.config.patch(recompile_limit=64)  # layers share their code, and every one guards on its own cache
def test_compiled_layers(family):
    """Right, and not compiled again for other regions of as many tokens."""
    model, batch = zoo.build_model(family, "sdpa"), get_batch(family, "none", 1)
    one, *_ = regions_of(batch)
    regions = [[box] * len(regions_of(batch)) for box in (one, one, Region.box(0.3, 0.3, 0.9, 0.8))]
    wanted = []
    for where in regions:
        with patched(model, METHODS["ilp"], batch, where):
            wanted.append(model(**batch.inputs).logits)
    torch._dynamo.reset()
    for layer in decoder(model).layers:
        layer.compile(backend="eager")
    model(**batch.inputs)
    compiled = []
    for where, logits in zip(regions, wanted, strict=True):
        torch._dynamo.utils.counters.clear()
        with patched(model, METHODS["ilp"], batch, where):
            torch.testing.assert_close(model(**batch.inputs).logits, logits, atol=ATOL, rtol=0)
        compiled.append(torch._dynamo.utils.counters["frames"]["total"])
    torch._dynamo.reset()
    assert compiled[0] > 0 and compiled[2] == 0  # the second run adds what the first left to be interpreted


@families
def test_again_nested_and_assisted(family):
    """A block after a block is as the first; one inside another, and draft models, are refused by name."""
    model, batch = get_model(family, "sdpa"), get_batch(family, "left", 1)
    first, before = run(model, batch), snapshot(model)
    second = run(model, batch)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    with patched(model, METHODS["both"], batch, batch, regions_of(batch)):
        with (
            pytest.raises(RuntimeError, match="must not be patched already"),
            patched(model, METHODS["ilp"], batch, batch, regions_of(batch)),
        ):
            pass
        with pytest.raises(ValueError, match="must not use assisted generation"):
            model.generate(**batch.inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
        inside = greedy(model, batch, 2)
    assert torch.equal(torch.stack(inside.logits), first[0])
    assert_unchanged(before, model)


def test_all_families_in_threads():
    """A model of each family, patched at the same time."""
    wanted = {family: run(get_model(family, "sdpa"), get_batch(family, "left", 1)) for family in FAMILIES}
    found, failures = {}, []

    def work(family):
        try:
            with torch.no_grad():
                found[family] = run(get_model(family, "sdpa"), get_batch(family, "left", 1))
        except BaseException as error:  # noqa: BLE001, an assertion in a thread would be lost
            failures.append((family, error))

    threads = [threading.Thread(target=work, args=(family,)) for family in FAMILIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for family, result in wanted.items():
        assert_same(found[family], result)
