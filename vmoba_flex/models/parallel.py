"""Context parallelism as diffusers enables it: ranks share the tokens of the video."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded where a model is context-parallel
    from vmoba_flex.collectives import Ranks


def ranks_of(parallel_config: Any, joint: bool, name: str) -> "Ranks | None":
    """The ranks that share a layer's tokens, or None if the layer has them all.

    Args:
        parallel_config: what ``enable_parallelism`` gives to a processor, or None.
        joint: whether other tokens attend together with the video.
        name: of the layer's stock processor.

    Raises:
        ValueError: if VMoBA cannot run under it.
    """
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise ValueError(
            "ring_degree must be 1 with VMoBA applied: ring attention splits the keys that a query chooses from; "
            f"ulysses_degree shares out heads instead, got {config.ring_degree}"
        )
    if joint:
        raise ValueError(
            f"context parallelism must be off for {name} with VMoBA applied: diffusers has no plan (_cp_plan) that "
            "keeps the video's tokens apart from others that attend with them, got "
            f"ulysses_degree={config.ulysses_degree}"
        )
    from vmoba_flex.collectives import Ranks

    return Ranks.of(config._ulysses_mesh)
