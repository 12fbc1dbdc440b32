"""What the operators' domains have in common."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# Query heads of a key/value head.
GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
# Relative error of an attention row that rounding may cause, by dtype.
ATTENTION_TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-5}
