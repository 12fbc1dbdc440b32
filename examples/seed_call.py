"""One call, as a new user writes it.

The numbers are those of the example in torch_npu's documentation of
`npu_nsa_compress_attention_infer`: 20 sequences, each with one new token and a compressed cache of
1024 positions in pages of 128.

    python examples/seed_call.py
"""

import jax
import jax.numpy as jnp

import jax_nsa


def main() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)

    # This step's queries, and the pools of pages that all sequences' caches live in.
    query = jax.random.normal(keys[0], [20, 8, 192], jnp.bfloat16)
    key = jax.random.normal(keys[1], [160, 128, 2 * 192], jnp.bfloat16)
    value = jax.random.normal(keys[2], [160, 128, 2 * 128], jnp.bfloat16)

    # Which page holds which part of which sequence: here, 8 pages each in any order.
    block_table = jax.random.permutation(keys[3], 160).reshape(20, 8)

    attention, topk_indices = jax_nsa.nsa_compress_attention_infer(
        query,
        key,
        value,
        scale_value=1.0,
        head_num=8,
        key_value_head_num=2,
        select_block_size=64,
        select_block_count=16,
        page_block_size=128,
        compress_block_size=32,
        compress_stride=16,
        block_table=block_table,
        actual_cmp_seq_kvlen=[1024] * 20,
    )

    print("attention   ", attention.dtype, attention.shape)
    print("topk_indices", topk_indices.dtype, topk_indices.shape)
    print("blocks for sequence 0, key/value head 0:", *topk_indices[0, 0])
    return attention, topk_indices


if __name__ == "__main__":
    main()
