"""What a whole model's layers do: block shapes, rules, and which layers and steps stay dense."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from vmoba_flex import config_json
from vmoba_flex.approx_blocks import ApproxBlocks
from vmoba_flex.by_steps import BySteps, value_at
from vmoba_flex.call import Backend, Dispatch
from vmoba_flex.checks import check_choice, check_count, check_positive
from vmoba_flex.config_fields import KINDS, Rules, block_on, checked_fields, rule_of_layer, rules_of_layers
from vmoba_flex.dense_schedule import is_dense_layer, is_dense_step
from vmoba_flex.layer import Layer
from vmoba_flex.paper import Setting, paper_arguments
from vmoba_flex.partition import BlockPartition
from vmoba_flex.presets import Speed, preset_arguments, speed_arguments
from vmoba_flex.remember import Remember, steps_served
from vmoba_flex.tail import Tail
from vmoba_flex.user_error import UserError, checked_path, new_file, one_line

_MAX_STEPS = 100_000  # which are looked at one by one


@dataclasses.dataclass(frozen=True)
class VMoBAConfig:
    """VMoBA for all layers of a model (arXiv 2506.23858, Sec. 3).

    Attributes:
        temporal: 1D blocks: frames in each, or ``ApproxBlocks``.
        spatial: 2D blocks: ``(bh, bw)`` in tokens, through all frames, or ``ApproxBlocks``.
        spatiotemporal: 3D blocks: ``(bt, bh, bw)`` in tokens, or ``ApproxBlocks``.
        rule: a ``TopK`` or ``Threshold``, or ``BySteps`` of these: densities that fall over the denoising steps. One
            for all layers, or a mapping from kind to each that has every kind of ``cycle``, or a list with one for each
            layer. Kept as an immutable copy.
        cycle: kinds in the order of the layers: layer i has kind ``cycle[i % len(cycle)]``.
        dense_layers: layers that attend everything: the number of first layers (int), or a list of layers, negative
            ones counted from the end: ``[0, -1]`` is the first and the last.
        dense_steps: denoising steps that attend everything: the number of first steps (int), or their share below 1
            (float), or a pair of these for first and last steps: ``(0.2, 1)`` is the first fifth and the last step.
        dispatch: as in ``vmoba_attention``, for the layers and steps that are not dense.
        backend: as in ``vmoba_attention``, for the same layers and steps.
        tail: how blocks that are skipped there take part, None if they do not; or ``BySteps`` of these.
        remember: how sparse steps take over what dense ones find; None if each step chooses for itself.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if a value is out of range.

    Example:
        >>> from vmoba_flex.rules import Threshold
        >>> config = VMoBAConfig(3, (5, 13), ApproxBlocks(72), Threshold(0.25, max_density=0.25), dense_layers=[0, -1])
        >>> config.layer(0, num_layers=30).dense, config.layer(1, num_layers=30).kind
        (True, 'spatial')
        >>> config.partition("spatiotemporal", (21, 30, 52)).block
        (7, 5, 13)
    """

    temporal: int | ApproxBlocks
    spatial: tuple[int, int] | ApproxBlocks
    spatiotemporal: tuple[int, int, int] | ApproxBlocks
    rule: Rules
    cycle: tuple[str, ...] = dataclasses.field(default=KINDS, kw_only=True)
    dense_layers: int | Sequence[int] = dataclasses.field(default=0, kw_only=True)
    dense_steps: int | float | tuple[int | float, int | float] = dataclasses.field(default=0, kw_only=True)
    dispatch: Dispatch = dataclasses.field(default="auto", kw_only=True)
    backend: Backend = dataclasses.field(default="auto", kw_only=True)
    tail: Tail | BySteps[Tail | None] | None = dataclasses.field(default=None, kw_only=True)
    remember: Remember | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, setting: Setting, grid: tuple[int, int, int] | None = None) -> Self:
        """The paper's settings (arXiv 2506.23858, Sec. 4).

        Args:
            setting: ``"training"``: ``Threshold(0.25, pool="head")``, here with ``max_density=0.25``: the paper's
                densities of about 0.19 stay below it, and it makes calls free of host reads. ``"inference"``, without
                training: a quarter of the blocks for each query (``TopK``, pool ``"query"``), the first quarter of
                the steps dense.
            grid: latent video size (frames, height, width) in tokens. At ``(21, 30, 52)``, ``(21, 45, 80)``,
                ``(24, 36, 64)`` and ``(36, 30, 52)`` the config has the paper's block shapes, and its k where it has
                one. At any other grid, and without one, it has about 8, 48 and 72 blocks, the paper's numbers at
                ``(24, 36, 64)``, and fits every video.

        Raises:
            TypeError: if ``grid`` has a wrong type.
            ValueError: if ``setting`` is unknown, or ``grid`` is not three sizes of at least 1.
        """
        return cls(**paper_arguments(setting, grid))

    @classmethod
    def fast(cls, grid: tuple[int, int, int] | None = None) -> Self:
        """Inference without training with fewer pairs than ``paper``: a dense first quarter, and what it teaches.

        Densities fall from 0.125 to 0.0625 at half of the steps; 1D layers, of about 8 blocks, attend one of them at
        both. Skipped blocks take part by a tail. Where nothing is remembered, blocks are chosen by the gate
        ``"spread"``. The values may change from version to version.

        Args:
            grid: as in ``paper``, whose block shapes it has.

        Raises:
            TypeError: if ``grid`` has a wrong type.
            ValueError: if ``grid`` is not three sizes of at least 1.
        """
        return cls(**speed_arguments("fast", grid))

    @classmethod
    def preset(cls, model: str, speed: Speed, grid: tuple[int, int, int] | None = None) -> Self:
        """Settings for inference without training, by model and speed.

        They rest on the model's structure (images, two experts, the paper's blocks at Wan's grids) and on the study of
        a small model (docs/quality.md); they were not measured on these weights. ``vmoba-flex compare`` shows what they
        do to your videos, and ``vmoba-flex tune`` finds settings by it. The values may change from version to version.

        Args:
            model: a model, such as ``"wan2.1-14b"``, or the class of its transformer, such as
                ``"WanTransformer3DModel"``.
            speed: all with a dense first quarter, a tail and remembered choices: ``"faithful"`` has density 0.25, the
                paper's, and ``"balanced"`` 0.125; ``"fast"`` is ``fast``, whose densities fall.
            grid: as in ``paper``, whose block shapes it has.

        Raises:
            TypeError: if ``grid`` has a wrong type.
            ValueError: if ``model`` or ``speed`` is unknown, or ``grid`` is not three sizes of at least 1.
        """
        return cls(**preset_arguments(model, speed, grid))

    @property
    def needs_step(self) -> bool:
        """Whether ``layer`` needs to know the denoising step."""
        by_steps = (*rules_of_layers(self.rule), self.tail)
        return bool(self.dense_steps or self.remember or any(isinstance(one, BySteps) for one in by_steps))

    def layer(self, i: int, num_layers: int, step: int | None = None, num_steps: int | None = None) -> Layer:
        """What layer i does; the one place that decides.

        Args:
            i: the layer, in 0..num_layers - 1.
            num_layers: layers of the model.
            step: the denoising step, from 0. Needed where ``needs_step`` is true.
            num_steps: denoising steps in all. Needed where ``dense_steps`` is a share or has last steps, ``rule`` or
                ``tail`` changes at a share, or ``remember`` is given. Of a share in ``dense_steps``, the first or last
                ``ceil(share * num_steps)`` steps are dense.

        Raises:
            TypeError: if an argument is not an int.
            ValueError: if an argument is out of range, one that is needed is None, or ``dense_layers`` or a list of
                rules does not fit ``num_layers``.
        """
        check_positive("num_layers", num_layers)
        check_count("i", i, num_layers, "num_layers")
        if num_steps is not None:
            check_positive("num_steps", num_steps)
        if step is not None:
            check_count("step", step, num_steps, "num_steps")
        layers: Any = self.dense_layers  # __post_init__ has narrowed both
        steps: Any = self.dense_steps
        kind = self.cycle[i % len(self.cycle)]
        rule, always = rule_of_layer(self.rule, kind, i, num_layers), is_dense_layer(layers, i, num_layers)
        dense = is_dense_step(steps, step, num_steps) or always
        now, tail = value_at(rule, step, num_steps), value_at(self.tail, step, num_steps)
        if self.remember is None or always:
            return Layer(kind, now, dense, tail)
        if num_steps is not None and num_steps > _MAX_STEPS:
            raise ValueError(f"num_steps must be at most {_MAX_STEPS} where remember is given, got {num_steps}")
        served = steps_served(self.remember.refresh, steps, step, num_steps)
        records = tuple(dict.fromkeys(value_at(rule, at, num_steps) for at in served))
        return Layer(kind, now, dense, tail, records, recalls=not dense)

    def partition(self, kind: str, grid: tuple[int, int, int], prefix: int = 0, suffix: int = 0) -> BlockPartition:
        """A kind's blocks on a grid.

        Args:
            kind: ``"temporal"``, ``"spatial"`` or ``"spatiotemporal"``.
            grid: latent video size (frames, height, width) in tokens, fewer than 2**31.
            prefix: tokens before the video's.
            suffix: tokens after the video's.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if ``kind`` is unknown, a size is out of range, or the block is larger than the grid.
        """
        check_choice("kind", kind, KINDS)
        single = BlockPartition(grid, (1, 1, 1), prefix=prefix, suffix=suffix)
        return dataclasses.replace(single, block=block_on(single.grid, kind, getattr(self, kind)))

    def to_json(self) -> str:
        """The config as JSON text, one field a line; ``from_json`` gives an equal one back."""
        return config_json.dump(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config of a text that ``to_json`` made, or of FastVideo's VMoBA JSON.

        FastVideo's is known by its keys. Missing keys take FastVideo's defaults.

        - ``first_full_layer`` and ``first_full_step``, which FastVideo ignores, become ``dense_layers`` and
          ``dense_steps``. As in FastVideo, the cycle starts after the dense layers.
        - With ``moba_select_mode`` ``"threshold"``, ``temporal_topk``, ``spatial_topk`` and ``st_topk`` mean nothing;
          with ``"topk"``, ``moba_threshold`` means nothing. They are checked, and not kept.
        - A k counts the own block in both. FastVideo lowers a k above the number of blocks; here it is an error once
          the grid arrives.

        Args:
            text: JSON. ``load`` reads a file.

        Raises:
            TypeError: if ``text`` is not a str, or a value has a wrong type.
            ValueError: if ``text`` is not JSON of one of the two, or has an unknown key or value.
        """
        return cls(**config_json.load(text))

    def save(self, path: Path | str) -> None:
        """Writes ``to_json`` to a ``.json`` file, which appears whole or not at all.

        Raises:
            TypeError: if ``path`` is neither a str nor a Path.
            UserError: a ``ValueError``, if the name has another suffix or the file cannot be written.
        """
        with new_file(checked_path(path), ".json", "a config is JSON") as draft:
            draft.write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The config of a JSON file that ``save`` or FastVideo wrote; see ``from_json``.

        Raises:
            TypeError: if ``path`` is neither a str nor a Path.
            UserError: a ``ValueError``, if the file cannot be read or holds no config.
        """
        path = checked_path(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({one_line(error)}): name a file of VMoBAConfig.save") from error
        try:
            return cls.from_json(text)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is no VMoBAConfig ({one_line(error)}): mend it") from error
