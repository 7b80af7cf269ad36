"""The synchronous core of the vision pool: prepared pictures in, checked embeddings out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from omnilmm.config import EncoderConfig, ImagePolicy
from omnilmm.encoder.graphs import EncodeGraphs
from omnilmm.errors import OmniError
from omnilmm.image.transform import normalise
from omnilmm.messages import Embedding, PreparedImage
from omnilmm.models.capture import pick_graphs
from omnilmm.models.vision import ImageEncoder


class VisionEncoder:
    """Normalises squares, runs the tower and the resampler over them as one batch, and checks what comes out.

    The result of one picture does not depend on the others of its batch beyond float rounding: squares all have
    the same size, so within a batch nothing is padded.

    Args:
        config: says whether batches are replayed as CUDA graphs, and how large they get.

    Raises:
        ConfigError: CUDA graphs are asked for on another device.
    """

    def __init__(self, model: ImageEncoder, policy: ImagePolicy, config: EncoderConfig | None = None) -> None:
        config = config or EncoderConfig()
        self.policy = policy
        self._model = model
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._graphs: EncodeGraphs | None = None
        if pick_graphs(config.cuda_graphs, self._device, param="cuda_graphs"):
            self._graphs = EncodeGraphs(model, max_batch=config.max_batch, side=policy.side)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[PreparedImage]) -> list[Embedding | OmniError]:
        """One embedding of shape (num_query, hidden) in the model's dtype per picture, in order.

        A picture whose vectors are not finite yields an OmniError in its place; its neighbours are unharmed.
        """
        pixels = np.stack([normalise(picture.square, self.policy) for picture in pictures])  # (B, 3, S, S) float32
        batch = torch.from_numpy(pixels).to(self._device, self._dtype)
        vectors = self._vectors(batch)  # (B, num_query, hidden)
        finite = torch.isfinite(vectors).flatten(1).all(dim=1).tolist()
        return [
            _pack(row) if good else OmniError("the vision tower produced a number that is not finite")
            for row, good in zip(vectors, finite, strict=True)
        ]

    def _vectors(self, batch: torch.Tensor) -> torch.Tensor:
        if self._graphs is not None and self._graphs.can_run(len(batch)):
            return self._graphs.run(batch)
        vectors: torch.Tensor = self._model(batch)
        return vectors


def _pack(vectors: torch.Tensor) -> Embedding:
    rows, width = vectors.shape
    raw = vectors.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
    return Embedding(dtype=str(vectors.dtype).removeprefix("torch."), shape=(rows, width), data=raw)
