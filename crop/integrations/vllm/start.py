"""At the start of an engine: what cannot work is refused, and original positions are asked for.

vLLM lets every architecture verify its configuration, in the front process, before that goes to the workers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from crop.integrations.vllm.planning import check_localizer
from crop.integrations.vllm.plans import STAMP
from crop.integrations.vllm.positions import lengthen_rotary
from crop.integrations.vllm.request import own_keys
from crop.integrations.vllm.settings import Settings
from crop.models import families

logger = logging.getLogger("vllm.crop")  # below the one that vLLM has set up


def prepare_configs(architectures: Sequence[str]) -> None:
    """Let architectures verify what pruning needs, after what vLLM verifies for them itself."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for name in architectures:
        stock = MODELS_CONFIG_MAP.get(name.removeprefix("Crop"), VerifyAndUpdateConfig)
        if not issubclass(stock, PruningConfig):
            MODELS_CONFIG_MAP[name] = type("PruningConfig", (PruningConfig, stock), {})


class PruningConfig:
    """Stands before what vLLM verifies for an architecture."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Refuse wrong settings, and write into the configuration what workers need. ValueError."""
        super().verify_and_update_model_config(model_config)
        config, multimodal = model_config.hf_config, model_config.multimodal_config
        settings, known = Settings.of(config), families()
        if config.model_type not in known:
            raise ValueError(f"crop: model_type must be one of {', '.join(sorted(known))}, got {config.model_type!r}")
        if own_keys(multimodal.mm_processor_kwargs or {}):
            raise ValueError(
                "crop: --mm-processor-kwargs must not hold crop_ arguments, which are a request's; set what holds for all "
                "requests by --hf-overrides '{\"crop\": {...}}'"
            )
        if multimodal.is_multimodal_pruning_enabled():
            raise ValueError("crop: --video-pruning-rate must be left out: its positions do not know of pruned images")
        if settings.localizer is not None:
            check_localizer(settings.localizer)
        if settings.positions == "original":
            lengthen_rotary(config.get_text_config(), model_config.max_model_len)
            if not model_config.uses_mrope:
                config.mrope_section = [1]  # vLLM then keeps positions with the request; no rotary embedding reads it
        config.crop_stamp = STAMP

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse options of the engine that would go around pooling. ValueError."""
        super().verify_and_update_config(vllm_config)
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                "crop: --enable-tower-connector-lora must be left out: vLLM counts the encoder's tokens by placeholders, "
                "of which pruned images have fewer"
            )
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mm_encoder:
            logger.warning("crop: cudagraph_mm_encoder is turned off: captured encoders go around pooling")
            compilation.cudagraph_mm_encoder = False
