"""Several tokens per sequence in one call, as speculative decoding needs.

A draft model has proposed a few tokens for each sequence; one call of the large model checks them
all. Their rows of `query` lie together, `actual_seq_qlen` says how many each sequence has, and
`atten_mask` makes them causal: when the draft completes a compression window, the tokens before
the window's end must not see its compressed position.

    python examples/speculative.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_nsa

HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 8, 2, 64
PAGE, PAGES = 16, 12
WINDOW, STRIDE = 32, 16  # a compressed position per 16 tokens, each the summary of 32

DRAFTED = [4, 2, 3]  # draft tokens of each sequence
TOTAL = np.array([304, 98, 161])  # tokens of each sequence, the draft included
COMPRESSED = (TOTAL - WINDOW) // STRIDE + 1

attend = functools.partial(
    jax_nsa.nsa_compress_attention_infer,
    scale_value=HEAD_SIZE**-0.5,
    head_num=HEADS,
    key_value_head_num=KEY_VALUE_HEADS,
    select_block_size=64,
    select_block_count=4,
    page_block_size=PAGE,
    compress_block_size=WINDOW,
    compress_stride=STRIDE,
)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], [sum(DRAFTED), HEADS, HEAD_SIZE], jnp.bfloat16)
    pool = [PAGES, PAGE, KEY_VALUE_HEADS * HEAD_SIZE]
    key = jax.random.normal(keys[1], pool, jnp.bfloat16)
    value = jax.random.normal(keys[2], pool, jnp.bfloat16)
    block_table = np.arange(PAGES).reshape(len(DRAFTED), -1)

    together, _ = attend(
        query,
        key,
        value,
        atten_mask=jnp.ones([1]),  # that it is there is all that counts
        block_table=block_table,
        actual_seq_qlen=DRAFTED,
        actual_cmp_seq_kvlen=COMPRESSED,
        actual_sel_seq_kvlen=TOTAL,
    )

    # The same, one token at a time: each sees the windows that end at or before it.
    row = 0
    for b, drafted in enumerate(DRAFTED):
        for t in range(drafted):
            seen = TOTAL[b] - drafted + t + 1
            alone, _ = attend(
                query[row : row + 1],
                key,
                value,
                block_table=block_table[b : b + 1],
                actual_cmp_seq_kvlen=[(seen - WINDOW) // STRIDE + 1],
            )
            np.testing.assert_allclose(
                np.float32(together[row]), np.float32(alone[0]), rtol=1e-2, atol=1e-3
            )
            print(f"sequence {b}, draft token {t}: sees {seen} tokens, same answer as alone")
            row += 1


if __name__ == "__main__":
    main()
