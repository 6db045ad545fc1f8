"""Everything a patch could leave behind on a model, before and after."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
          "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
          "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip
_RUN_STATE = ("rope_deltas",)  # the model's own, rewritten by every forward


def _config_state(config: Any) -> dict[str, str]:
    return {key: repr(value) if not hasattr(value, "to_dict") else str(id(value))
            for key, value in vars(config).items()}  # fmt: skip


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind: hooks, instance attributes, configs, class attributes,
    attention and mask registries, functions of the modules involved, cache classes."""
    state: dict[str, Any] = {}
    classes = set()
    for name, module in model.named_modules():
        state[f"hooks {name}"] = {h: list(getattr(module, h, {}).items()) for h in _HOOKS}
        state[f"attributes {name}"] = {
            key: id(value) for key, value in vars(module).items() if key not in _HOOKS and key not in _RUN_STATE
        }
        state[f"class {name}"] = type(module)
        if hasattr(module, "config"):
            state[f"config {name}"] = (id(module.config), _config_state(module.config))
        classes.update(c for c in type(module).__mro__ if c.__module__.startswith("transformers"))
    state["generation_config"] = _config_state(model.generation_config)
    cache = transformers.cache_utils
    classes.update({cache.Cache, cache.DynamicCache, cache.DynamicLayer, cache.CacheLayerMixin})
    for cls in classes:
        state[f"vars {cls.__qualname__}"] = {key: id(value) for key, value in vars(cls).items()}
    registries = {
        "attention": transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "masks": transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    }
    for name, registry in registries.items():
        state[f"registry {name}"] = {key: id(registry[key]) for key in registry}
    modules = {c.__module__ for c in classes} | {"transformers.masking_utils"}
    modules |= {"transformers.modeling_flash_attention_utils"}
    skip = {"_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn",
            "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn"}  # fmt: skip
    for name in sorted(modules):
        functions = vars(sys.modules[name]).items()
        state[f"module {name}"] = {k: id(v) for k, v in functions if callable(v) and k not in skip}
    state["torch"] = (
        list(torch.nn.modules.module._global_forward_hooks),
        list(torch.nn.modules.module._global_forward_pre_hooks),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    return state


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    """The model is as it was at the snapshot."""
    after = snapshot(model)
    changed = {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
    assert not changed, f"left behind: {sorted(changed)}: {list(changed.values())[:2]}"
