"""Native Sparse Attention's compressed attention for decoding, as a JAX primitive."""

from jax_nsa.compress_attention import nsa_compress_attention_infer

__all__ = ["nsa_compress_attention_infer"]
__version__ = "0.1.0"
