"""What the picture of the demo tells."""

from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vmoba_flex.cells import cell_ids, cell_means
from vmoba_flex.demo.run import LayerResult
from vmoba_flex.tail import Cells


@dataclass(frozen=True)
class Story:
    """What the picture tells.

    Attributes:
        videos: float (T, 3, H, W) in [0, 1] by name, one frame for each latent frame: "clip", "noisy", "full", "sparse"
            and "tail". The last three are denoised under full attention, sparse attention, and the same with a tail.
        nearness: PSNR in dB of two videos, by their names in alphabetical order.
        held_out: whether the model was not trained on the clip.
        token: the query that the picture follows, (t, y, x) in the grid.
        attention: the query's probabilities under full attention, float (tokens,), for each layer of `results`.
        head: the head that is shown.
        results: one per layer that is drawn.
        rule: how many blocks are chosen, in words.
        credit: the clip's source, for the last line.
    """

    videos: dict[str, Tensor] = field(repr=False)
    nearness: dict[tuple[str, str], float]
    held_out: bool
    token: tuple[int, int, int]
    attention: list[Tensor] = field(repr=False)
    head: int
    results: list[LayerResult]
    rule: str
    credit: str = ""

    def psnr(self, one: str, other: str) -> float:
        """PSNR of two of the videos, in dB."""
        first, second = sorted((one, other))
        return self.nearness[first, second]

    @property
    def frames(self) -> Tensor:
        """The clip's frames."""
        return self.videos["clip"]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent size (frames, height, width)."""
        return self.results[0].partition.grid

    def as_cells(self, result: LayerResult) -> Tensor:
        """The clip with each token in the mean colour of its cell in a layer that has a tail: float (T, h, w, 3)."""
        partition, tail = result.partition, result.tail
        assert tail is not None
        tokens = F.adaptive_avg_pool2d(self.frames, self.grid[1:]).permute(0, 2, 3, 1).flatten(0, 2)
        cells = Cells(partition, tail.cell_of(partition))
        return cell_means(tokens[None, None], cells)[0, 0, cell_ids(cells, tokens.device)].view(*self.grid, 3)

    @property
    def row(self) -> int:
        """The query's index in raster order."""
        _, height, width = self.grid
        t, y, x = self.token
        return (t * height + y) * width + x

    def latent_frames(self, count: int) -> list[int]:
        """`count` evenly spread frames, or all of fewer; the query's own is one of them."""
        total = self.grid[0]
        picked = np.linspace(0, total - 1, min(count, total)).round().astype(int)
        picked[np.abs(picked - self.token[0]).argmin()] = self.token[0]
        return picked.tolist()
