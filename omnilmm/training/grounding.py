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

from torch import Tensor, nn
from torch.nn import functional


class Grounding(nn.Module):
    """Reads facts off picture vectors."""

    def __init__(self, hidden: int, num_facts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.read = nn.Linear(hidden, num_facts)
        nn.init.zeros_(self.read.weight)
        nn.init.constant_(self.read.bias, -4.0)  # most facts are absent from most cells

    def loss(self, vectors: Tensor, facts: Tensor) -> Tensor:
        """Binary cross-entropy, summed over facts and averaged over a picture's cells, as a sum over pictures.

        Args:
            vectors: (P, cells, hidden).
            facts: (P, cells, num_facts), 1 where the fact holds.
        """
        logits = self.read(self.norm(vectors)).float()
        total = functional.binary_cross_entropy_with_logits(logits, facts.to(logits.dtype), reduction="sum")
        return total / facts.shape[1]
