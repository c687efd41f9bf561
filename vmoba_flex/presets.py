"""Settings by model and speed, for inference without training: the one place to change them."""

from typing import Any, Literal, get_args

from vmoba_flex.by_steps import BySteps
from vmoba_flex.checks import check_choice
from vmoba_flex.paper import blocks_at
from vmoba_flex.remember import CHOOSES_ONCE, Remember
from vmoba_flex.rules import TopK
from vmoba_flex.tail import Tail

Speed = Literal["faithful", "balanced", "fast"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)

_DENSE_STEPS = 0.25
# Of each speed: the density from a share of the steps on.
_DENSITIES: dict[Speed, dict[int | float, float]] = {
    "faithful": {0: 0.25},
    "balanced": {0: 0.125},
    "fast": {0: 0.125, 0.5: 0.0625},
}

_WAN = "WanTransformer3DModel"
# Models by name, and the class of their transformer in diffusers. Any class of these tables is a name, too.
_MODELS = {
    "wan2.1-1.3b": _WAN,
    "wan2.1-14b": _WAN,
    "wan2.2-a14b": _WAN,
    "wan2.2-ti2v-5b": _WAN,
    "hunyuanvideo": "HunyuanVideoTransformer3DModel",
    "hunyuanvideo-1.5": "HunyuanVideo15Transformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "ltx-video": "LTXVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
    "skyreels-v2": "SkyReelsV2Transformer3DModel",
}
_VIDEO = (
    *dict.fromkeys(_MODELS.values()),
    *("WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "ChronoEditTransformer3DModel"),
    *("AnyFlowTransformer3DModel", "HeliosTransformer3DModel", "MiniMaxH3Transformer3DModel"),
    *("LTX2VideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel", "MotifVideoTransformer3DModel"),
    *("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel", "Cosmos3OmniTransformer"),
    *("CosmosTransformer3DModel", "EasyAnimateTransformer3DModel", "AllegroTransformer3DModel"),
    "ConsisIDTransformer3DModel",
)
_IMAGES = (
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "Krea2Transformer2DModel",
)
NAMES = (*_MODELS, *_VIDEO, *_IMAGES)

# Two transformers share the steps, and the second has no dense step of its own: its first sparse step has to choose.
_TWO_EXPERTS = {"wan2.2-a14b": CHOOSES_ONCE}


def preset_arguments(model: str, speed: str, grid: tuple[int, int, int] | None) -> dict[str, Any]:
    """Arguments of ``VMoBAConfig``; see ``VMoBAConfig.preset``.

    Raises:
        TypeError: if ``grid`` has a wrong type.
        ValueError: if ``model`` or ``speed`` is unknown, or ``grid`` is not three sizes of at least 1.
    """
    check_choice("model", model, NAMES)
    cycle = {"cycle": ("spatial",)} if model in _IMAGES else {}  # a 1D block would be the whole image
    remember = _TWO_EXPERTS.get(model, Remember())
    return speed_arguments(speed, grid) | {"remember": remember} | cycle


def speed_arguments(speed: str, grid: tuple[int, int, int] | None) -> dict[str, Any]:
    """Arguments of ``VMoBAConfig`` for any video model that has one transformer.

    Raises:
        TypeError: if ``grid`` has a wrong type.
        ValueError: if ``speed`` is unknown, or ``grid`` is not three sizes of at least 1.
    """
    check_choice("speed", speed, SPEEDS)
    densities = next(of for name, of in _DENSITIES.items() if name == speed)
    rules = {start: TopK(density=density, gate="spread") for start, density in densities.items()}
    rule = BySteps(rules) if len(rules) > 1 else rules[0]
    return blocks_at(grid) | {"rule": rule, "dense_steps": _DENSE_STEPS, "tail": Tail(), "remember": Remember()}
