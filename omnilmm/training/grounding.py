"""An additional loss for pictures of which it is known what lies where.

Each of the 64 vectors of a picture belongs to a cell of an 8 x 8 grid (the resampler's queries carry the position table
of that grid). One linear layer has to tell from a vector what has its centre in the cell (shape, colour, size, letter)
and in which row and column the cell lies. A small model so learns to see before it learns to speak, in a fraction of
the steps that answers alone would take. The layer is thrown away after training; nothing of it is in a checkpoint.

Row and column are asked for because nothing else keeps them: the resampler adds its positions to keys, not to values,
and a tower that is asked only what a cell shows learns to forget where the cell lies. A model trained without these
facts answered every other kind of question and guessed at "where" and "left or right".
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

UNTOLD = 255
"""In the place of a fact of which it is not said whether it holds: nothing is learned there."""


class Grounding(nn.Module):
    """Reads facts off picture vectors.

    Args:
        smoothing: the probability with which a fact is held to be the other way round (label smoothing, Szegedy et al.
            2015), so that what never occurs together is not learned to be impossible.
    """

    def __init__(self, hidden: int, num_facts: int, *, smoothing: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.read = nn.Linear(hidden, num_facts)
        nn.init.zeros_(self.read.weight)
        nn.init.constant_(self.read.bias, -4.0)  # most facts are absent from most cells
        self._smoothing = smoothing
        self._least = sum(-share * math.log(share) for share in (smoothing, 1 - smoothing) if share)

    def loss(self, vectors: Tensor, facts: Tensor) -> Tensor:
        """Binary cross-entropy, less its least possible value, summed over the facts that are told and averaged over a
        picture's cells, as a sum over pictures.

        Args:
            vectors: (P, cells, hidden).
            facts: (P, cells, num_facts), 1 where the fact holds, UNTOLD where that is not said.
        """
        logits = self.read(self.norm(vectors)).float()
        told = facts != UNTOLD
        wanted = (facts == 1) * (1 - 2 * self._smoothing) + self._smoothing
        losses = functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
        return ((losses - self._least) * told).sum() / facts.shape[1]
