"""The jnp reference under the contract."""

from contract import CompressAttentionContract


class TestReference(CompressAttentionContract):
    implementation = "reference"
