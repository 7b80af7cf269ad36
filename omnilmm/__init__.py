"""OmniLMM-12B and OmniLMM-3B (MiniCPM-V 1.0) as one library.

`omnilmm.pipeline` is the whole product in one process; the Ray Serve cluster in `deployments/` is the
same flow cut at its joints. This package never imports ray.
"""

__version__ = "0.1.0"
