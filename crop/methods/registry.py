"""Methods by name: what the command line, lmms-eval and the benches offer."""

from __future__ import annotations

from collections.abc import Callable

from crop.methods.base import Method, check_keep
from crop.methods.baselines import BASELINES
from crop.methods.compose import Compose
from crop.methods.diverse import DiverseCompression
from crop.methods.encoder import EncoderPruning
from crop.methods.ilp import InnerLLMPruning
from crop.methods.plc import PreLLMCompression

# Of the way to the last token count, on a logarithmic scale, pooling goes this part: what it drops no layer has seen, what it
# leaves costs time in the first ones. At equal tokens per layer .5, .6 and .9 kept fewer of the embedded model's answers.
POOL_SHARE = 0.75

Build = Callable[[float, "int | None"], "Method | None"]

_BUILT_IN: dict[str, Build] = {
    "crop": lambda keep, _: Compose(DiverseCompression(keep**POOL_SHARE), InnerLLMPruning(keep)),
    "plc": lambda keep, _: PreLLMCompression(keep=keep),
    "diverse": lambda keep, _: DiverseCompression(keep),
    "ilp": lambda keep, _: InnerLLMPruning(keep),
    "none": lambda keep, _: None,
    **BASELINES,
}
_builds = dict(_BUILT_IN)


def register_method(name: str, build: Build) -> None:
    """Make a method known by name: to ``by_name``, the command line, lmms-eval and the benches.

    Args:
        name: e.g. "small-keys"; registering it again replaces what it stood for.
        build: (fraction of the vision tokens that is left in the end, decoder layers of the model or None) -> Method.
    Raises:
        ValueError: the name is empty or one of the package's own. TypeError: ``build`` cannot be called.
    """
    if not name or name in _BUILT_IN:
        raise ValueError(f"register_method: name must be none of {', '.join(_BUILT_IN)}, got {name!r}")
    if not callable(build):
        raise TypeError(f"register_method: build must be a function of keep and num_layers, got {type(build).__name__}")
    _builds[name] = build


def method_names() -> tuple[str, ...]:
    """All names, those of this package first."""
    return tuple(_builds)


def by_name(name: str, keep: float, num_layers: int | None = None, *, encoder: bool = False) -> Method | None:
    """Method with default settings that ends with a fraction ``keep`` of the vision tokens.

    Args:
        name: "plc" (``PreLLMCompression``) and "diverse" (``DiverseCompression``) pool to ``keep``; "ilp" prunes to ``keep``
            at the family's default layer; "crop" pools by "diverse" to ``keep ** POOL_SHARE``, then prunes to ``keep``;
            "none" is the unpruned model; or a baseline's or registered method's name.
        keep: fraction in (0, 1]; 1.0 keeps everything (``plan`` and ``select`` return None).
        num_layers: of the decoder, for methods whose layers are spread over the depth ("pyramiddrop", "autoprune").
        encoder: ``EncoderPruning`` before it, or alone.
    Returns:
        Method, or None for "none".
    Raises:
        ValueError: unknown name, ``keep`` out of range, a method that does not compose with a stage before the encoder.
        TypeError: ``keep`` is not a float.
    Source: own choice; the paper does not publish how it splits a budget between the stages.
    """
    if name not in _builds:
        raise ValueError(f"by_name: name must be one of {', '.join(_builds)}, got {name!r}")
    if not isinstance(keep, float):
        raise TypeError(f"by_name: keep must be a float in (0, 1], got {keep!r}")
    check_keep("by_name", keep)
    method = _builds[name](keep, num_layers)
    return _behind_encoder(name, method) if encoder else method


def _behind_encoder(name: str, method: Method | None) -> Method:
    stage = EncoderPruning()
    if method is None:
        return stage
    if method.encodes:
        raise ValueError(f"by_name: {name!r} prunes before the encoder by itself, got encoder=True; leave it out")
    if isinstance(method, Compose):
        parts = {"plc": method.plc, "ilp": method.ilp}
    else:
        parts = {"ilp" if method.cuts else "plc": method}
    try:
        return Compose(**parts, encoder=stage)
    except TypeError as error:
        raise ValueError(f"by_name: {name!r} does not compose with a stage before the encoder: {error}") from error
