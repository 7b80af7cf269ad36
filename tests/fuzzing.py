"""How long the fuzz tests go on: a few hundred examples, always the same, or a hundred thousand random ones.

pytest TEST --hypothesis-profile=thorough                              100,000
OMNILMM_FUZZ_EXAMPLES=25000 pytest TEST --hypothesis-profile=thorough  a piece of them; every run draws anew
"""

from __future__ import annotations

import os

from hypothesis import settings

IS_THOROUGH = settings.get_current_profile_name() == "thorough"
NUM_THOROUGH = int(os.environ.get("OMNILMM_FUZZ_EXAMPLES", "100000"))

FUZZ = settings(
    max_examples=NUM_THOROUGH if IS_THOROUGH else 300, deadline=None, derandomize=not IS_THOROUGH, database=None
)
