"""How many pictures to encode at once: as many as pay for making the first of them wait for the last.

Every picture is squashed to one square, so what a batch costs depends on its number of pictures alone, and is learnt
from the batches that ran. On a GPU large batches cost little more than small ones; on a CPU eight pictures take as
long as eight times one, and batching would only delay them.
"""

from __future__ import annotations

from typing import Final

GAIN: Final = 0.9
"""A larger batch pays if its time per picture is below this share of a smaller one's."""

WEIGHT: Final = 0.25
"""Of the newest batch in the running mean."""

TRY_AGAIN: Final = 64
"""After so many batches that were kept small although more waited, a larger one is measured anew; and after so many
that were larger than one picture, one picture alone: what was once measured badly is not believed for ever."""


class BatchSizes:
    """Chooses the size of the next batch. Sizes 1, 2-3, 4-7, 8-15, ... count as alike. What the first batch of a
    process took is not learnt from: kernels are chosen and memory is had for the first time in it."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._seconds: dict[int, float] = {}  # per picture, by size class
        self._num_held_back = self._num_together = 0
        self._is_cold = True

    def choose(self, num_waiting: int) -> int:
        """Between 1 and the number that waits."""
        wanted = min(num_waiting, self._max_batch)
        if _size_class(wanted) not in self._seconds:
            return wanted  # not tried yet
        if _size_class(1) not in self._seconds:
            return 1
        paying = self._largest_that_pays()
        if wanted <= paying:
            self._num_together += wanted > 1
            return 1 if wanted > 1 and self._num_together % TRY_AGAIN == 0 else wanted
        self._num_held_back += 1
        return wanted if self._num_held_back % TRY_AGAIN == 0 else paying

    def note(self, size: int, seconds: float) -> None:
        """A batch of `size` pictures took `seconds`."""
        if self._is_cold:
            self._is_cold = False
            return
        known = self._seconds.get(_size_class(size))
        each = seconds / size
        self._seconds[_size_class(size)] = each if known is None else known + WEIGHT * (each - known)

    def _largest_that_pays(self) -> int:
        """End of the smallest class that is nearly as quick per picture as the quickest."""
        quickest = min(self._seconds.values())
        return 2 ** (1 + min(each for each, seconds in self._seconds.items() if GAIN * seconds <= quickest)) - 1


def _size_class(size: int) -> int:
    return size.bit_length() - 1
