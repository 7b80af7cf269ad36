"""What the steps of an answer must know of a served model; its weights stay in the pools."""

from __future__ import annotations

from dataclasses import dataclass

from omnilmm.config import Family, ImagePolicy, InputHandling
from omnilmm.prompt.template import Template


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model under the name clients call it by. `policy` is None where it takes no pictures.

    `fingerprint` names the encoder's weights, `dtype` the numbers its vectors are made of. `vector_bytes` is what the
    vectors of one picture take, 0 if nobody said.
    """

    name: str
    family: Family
    fingerprint: str
    dtype: str
    handling: InputHandling
    policy: ImagePolicy | None
    max_context: int
    vocab_size: int
    template: Template
    vector_bytes: int = 0
