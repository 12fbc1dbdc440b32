"""Native Sparse Attention's decode step for JAX."""

import pkgutil

# In a source tree, which has no compiled library, Python finds the installed package's.
__path__ = pkgutil.extend_path(__path__, __name__)

from jax_nsa.cache import PagePools
from jax_nsa.compress.door import nsa_compress_infer
from jax_nsa.compress_attention.door import nsa_compress_attention_infer
from jax_nsa.native import RELEASE, export_disabled_checks
from jax_nsa.pages import PageTables
from jax_nsa.positions import block_positions
from jax_nsa.select_attention.door import nsa_select_attention_infer, nsa_window_attention_infer
from jax_nsa.step import PagedKV, nsa_decode_step
from jax_nsa.training import nsa_attention, nsa_compress

__version__ = RELEASE

__all__ = [
    "PagePools",
    "PageTables",
    "PagedKV",
    "block_positions",
    "export_disabled_checks",
    "nsa_attention",
    "nsa_compress",
    "nsa_compress_attention_infer",
    "nsa_compress_infer",
    "nsa_decode_step",
    "nsa_select_attention_infer",
    "nsa_window_attention_infer",
]
