"""What the tests of losses over frozen keys share: features in every dtype and layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])
workspaces_mb = st.sampled_from([64, 0.02, 0.0005])


def unit_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1).to(dtype)
