"""The jnp reference under the contract."""

from compress_attention.contract import CompressAttentionContract


class TestReference(CompressAttentionContract):
    implementation = "reference"
