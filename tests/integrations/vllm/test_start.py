"""What is settled when an engine starts: versions, names, settings, refusals."""

from __future__ import annotations

import subprocess
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from crop.integrations import vllm as plugin
from crop.integrations.vllm import start
from crop.integrations.vllm.families import ENTRIES, REFUSED, target
from crop.integrations.vllm.plans import STAMP
from crop.integrations.vllm.settings import GIB, Settings

pytestmark = pytest.mark.fast


def test_nothing_imports_vllm_but_vllm():
    code = "import sys, crop, crop.integrations.vllm, crop.integrations.vllm.model; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------- names
@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the parts of vLLM that registration touches."""
    module, registry = types.ModuleType("vllm"), {}
    module.__version__ = "0.32.0"
    module.ModelRegistry = SimpleNamespace(register_model=registry.__setitem__)
    config = types.ModuleType("vllm.model_executor.models.config")

    class Verify:
        calls: list[str] = []

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            Verify.calls.append("model")

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            Verify.calls.append("engine")

    config.VerifyAndUpdateConfig, config.MODELS_CONFIG_MAP = Verify, {}
    names = ("vllm.model_executor", "vllm.model_executor.models")
    for name, value in {"vllm": module, config.__name__: config, **{n: types.ModuleType(n) for n in names}}.items():
        monkeypatch.setitem(sys.modules, name, value)
    return SimpleNamespace(module=module, registry=registry, configs=config.MODELS_CONFIG_MAP, verify=Verify)


def test_stock_names_by_default_own_names_always(vllm, monkeypatch):
    monkeypatch.delenv("CROP_VLLM", raising=False)
    plugin.register()
    plugin.register()  # vLLM may do so more than once
    assert set(vllm.registry) == {*ENTRIES, *REFUSED, *(f"Crop{name}" for name in ENTRIES)}
    assert vllm.registry["LlavaForConditionalGeneration"] == (
        "crop.integrations.vllm.families:CropLlavaForConditionalGeneration"
    )
    assert set(vllm.configs) == {*ENTRIES, *(f"Crop{name}" for name in ENTRIES)}
    assert all(issubclass(one, start.PruningConfig) and len(one.__mro__) == 4 for one in vllm.configs.values())


def test_explicit_leaves_stock_names_alone(vllm, monkeypatch):
    monkeypatch.setenv("CROP_VLLM", "explicit")
    plugin.register()
    assert set(vllm.registry) == set(vllm.configs) == {f"Crop{name}" for name in ENTRIES}
    monkeypatch.setenv("CROP_VLLM", "off")
    with pytest.raises(ValueError, match="CROP_VLLM must be 'explicit' or not set, got 'off'"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "dev"])
def test_other_versions_are_refused_with_one_sentence(vllm, version):
    vllm.module.__version__ = version
    with pytest.raises(RuntimeError, match=f"version 0.32 or 0.33, got {version}; install .*VLLM_PLUGINS=''"):
        plugin.register()
    assert not vllm.registry
    plugin.check_version("0.32"), plugin.check_version("0.32.3"), plugin.check_version("0.33.0+cpu")


def test_families_are_looked_up_by_their_targets():
    module, name = target("LlavaForConditionalGeneration").split(":")
    assert module == "crop.integrations.vllm.families" and name == "CropLlavaForConditionalGeneration"
    from crop.integrations.vllm import families

    with pytest.raises(AttributeError, match="CropNothing"):
        families.CropNothing  # noqa: B018
    with pytest.raises(AttributeError):
        families.LlavaForConditionalGeneration  # noqa: B018


# ---------------------------------------------------------------------------------------------------------- settings
def test_settings_come_with_the_configuration():
    assert Settings.of(SimpleNamespace()) == Settings() and Settings().positions == "original"
    given = {"keep": 12, "mode": "max", "localizer": "ocr", "positions": "compact", "feature_cache": 0.5}
    assert Settings.of(SimpleNamespace(crop=given)) == Settings(**given)
    assert Settings(**given).feature_bytes == GIB // 2


@pytest.mark.parametrize(
    "given,error",
    [
        (5, r"hf_overrides\['crop'\] must be a mapping of keep, .*got 5"),
        ({"kep": 0.1}, "must name keep, mode, localizer, positions, feature_cache, got 'kep'"),
        ({"keep": 0}, "keep as a token count must be >= 1, got 0"),
        ({"keep": "x"}, "keep must be a float"),
        ({"mode": "sum"}, "mode must be one of"),
        ({"localizer": "attention"}, "localizer must be one of"),
        ({"positions": "centroid"}, "positions must be one of"),
        ({"feature_cache": -1}, "feature_cache must be a number of GiB from 0 on, got -1"),
        ({"feature_cache": float("inf")}, "feature_cache must be"),
        ({"feature_cache": True}, "feature_cache must be"),
    ],
)
def test_wrong_settings_are_refused(given, error):
    with pytest.raises((TypeError, ValueError), match=error):
        Settings.of(SimpleNamespace(crop=given))


# ------------------------------------------------------------------------------------------------------------- start
class Stock:
    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        model_config.verified = True

    verify_and_update_config = verify_and_update_model_config


class Config(start.PruningConfig, Stock):
    pass


def model_config(uses_mrope: bool = False, evs: bool = False, more: Any = None, **values: Any) -> Any:
    text = SimpleNamespace(max_position_embeddings=512, rope_parameters=None)
    hf = SimpleNamespace(model_type="llava", get_text_config=lambda: text, **values)
    multimodal = SimpleNamespace(mm_processor_kwargs=more, is_multimodal_pruning_enabled=lambda: evs)
    return SimpleNamespace(hf_config=hf, multimodal_config=multimodal, uses_mrope=uses_mrope, max_model_len=512)


def test_original_positions_are_asked_for_without_a_flag():
    given = model_config()
    Config.verify_and_update_model_config(given)
    assert given.verified and given.hf_config.mrope_section and given.hf_config.crop_stamp == STAMP
    assert given.hf_config.get_text_config().max_position_embeddings == 1024
    given = model_config(uses_mrope=True)
    Config.verify_and_update_model_config(given)
    assert not hasattr(given.hf_config, "mrope_section")
    given = model_config(crop={"positions": "compact"})
    Config.verify_and_update_model_config(given)
    assert not hasattr(given.hf_config, "mrope_section")
    assert given.hf_config.get_text_config().max_position_embeddings == 512


def test_what_cannot_work_does_not_start(monkeypatch):
    def refuse(given: Any, error: str) -> None:
        with pytest.raises((TypeError, ValueError), match=error):
            Config.verify_and_update_model_config(given)
        assert not hasattr(given.hf_config, "crop_stamp")

    refuse(model_config(crop={"keep": 2.0}), "keep as a fraction")
    refuse(model_config(evs=True), "--video-pruning-rate must be left out")
    refuse(model_config(more={"crop_keep": 0.1}), "--mm-processor-kwargs must not hold crop_ arguments")
    other = model_config()
    other.hf_config.model_type = "some_vl"
    refuse(other, "model_type must be one of .*got 'some_vl'")

    def missing(name: str) -> None:
        raise ValueError(f"{name} must be installed")

    monkeypatch.setattr(start, "check_localizer", missing)
    refuse(model_config(crop={"localizer": "ocr"}), "ocr must be installed")


def engine_config(lora: Any = None, graphs: bool = False) -> Any:
    compilation = SimpleNamespace(cudagraph_mm_encoder=graphs)
    return SimpleNamespace(lora_config=lora, compilation_config=compilation)


def test_options_that_go_around_pooling():
    given = engine_config(SimpleNamespace(enable_tower_connector_lora=False), graphs=True)
    Config.verify_and_update_config(given)
    assert given.verified and not given.compilation_config.cudagraph_mm_encoder
    with pytest.raises(ValueError, match="--enable-tower-connector-lora must be left out"):
        Config.verify_and_update_config(engine_config(SimpleNamespace(enable_tower_connector_lora=True)))
