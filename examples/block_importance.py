"""A picture of what the operator does: importance per block, and the blocks it chose.

One sequence, one key/value head with a group of four query heads. The keys are noise in which
three passages were planted that the queries look for, each head for some more than for others.

    pip install '.[examples]'
    python examples/block_importance.py [picture.png]
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jax_nsa
from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention.problem import Problem
from jax_nsa.compress_attention.reference import block_scores

try:
    import matplotlib
except ModuleNotFoundError:
    raise SystemExit("this example draws: pip install 'jax_nsa[examples]'") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUP, HEAD_SIZE, PAGE = 4, 64, 16
LENGTH = 320  # compressed positions
BLOCKS = Blocks(compress_block_size=32, compress_stride=16, select_block_size=64)
SELECT_COUNT = 16
SCALE = HEAD_SIZE**-0.5
PASSAGES = {900: 60, 2300: 110, 3900: 40}  # token at the middle: tokens to either side

INK, FAINT, CHOSEN, ALWAYS = "#22303c", "#c9d1d6", "#0f7c8f", "#e08e2b"


def planted() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries `[1, GROUP, D]` and the pages of keys and values, in sequence order."""
    seeds = jax.random.split(jax.random.key(4), 5)
    noise = jax.random.normal(seeds[0], [LENGTH, HEAD_SIZE])
    token = jnp.arange(LENGTH)[:, None] * BLOCKS.compress_stride
    middles, widths = jnp.array([*PASSAGES]), jnp.array([*PASSAGES.values()])
    presence = jnp.exp(-0.5 * ((token - middles) / widths) ** 2)  # of each passage, at each token
    topics = jax.random.normal(seeds[1], [len(PASSAGES), HEAD_SIZE])
    taste = jax.random.uniform(seeds[2], [GROUP, len(PASSAGES)], minval=0.1, maxval=0.7)
    query = taste @ topics + 0.5 * jax.random.normal(seeds[3], [GROUP, HEAD_SIZE])
    keys = noise + presence @ topics
    values = jax.random.normal(seeds[4], [LENGTH, HEAD_SIZE])
    return query[None], *(x.reshape(-1, PAGE, HEAD_SIZE) for x in (keys, values))


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the operator; returns the chosen blocks, and the probabilities and importances."""
    _, indices, lse = jax_nsa.nsa_compress_attention_infer(
        query,
        key,
        value,
        scale_value=SCALE,
        head_num=GROUP,
        key_value_head_num=1,
        select_block_size=BLOCKS.select_block_size,
        select_block_count=SELECT_COUNT,
        page_block_size=PAGE,
        compress_block_size=BLOCKS.compress_block_size,
        compress_stride=BLOCKS.compress_stride,
        block_table=np.arange(len(key))[None],
        actual_cmp_seq_kvlen=[LENGTH],
        return_lse=True,
    )
    # The operator keeps no probabilities; its log-sum-exp gives them back.
    problem = Problem(BLOCKS, SCALE, key_value_heads=1, select_block_count=SELECT_COUNT)
    scores = SCALE * query[0] @ key.reshape(LENGTH, HEAD_SIZE).T
    probabilities = jnp.exp(scores - lse[0, :, None])
    return indices[0, 0], probabilities, block_scores(probabilities, problem).sum(axis=0)


def draw(indices: np.ndarray, probabilities: np.ndarray, importance: np.ndarray) -> plt.Figure:
    blocks, size = len(importance), BLOCKS.select_block_size
    always = {0, blocks - 2, blocks - 1}
    color = np.full(blocks, FAINT, dtype=object)
    color[indices] = CHOSEN
    color[sorted(always)] = ALWAYS

    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 5.4), sharex=True, height_ratios=[1, 3], layout="constrained"
    )
    figure.suptitle(
        f"What one new token asks of its past: {len(indices)} of {blocks} blocks",
        x=0.011, ha="left", fontsize=14, weight="bold",
    )  # fmt: skip

    top.imshow(
        np.sqrt(probabilities), aspect="auto", cmap="GnBu", interpolation="nearest",
        extent=(0, LENGTH * BLOCKS.compress_stride, GROUP - 0.5, -0.5),
    )  # fmt: skip
    top.set_title("attention to the compressed positions, by query head", loc="left", fontsize=10)
    top.set_yticks(range(GROUP), [f"head {g}" for g in range(GROUP)])

    bottom.bar(np.arange(blocks) * size, importance, width=0.82 * size, align="edge", color=color)
    for rank, block in enumerate(indices):
        bottom.annotate(
            f"{rank + 1}", ((block + 0.41) * size, importance[block]), (0, 2),
            textcoords="offset points", ha="center", fontsize=8, color=color[block],
        )  # fmt: skip
    bottom.set_title("importance of each block, summed over the group", loc="left", fontsize=10)
    bottom.set_xlabel("token of the original sequence")
    bottom.set_xlim(0, blocks * size)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (CHOSEN, ALWAYS, FAINT)]
    labels = ["chosen, with its rank", "always chosen: first and last two", "left out"]
    bottom.legend(handles, labels, facecolor="white", edgecolor="white", framealpha=1)
    for axes in (top, bottom):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK)
    bottom.spines["bottom"].set(visible=True, color=FAINT)
    bottom.yaxis.grid(True, color=FAINT, linewidth=0.5)
    bottom.set_axisbelow(True)
    return figure


def main(path: str | pathlib.Path) -> None:
    indices, probabilities, importance = (np.asarray(x) for x in attend(*planted()))
    # Past the blocks that are always there, none left out is worth more than one that was chosen.
    left_out = np.delete(importance, indices)
    assert importance[indices[3:]].min() >= left_out.max() * (1 - 1e-4)
    draw(indices, probabilities, importance).savefig(path, dpi=150)
    print(f"chose blocks {' '.join(map(str, indices))}; picture in {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", nargs="?", default="block_importance.png", help="its path")
    main(parser.parse_args().picture)
