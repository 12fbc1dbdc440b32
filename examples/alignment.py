"""A picture of the two rules by which blocks are scored: CANN's, and that of open training codes.

A sequence of tokens has one passage that the query looks for. Both rules read the same
probabilities of the compressed positions; by which blocks they choose, a model can tell them apart.

    pip install '.[examples]'
    python examples/alignment.py [picture.svg]
"""

from __future__ import annotations

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
TOKENS = 2040
PASSAGE = range(1280, 1312)  # the tokens that the query looks for
GEOMETRIES = (Blocks(16, 16, 16), Blocks(32, 16, 64))  # l, d, l'
RULES = ("cann", "aligned")
INIT_BLOCKS, LOCAL_BLOCKS = 1, 2
SELECT_COUNT = INIT_BLOCKS + LOCAL_BLOCKS + 1  # one is free
SHOWN = 200  # tokens to either side of the passage

INK, FAINT, CHOSEN, SOUGHT = "#22303c", "#c9d1d6", "#0f7c8f", "#f8dcb8"


def planted() -> tuple[jax.Array, jax.Array]:
    """Returns queries `[GROUP, D]` and keys of the tokens `[TOKENS, 1, D]`."""
    seeds = jax.random.split(jax.random.key(0), 3)
    topic = jax.random.normal(seeds[0], [HEAD_SIZE])
    keys = jax.random.normal(seeds[1], [TOKENS, HEAD_SIZE])
    keys = keys.at[np.array(PASSAGE)].add(topic)
    query = 0.6 * topic + jax.random.normal(seeds[2], [GROUP, HEAD_SIZE])
    return query, keys[:, None]


def attend(
    query: jax.Array, keys: jax.Array, blocks: Blocks, importance: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs the operator; returns the chosen blocks, and the probabilities and importances."""
    size, stride = blocks.compress_block_size, blocks.compress_stride
    mean = jnp.full([size, 1], 1 / size)
    compressed = jax_nsa.nsa_compress(keys, mean, size, stride)
    length, scale = len(compressed), HEAD_SIZE**-0.5
    cache = jnp.pad(compressed, [(0, -length % PAGE), (0, 0), (0, 0)])
    pages = cache.reshape(-1, PAGE, HEAD_SIZE)
    _, indices, lse = jax_nsa.nsa_compress_attention_infer(
        query[None],
        pages,
        pages,
        scale_value=scale,
        head_num=GROUP,
        key_value_head_num=1,
        select_block_size=blocks.select_block_size,
        select_block_count=SELECT_COUNT,
        page_block_size=PAGE,
        compress_block_size=size,
        compress_stride=stride,
        block_table=np.arange(len(pages))[None],
        actual_cmp_seq_kvlen=[length],
        actual_sel_seq_kvlen=[TOKENS],
        return_lse=True,
        importance=importance,
        init_blocks=INIT_BLOCKS,
        local_blocks=LOCAL_BLOCKS,
    )
    # The operator keeps no probabilities; its log-sum-exp gives them back.
    scores = scale * query @ compressed[:, 0].T
    probabilities = jnp.exp(scores - lse[0, :, None])
    problem = Problem(blocks, scale, 1, SELECT_COUNT, importance, INIT_BLOCKS, LOCAL_BLOCKS)
    importances = block_scores(probabilities, problem).sum(axis=0)
    return np.asarray(indices[0, 0]), np.asarray(probabilities.sum(axis=0)), np.asarray(importances)


def bars(axes: plt.Axes, heights: np.ndarray, first: int, each: int, color: list[str]) -> None:
    """A bar for each height, `each` tokens apart, the first one in the middle of its place."""
    middle = first + each * np.arange(len(heights))
    inside = abs(middle - np.mean(PASSAGE)) < SHOWN + each
    axes.bar(middle[inside], heights[inside], width=0.85 * each, color=np.array(color)[inside])


def draw(results: dict[tuple[Blocks, str], tuple[np.ndarray, ...]]) -> plt.Figure:
    """Both geometries side by side: the probabilities, then the importances by each rule."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    plt.rcParams.update({"svg.hashsalt": "alignment", "svg.fonttype": "none"})
    figure, grid = plt.subplots(
        3, len(GEOMETRIES), figsize=(10, 6), sharex="col", layout="constrained"
    )
    for column, blocks in zip(grid.T, GEOMETRIES, strict=True):
        size, stride = blocks.select_block_size, blocks.compress_stride
        probabilities = results[blocks, RULES[0]][1]
        color = [INK] * len(probabilities)
        bars(column[0], probabilities, blocks.compress_block_size // 2, stride, color)
        column[0].set_title(
            f"l = {blocks.compress_block_size}, d = {stride}, l' = {size}", loc="left",
            weight="bold",
        )  # fmt: skip
        column[0].set_ylabel(f"probability of each\nposition, {GROUP} heads")
        for axes, rule in zip(column[1:], RULES, strict=True):
            indices, _, importance = results[blocks, rule]
            chosen = indices[INIT_BLOCKS + LOCAL_BLOCKS]
            color = [CHOSEN if j == chosen else FAINT for j in range(len(importance))]
            bars(axes, importance, size // 2, size, color)
            axes.annotate(
                f"block {chosen}", (chosen * size + size // 2, importance[chosen]), (0, 2),
                textcoords="offset points", ha="center", color=CHOSEN,
            )  # fmt: skip
            axes.set_ylabel(f'importance,\n"{rule}"')
        column[-1].set_xlim(np.mean(PASSAGE) - SHOWN, np.mean(PASSAGE) + SHOWN)
        column[-1].set_xlabel("token of the original sequence")
        for axes in column:
            axes.axvspan(PASSAGE.start, PASSAGE.stop, color=SOUGHT, zorder=0, linewidth=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(y=0.2)
            axes.tick_params(colors=INK)
    grid[0, 0].annotate(
        "the tokens that\nthe query looks for", (PASSAGE.stop, 0.75), (8, 0), color="#a8620f",
        xycoords=("data", "axes fraction"), textcoords="offset points",
    )  # fmt: skip
    return figure


def main(path: str | pathlib.Path) -> dict[tuple[Blocks, str], int]:
    """Draws the picture; returns the block that each rule chose, by geometry and rule."""
    query, keys = planted()
    results = {
        (blocks, rule): attend(query, keys, blocks, rule) for blocks in GEOMETRIES for rule in RULES
    }
    draw(results).savefig(path)
    chosen = {key: int(r[0][INIT_BLOCKS + LOCAL_BLOCKS]) for key, r in results.items()}
    for (blocks, rule), block in chosen.items():
        size = blocks.select_block_size
        print(f"blocks of {size} tokens, {rule!r}: {block}, from token {block * size} on")
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", nargs="?", default="alignment.svg", help="its path")
    main(parser.parse_args().picture)
