"""Native Sparse Attention's compressed attention for decoding, as a JAX primitive."""

import pkgutil

# In a source tree, which has no compiled library, Python finds the installed package's.
__path__ = pkgutil.extend_path(__path__, __name__)

from jax_nsa.compress_attention import nsa_compress_attention_infer
from jax_nsa.native import export_disabled_checks

__all__ = ["export_disabled_checks", "nsa_compress_attention_infer"]
__version__ = "0.1.0"
