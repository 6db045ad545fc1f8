"""The operators in plain torch, see ``crop.ops.reference``."""

from crop.ops.reference import adaptive_pool, attention_mass, compact, pack, region_topk, saliency, select, spread

__all__ = ["adaptive_pool", "attention_mass", "compact", "pack", "region_topk", "saliency", "select", "spread"]
