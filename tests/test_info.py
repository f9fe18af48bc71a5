"""What ``python -m ssl_kernels.info`` prints."""

from __future__ import annotations

import torch
from processes import run_python

import ssl_kernels
from ssl_kernels import _C
from ssl_kernels.info import collect


def test_report_names_versions_instruction_set_and_backends() -> None:
    report = collect()
    assert report["ssl_kernels"] == ssl_kernels.__version__
    assert report["torch"].startswith(torch.__version__)
    assert report["instruction set"].startswith(_C.active_isa())
    assert report["CPU matrix products"] in ("oneDNN", "torch.mm")
    assert "CPU fp32/bf16/fp16: cpu" in report["sigmoid_contrastive_loss"]
    assert "CUDA fp32/bf16/fp16: triton" in report["sigmoid_contrastive_loss"]


def test_module_prints_it_and_follows_the_environment() -> None:
    code = "import runpy; runpy.run_module('ssl_kernels.info', run_name='__main__')"
    result = run_python(code, SSL_KERNELS_BACKEND="eager", SSL_KERNELS_ISA="baseline")
    assert result.returncode == 0, result.stderr
    assert "instruction set           baseline" in result.stdout
    assert "CPU fp32/bf16/fp16: eager" in result.stdout
