"""Every way of use for every family: no cache, beams, training, adapters, quantised, on two devices, compiled, in threads.

The batch of `test_contract.py`, padded on the left. The ways have deeper tests of their own (`test_generate.py` and others);
here each is one row per family. Several cuts and static caches: `test_pyramid.py`, `test_uniform.py`.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer

from crop.geometry.region import Region
from tests.support.batches import standard_batch
from tests.support.cases import (
    ATOL,
    METHODS,
    decide,
    expected,
    families,
    get_model,
    get_oracle,
    greedy,
    one_per_decoder,
    patched,
    regions_for,
    regions_of,
    skip_what_transformers_cannot,
)
from tests.support.families.entry import NUM_LAYERS
from tests.support.oracle import norm_of
from tests.support.quantised import Quantised
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import FAMILIES, build_model, decoder_of

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # of the checkpoint, in older versions of transformers


def run(model, batch, name="compose", steps=2):
    """Logits of every step and kept tokens."""
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        out = greedy(model, batch, steps)
    return torch.stack(out.logits), [kept.tolist() for kept in stats.kept]


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=ATOL, rtol=0)
    assert one[1] == other[1]


@families()
def test_without_a_cache(family):
    """Every step is a prefill, decided anew."""
    model, oracle, batch = get_model(family), get_oracle(family), standard_batch(family, "left", 1)
    plain = [greedy(model, batch, 2, use_cache=cached).logits[1] for cached in (True, False)]
    if not torch.allclose(*plain, atol=ATOL, rtol=0):
        pytest.skip("this transformers answers otherwise without a cache, without a patch, too")
    with patched(model, METHODS["budget"], batch, regions_of(batch)):
        out = greedy(model, batch, 2, use_cache=False)
    for row, sample in enumerate(batch.samples):
        for number in range(2):
            decision = decide(oracle, sample, METHODS["budget"], regions_for(row, sample))
            logits = oracle.forward(sample, decision)[0][-1]
            torch.testing.assert_close(out.logits[number][row], logits, atol=ATOL, rtol=0)
            sample = sample.extended([int(logits.argmax())])


@families()
def test_beams(family):
    """The score of the best beam, recomputed by the oracle along its tokens."""
    model, batch = get_model(family), standard_batch(family, "left", 1)
    try:
        greedy(model, batch, 1, num_beams=2)
    except (RuntimeError, ValueError, IndexError) as error:
        pytest.skip(f"this transformers has no beams for it without a patch either: {error}")
    skip_what_transformers_cannot(family, "repeat", model)
    with patched(model, METHODS["plc"], batch, regions_of(batch)):
        out = greedy(model, batch, 2, num_beams=2, output_scores=True)
    prompt = batch.inputs["input_ids"].shape[1]
    for row, expect in enumerate(expected(batch, "plc")):
        total, tokens = 0.0, out.sequences[row, prompt:].tolist()
        for number, token in enumerate(tokens):
            logits = expect.oracle.forward(expect.sample.extended(tokens[:number]), expect.decision)[0][-1]
            total += float(logits.log_softmax(-1)[token])
        assert abs(total / len(tokens) - float(out.sequences_scores[row])) < ATOL


@families()
def test_training(family):
    """The loss is the oracle's; gradients reach the vision tower, with checkpointing the same ones."""
    batch, labels = standard_batch(family, "left", 1), 3
    target = torch.full_like(batch.inputs["input_ids"], -100)
    wanted = []
    for row, sample in enumerate(batch.samples):
        end = batch.offsets[row] + len(sample.ids)
        target[row, end - labels : end] = torch.tensor(sample.ids[-labels:])
        decision = decide(get_oracle(family), sample, METHODS["plc"], regions_for(row, sample))
        logits = get_oracle(family).forward(sample, decision)[0][-labels - 1 : -1]
        wanted.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.ids[-labels:])))
    found = []
    for checkpointing in (False, True)[: 1 if HOOKS_INSIDE else 2]:
        model = build_model(family, "sdpa").requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        with patched(model, METHODS["plc"], batch, regions_of(batch)):
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


@families()
def test_adapters(family):
    """As the model with the adapters merged into it."""
    torch.manual_seed(0)
    model, batch = build_model(family, "sdpa"), standard_batch(family, "left", 1)
    names = [n for n, m in decoder_of(family, model).layers.named_modules() if isinstance(m, torch.nn.Linear)]
    leaves = {name.rpartition(".")[2] for name in names if "proj" in name and "attn" in name}
    chosen = rf".*\.{FAMILIES[family].decoder}\..*\.({'|'.join(sorted(leaves))})"
    model = get_peft_model(model, LoraConfig(r=2, target_modules=chosen, init_lora_weights=False)).eval()
    found, merged = run(model, batch), run(copy.deepcopy(model).merge_and_unload(), batch)
    torch.testing.assert_close(found[0], merged[0], atol=5 * ATOL, rtol=0)  # the merged weights are rounded
    assert found[1] == merged[1]


@families()
def test_quantised(family):
    """No weight is read: as the model whose weights were rounded alike."""
    model, batch = build_model(family, "sdpa"), standard_batch(family, "left", 1)
    rounded = copy.deepcopy(model)
    for path, module in list(decoder_of(family, model).layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            owner, _, leaf = path.rpartition(".")
            stand_in = Quantised(module, 8)
            setattr(decoder_of(family, model).layers.get_submodule(owner), leaf, stand_in)
            decoder_of(family, rounded).layers.get_submodule(path).weight.copy_(stand_in.full())
    assert_same(run(model, batch), run(rounded, batch))


@families()
def test_two_devices(family):
    """The last layers on a device that holds no data, as a device map has them: kept tokens are those of one device."""
    batch = standard_batch(family, "left", 1)
    wanted, model = run(get_model(family, "sdpa"), batch)[1], build_model(family, "sdpa")
    skip_what_transformers_cannot(family, "devices", model)
    model.set_experts_implementation("batched_mm")  # torch knows no shapes of float32's grouped product
    for module in (
        *decoder_of(family, model).layers[NUM_LAYERS - 1 :],
        norm_of(decoder_of(family, model)),
        model.lm_head,
    ):
        module.to("meta")

        def forward(*args, original=module.forward, **kwargs):
            return original(*send_to_device(args, "meta"), **send_to_device(kwargs, "meta"))

        module.forward = forward
    with patched(model, METHODS["compose"], batch, regions_of(batch)) as stats:
        out = model(**batch.inputs)
    assert [kept.tolist() for kept in stats.kept] == wanted
    assert out.logits.is_meta and out.logits.shape[:2] == batch.inputs["input_ids"].shape
    last, *_, first = (
        keys
        for keys in (getattr(layer, "keys", None) for layer in reversed(out.past_key_values.layers))
        if keys is not None
    )
    assert last.is_meta and not first.is_meta


@one_per_decoder()
@torch._dynamo.config.patch(recompile_limit=64)  # layers share their code, and every one guards on its own cache
def test_compiled_layers(family):
    """Right, and not compiled again for other regions of as many tokens."""
    model, batch = build_model(family, "sdpa"), standard_batch(family, "none", 1)
    one, *_ = regions_of(batch)
    regions = [[box] * len(regions_of(batch)) for box in (one, one, Region.box(0.3, 0.3, 0.9, 0.8))]
    wanted = []
    for where in regions:
        with patched(model, METHODS["budget"], batch, where):
            wanted.append(model(**batch.inputs).logits)
    torch._dynamo.reset()
    for layer in decoder_of(family, model).layers:
        layer.compile(backend="eager")
    model(**batch.inputs)
    compiled = []
    for where, logits in zip(regions, wanted, strict=True):
        torch._dynamo.utils.counters.clear()
        with patched(model, METHODS["budget"], batch, where):
            torch.testing.assert_close(model(**batch.inputs).logits, logits, atol=ATOL, rtol=0)
        compiled.append(torch._dynamo.utils.counters["frames"]["total"])
    torch._dynamo.reset()
    assert compiled[0] > 0 and compiled[2] == 0  # the second run adds what the first left to be interpreted


@families()
def test_again_and_nested(family):
    """A block after a block is as the first; one inside another is refused by name."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    first, before = run(model, batch), snapshot(model)
    second = run(model, batch)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    with patched(model, METHODS["compose"], batch, regions_of(batch)):
        with (
            pytest.raises(RuntimeError, match="must not be patched already"),
            patched(model, METHODS["budget"], batch, regions_of(batch)),
        ):
            pass
        inside = greedy(model, batch, 2)
    assert torch.equal(torch.stack(inside.logits), first[0])
    assert_unchanged(before, model)


def test_all_families_in_threads():
    """A model of each family, patched at the same time."""
    wanted = {family: run(get_model(family, "sdpa"), standard_batch(family, "left", 1)) for family in FAMILIES}
    found, failures = {}, []

    def work(family):
        try:
            with torch.no_grad():
                found[family] = run(get_model(family, "sdpa"), standard_batch(family, "left", 1))
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
