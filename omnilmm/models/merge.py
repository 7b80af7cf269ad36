"""A whole prompt as embeddings, picture vectors in their places: what generation without paging starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omnilmm.errors import OmniError
from omnilmm.messages import Embedding, Span
from omnilmm.models.decoder import LanguageModel


@torch.inference_mode()
def merge_pictures(
    model: LanguageModel, ids: Sequence[int], spans: Sequence[Span], embeddings: Sequence[Embedding]
) -> torch.Tensor:
    """Embeddings of `ids`, (len(ids), hidden) in the model's dtype, every span replaced by its picture's vectors.

    Raises:
        OmniError: an embedding's dtype or shape is not the model's.
    """
    weight = next(model.parameters())
    merged = model.embed(torch.tensor(ids, device=weight.device)).clone()  # (T, hidden)
    for span in spans:
        embedding = embeddings[span.image]
        if embedding.dtype != str(weight.dtype).removeprefix("torch.") or embedding.shape != (
            span.length,
            merged.shape[1],
        ):
            raise OmniError("a picture's vectors do not fit the language model")
        vectors = torch.frombuffer(bytearray(embedding.data), dtype=weight.dtype).view(embedding.shape)
        merged[span.start : span.start + span.length] = vectors.to(weight.device)
    return merged
