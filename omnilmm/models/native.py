"""Products in C++ of our own, where the CPU has AVX512-BF16 and -VBMI and a compiler is at hand.

torch calls oneDNN for these products. The code in `avx512/` takes less time, as it reads a weight ahead of what
it computes, makes one call of a decode step's layer, and gives a row the same numbers whatever rows stand beside it.
Every process that wants it compiles it anew, which takes about two seconds: no code is left behind that another one
would have to trust. Without a compiler, or on another CPU, everything is as torch has it.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.models.huge_pages import HugePages

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).parent / "avx512" / "decode.cpp"
PANEL: Final = 32
"""Outputs of a weight that lie together."""

COMPILERS: Final = ("g++", "c++")
AVX512: Final = ("f", "bw", "dq", "vl", "bf16", "vbmi")
FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-mfma", *(f"-mavx512{part}" for part in AVX512))
COMPILE_S: Final = 60.0


class CWeight(ctypes.Structure):
    """`Weight` in avx512/matrix.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )


class Kernels:
    """The compiled code, and memory for what it reads. Its OpenMP is torch's, and so are its threads.

    Raises:
        OSError: it cannot be loaded here.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self.linear = loaded.omnilmm_linear
        self.linear.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 2, ctypes.c_int)
        self.linear.restype = None
        self.layer = loaded.omnilmm_layer
        self.layer.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int)
        self.layer.restype = None
        self.memory = HugePages()


def can_compute() -> bool:
    """Whether this CPU has the instructions."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") and has.get("avx512_vbmi"))


def try_kernels() -> Kernels | None:
    """Compile and load them; None where that cannot be."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or not can_compute():
        return None
    with tempfile.TemporaryDirectory(prefix="omnilmm-") as scratch:  # once loaded, the file is not needed
        compiled, library = Path(scratch, "decode.o"), Path(scratch, "decode.so")
        try:
            _run(compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(compiled))
            _run(compiler, "-shared", str(compiled), "-o", str(library))  # no OpenMP of its own beside torch's
            return Kernels(library)
        except (OSError, subprocess.SubprocessError):
            logger.warning("the kernels could not be compiled, torch's are used", exc_info=True)
            return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)  # noqa: S603 - our own command


def _signs_and_magnitudes(panels: Tensor) -> Tensor:
    """Integers (panels, pairs, PANEL, 2), int8, as avx512/matrix.h reads them: bytes of the same shape."""
    bits = panels.abs().view(torch.uint8) | (panels < 0).to(torch.uint8) << 7
    return bits.reshape(*panels.shape[:2], 2, 4, 8).transpose(2, 3).reshape(panels.shape)


class NativeLinear(nn.Module):
    """x W^T for bfloat16 x, W (out, in) being bfloat16 or 8-bit integers with a scale (out,). `in` is even.

    8-bit integers are exact in bfloat16, and the sums are scaled in float32. None of them is -128.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        missing = -num_outputs % PANEL
        padded = functional.pad(weight, (0, 0, 0, missing))
        # (panels, pairs of inputs, PANEL, 2)
        panels = padded.view(-1, PANEL, num_inputs // 2, 2).transpose(1, 2)
        self._panels = kernels.memory.copy(panels if scale is None else _signs_and_magnitudes(panels))
        self._scale = None if scale is None else functional.pad(scale.float(), (0, missing)).contiguous()
        self.c_weight = CWeight(
            self._panels.data_ptr(), 0 if self._scale is None else self._scale.data_ptr(), num_outputs, num_inputs
        )
        self._linear, self._address = kernels.linear, ctypes.addressof(self.c_weight)
        self._num_outputs = num_outputs

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (T, in) W^T, to which `residual` (T, out) is added before it is rounded."""
        x = x.contiguous()
        out = x.new_empty(len(x), self._num_outputs)
        before = 0
        if residual is not None:
            residual = residual.contiguous()
            before = residual.data_ptr()
        self._linear(self._address, x.data_ptr(), len(x), before, out.data_ptr(), torch.get_num_threads())
        return out
