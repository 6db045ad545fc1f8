"""Models as users have them: with adapters, quantised, spread over devices, in several threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model

from tests.support.batches import standard_batch
from tests.support.cases import ATOL, METHODS, assert_steps, expected, families, get_model, greedy, patched, regions_of
from tests.support.quantised import Quantised
from tests.support.snapshot import assert_unchanged, snapshot
from tests.support.tiny_families import THOROUGH, build_model

pytestmark = pytest.mark.usefixtures("one_thread", "flash")

matrix = pytest.mark.parametrize
names = matrix("name", ["plc", "compose"])


def run(model, batch, name):
    with patched(model, METHODS[name], batch, regions_of(batch)) as stats:
        out = greedy(model, batch, max_new_tokens=3)
    return torch.stack(out.logits), [kept.tolist() for kept in stats.kept]


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=ATOL, rtol=0)
    assert one[1] == other[1]


@names
@families(THOROUGH)
def test_adapters(family, name):
    """A PEFT model is pruned as the model with the adapters merged into it; only they get gradients."""
    torch.manual_seed(0)
    batch = standard_batch(family, "left", 1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(build_model(family), config).eval()
    model(**batch.inputs)  # the first forward installs transformers' own recording hooks
    before = snapshot(model)
    found = run(model, batch, name)
    assert_unchanged(before, model)
    with patched(model, METHODS[name], batch, regions_of(batch)):
        model(**batch.inputs).logits[:, -1].sum().backward()
    touched = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched and all("lora" in key for key in touched)
    assert_same(found, run(copy.deepcopy(model).merge_and_unload(), batch, name))


@families(THOROUGH)
def test_quantised_to_four_bits(family):
    """No weight is read: as the model whose weights were rounded alike; `test_uses.py` has eight bits."""
    model, batch = build_model(family), standard_batch(family, "left", 1)
    rounded = copy.deepcopy(model)
    for path, module in list(model.model.language_model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            owner, _, leaf = path.rpartition(".")
            stand_in = Quantised(module, 4)
            setattr(model.model.language_model.layers.get_submodule(owner), leaf, stand_in)
            rounded.model.language_model.layers.get_submodule(path).weight.copy_(stand_in.full())
    assert_same(run(model, batch, "compose"), run(rounded, batch, "compose"))


@families(THOROUGH)
def test_offloaded_inside(family, tmp_path):
    """Weights go to the disk inside the block, fetched layer by layer by accelerate's own hooks from then on."""
    batch = standard_batch(family, "left", 1)
    wanted, model = run(get_model(family, "sdpa"), batch, "compose"), build_model(family)
    with patched(model, METHODS["compose"], batch, regions_of(batch)) as stats:
        disk_offload(model, tmp_path, execution_device="cpu")
        out = greedy(model, batch, max_new_tokens=3)
    assert_same((torch.stack(out.logits), [kept.tolist() for kept in stats.kept]), wanted)


def test_two_models_in_two_threads():
    """Each thread has its own model, block, regions and answers."""
    results, failures = {}, []

    def work(family, name):
        try:
            model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
            for _ in range(3):
                with patched(model, METHODS[name], batch, regions_of(batch)):
                    results[family] = greedy(model, batch)
        except BaseException as error:  # noqa: BLE001, an assertion in a thread would be lost
            failures.append(error)

    pairs = [("llava", "compose"), ("qwen2_5_vl", "budget")]
    before = {family: snapshot(get_model(family, "sdpa")) for family, _ in pairs}
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for family, name in pairs:
        batch = standard_batch(family, "left", 1)
        assert_steps(results[family], [e.steps for e in expected(batch, name)])
        assert_unchanged(before[family], get_model(family, "sdpa"))


@pytest.mark.parametrize("place", ["q_proj", "o_proj"])
@families(THOROUGH)
def test_interrupted_and_used_again(family, place):
    """Ctrl-C inside the scoring attention, then the same block goes on: right answers, nothing left behind."""
    model, batch = get_model(family, "sdpa"), standard_batch(family, "left", 1)
    wanted = run(model, batch, "compose")
    before = snapshot(model)

    def interrupt(*_):
        handle.remove()
        raise KeyboardInterrupt

    with patched(model, METHODS["compose"], batch, regions_of(batch)) as stats:
        handle = getattr(model.model.language_model.layers[1].self_attn, place).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, batch)
        out = greedy(model, batch, max_new_tokens=3)
    assert_same((torch.stack(out.logits), [kept.tolist() for kept in stats.kept]), wanted)
    assert_unchanged(before, model)
