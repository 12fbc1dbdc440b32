"""A small language model with Native Sparse Attention: trained, prefilled, decoded.

It learns bytes of the Python standard library's own sources with `nsa_attention`, then continues
several texts of different lengths at once with `nsa_decode_step` on paged caches, and shows that
both are one model: the same greedy bytes, the same logits within rounding. Its attention is that of
the released NSA-1B, scaled down: windows, strides and blocks of 16 tokens, gates from the hidden
state; the compression is learned.

    python examples/model.py --steps 400 --picture blocks.png
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import PagePools, PageTables, nsa_attention, nsa_compress, nsa_decode_step

LAYERS, WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_SIZE, BYTES = 2, 128, 4, 2, 32, 256
BLOCK, PAGE, MAX_TOKENS = 16, 16, 512
OPTIONS: dict[str, Any] = {
    "scale_value": HEAD_SIZE**-0.5, "compress_block_size": BLOCK, "compress_stride": BLOCK,
    "select_block_size": BLOCK, "select_block_count": 4, "window_size": 32,
    "importance": "aligned", "init_blocks": 0, "local_blocks": 1,
}  # fmt: skip
BATCH, TRAINED_TOKENS, LEARNING_RATE = 8, 256, 3e-3

Params = dict[str, Any]
Cache = tuple[PageTables, list[PagePools]]
product = functools.partial(jnp.matmul, precision="highest")
Attend = Callable[[int, Params, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# The model. What differs between training and decoding is how a layer attends.


def init(seed: int = 0) -> Params:
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 8 * LAYERS))

    def linear(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    def layer() -> Params:
        return {
            "query": linear(WIDTH, HEADS * HEAD_SIZE),
            "key": linear(WIDTH, KEY_VALUE_HEADS * HEAD_SIZE),
            "value": linear(WIDTH, KEY_VALUE_HEADS * HEAD_SIZE),
            "gates": linear(WIDTH, HEADS * 3),
            "out": linear(HEADS * HEAD_SIZE, WIDTH),
            "up": linear(WIDTH, 4 * WIDTH),
            "down": linear(4 * WIDTH, WIDTH),
            # The mean, to begin with.
            "compress": tuple(jnp.ones((BLOCK, KEY_VALUE_HEADS)) / BLOCK for _ in "kv"),
        }

    return {
        "bytes": linear(BYTES, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "logits": linear(WIDTH, BYTES),
    }


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
    """RoPE: turns the pairs of numbers of `[B, S, heads, size]` by angles of their positions."""
    frequency = 1e4 ** -jnp.linspace(0, 1, HEAD_SIZE // 2, endpoint=False)
    angle = position[:, :, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def transformer(params: Params, tokens: jax.Array, position: jax.Array, attend: Attend) -> Any:
    """Logits `[B, S, 256]` of bytes `[B, S]` at these positions."""
    x = params["bytes"][tokens] * WIDTH**0.5
    for i, layer in enumerate(params["layers"]):
        seen = norm(x)
        query, key, value, gates = (
            product(seen, layer[name]).reshape(*tokens.shape, heads, -1)
            for name, heads in (
                ("query", HEADS), ("key", KEY_VALUE_HEADS), ("value", KEY_VALUE_HEADS),
                ("gates", HEADS),
            )
        )  # fmt: skip
        query, key = rotate(norm(query), position), rotate(norm(key), position)
        attention = attend(i, layer, query, key, value, jax.nn.sigmoid(gates))
        x = x + product(attention.reshape(*tokens.shape, -1), layer["out"])
        x = x + product(jax.nn.gelu(product(norm(x), layer["up"])), layer["down"])
    return product(norm(x), params["logits"])


def attend_densely(layer: Params, query: jax.Array, key: jax.Array, value: jax.Array,
                   gates: jax.Array, **options: Any) -> Any:  # fmt: skip
    compressed = (
        jax.vmap(functools.partial(
            nsa_compress, weight=weight, compress_block_size=BLOCK, compress_stride=BLOCK
        ))(rows)
        for rows, weight in zip((key, value), layer["compress"], strict=True)
    )  # fmt: skip
    return nsa_attention(query, key, value, *compressed, gates, **OPTIONS, **options)


@jax.jit
def forward(params: Params, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Logits of whole sequences, and the blocks `[B, S, kv heads, k]` that each layer read."""
    blocks = []

    def attend(i: int, layer: Params, *arrays: jax.Array) -> jax.Array:
        attention, chosen = attend_densely(layer, *arrays, return_blocks=True)
        blocks.append(chosen)
        return attention

    return transformer(params, tokens, positions(tokens), attend), blocks


def positions(tokens: jax.Array, first: Any = 0) -> jax.Array:
    return jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)


# Decoding on paged caches.


def empty_cache(slots: int, pages: int | None = None) -> Cache:
    """A cache for as many sequences, by default with pages for all of them at full length."""
    columns = MAX_TOKENS // PAGE
    tables = PageTables.empty(
        slots=slots, pages=slots * columns if pages is None else pages, pages_per_slot=columns,
        page_block_size=PAGE, compress_block_size=BLOCK, compress_stride=BLOCK,
    )  # fmt: skip
    pools = [
        PagePools.empty(tables, KEY_VALUE_HEADS, HEAD_SIZE, dtype=jnp.float32)
        for _ in range(LAYERS)
    ]
    return tables, pools


def prefill(
    params: Params, cache: Cache, tokens: jax.Array, slots: jax.Array, counts: jax.Array
) -> tuple[Cache, jax.Array]:
    """Fills slots with the prompts that were allocated: bytes `[n, S]`, padded behind `counts`.

    Returns:
        The cache, and the logits `[n, 256]` after each prompt.
    """
    tables, pools = cache
    pools = list(pools)

    def attend(i: int, layer: Params, query: jax.Array, key: jax.Array, value: jax.Array,
               gates: jax.Array) -> jax.Array:  # fmt: skip
        pools[i] = pools[i].append(tables, key, value, layer["compress"], slots=slots)
        return attend_densely(layer, query, key, value, gates)

    logits = transformer(params, tokens, positions(tokens), attend)
    return (tables, pools), logits[jnp.arange(len(tokens)), counts - 1]


def decode(
    params: Params, cache: Cache, tokens: jax.Array, counts: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Takes the next `counts` bytes of each slot, of `[B, S]`.

    Returns:
        The cache, the logits `[B, S, 256]`, and bool `[B]`: which slots had pages for them.
    """
    tables, pools = cache
    tables, fits = tables.allocate(counts)
    pools = list(pools)

    def attend(i: int, layer: Params, query: jax.Array, key: jax.Array, value: jax.Array,
               gates: jax.Array) -> jax.Array:  # fmt: skip
        pools[i] = pools[i].append(tables, key, value, layer["compress"])
        attention, _ = nsa_decode_step(
            query, gates, *pools[i].views(tables), head_num=HEADS,
            key_value_head_num=KEY_VALUE_HEADS, layout="BSND", actual_seq_qlen=tables.counts,
            **OPTIONS,
        )  # fmt: skip
        return attention

    first = (tables.lengths - tables.counts)[:, None]
    return (tables, pools), transformer(params, tokens, positions(tokens, first), attend), fits


# Training.


def sources() -> np.ndarray:
    """The bytes of the standard library's modules."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"".join(p.read_bytes() for p in sorted(root.glob("*.py"))), np.uint8)


def crops(text: np.ndarray, count: int, tokens: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    while True:
        first = random.integers(0, len(text) - tokens, count)
        yield np.stack([text[at : at + tokens] for at in first]).astype(np.int32)


def loss(params: Params, tokens: jax.Array) -> jax.Array:
    logits, _ = forward(params, tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)


@functools.partial(jax.jit, donate_argnums=0)
def update(state: tuple[Params, Params, Params, jax.Array], tokens: jax.Array) -> Any:
    """A step of Adam (arXiv 1412.6980)."""
    params, first, second, step = state
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    step = step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradient)
    rate = LEARNING_RATE * jnp.minimum(1, step / 50)
    params = jax.tree.map(
        lambda p, m, v: p - rate * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.99**step)) + 1e-8),
        params, first, second,
    )  # fmt: skip
    return (params, first, second, step), value


def train(text: np.ndarray, steps: int) -> Params:
    params = init()
    zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    state = (params, *zeros, jnp.float32(0))
    batches = crops(text, BATCH, TRAINED_TOKENS + 1, seed=0)
    print("compiling a training step ...", flush=True)
    for step in range(1, steps + 1):
        state, value = update(state, next(batches))
        if step == 1:
            jax.block_until_ready(value)
            begin = time.perf_counter()  # without compilation
        if step % 20 == 0 or step == steps:
            show_progress(step, steps, float(value), time.perf_counter() - begin)
    return state[0]


def show_progress(step: int, steps: int, value: float, seconds: float) -> None:
    """A bar that grows where a terminal shows it, and otherwise a line for each call."""
    bar = "#" * (24 * step // steps)
    rate = (step - 1) * BATCH * TRAINED_TOKENS / seconds
    left = seconds / max(step - 1, 1) * (steps - step)
    line = (
        f"step {step:4} of {steps} [{bar:24}] {value:.3f} nats a byte, {rate:,.0f} bytes/s, "
        f"{left:.0f} s left"
    )
    grows = sys.stdout.isatty() and step < steps
    print(f"\r{line:100}" if sys.stdout.isatty() else line, end="" if grows else "\n", flush=True)


# Both ways.


def generate(params: Params, prompts: list[np.ndarray], new: int) -> tuple[Any, Any, float]:
    """Continues prompts greedily; the bytes and logits `[B, new, ...]`, and seconds per step."""
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.stack([np.pad(prompt, (0, max(counts) - len(prompt))) for prompt in prompts])
    tables, pools = empty_cache(len(prompts))
    tables, fits = tables.allocate(counts)
    assert np.all(fits)
    slots = jnp.arange(len(prompts), dtype=jnp.int32)
    cache, logits = jax.jit(prefill)(params, (tables, pools), padded, slots, counts)
    step = jax.jit(decode, donate_argnums=1)
    seen = [logits]
    for number in range(new - 1):
        if number == 1:
            jax.block_until_ready(logits)
            begin = time.perf_counter()  # without compilation
        byte = jnp.argmax(logits, axis=-1)[:, None]
        cache, logits, _ = step(params, cache, byte, jnp.ones_like(slots))
        logits = logits[:, 0]
        seen.append(logits)
    jax.block_until_ready(logits)
    stacked = np.stack(seen, axis=1)
    return stacked.argmax(axis=-1), stacked, (time.perf_counter() - begin) / (new - 2)


def check(params: Params, prompts: list[np.ndarray], new: int) -> float:
    """Compares decoding with the training forward; returns the largest difference of logits."""
    tokens, logits, decoding = generate(params, prompts, new)
    difference, seconds = 0.0, 0.0
    for prompt, continuation, decoded in zip(prompts, tokens, logits, strict=True):
        whole = jnp.asarray(np.concatenate([prompt, continuation]))[None]
        forward(params, whole)  # compiles
        begin = time.perf_counter()
        dense = np.asarray(forward(params, whole)[0])[0, len(prompt) - 1 : -1]
        seconds += time.perf_counter() - begin
        np.testing.assert_array_equal(continuation, dense.argmax(axis=-1))
        difference = max(difference, float(np.abs(dense - decoded).max()))
        text = bytes(continuation.astype(np.uint8)).decode(errors="replace")
        print(f"{len(prompt)} bytes, then: {text!r}")
    print(f"greedy bytes are those of the training forward; logits differ by {difference:.1e}")
    print(
        f"decoding {len(prompts) / decoding:,.0f} bytes/s from caches, "
        f"{len(prompts) / seconds:,.0f} by the training forward once a byte"
    )
    assert difference < 1e-3
    return difference


def draw(params: Params, text: np.ndarray, path: str | pathlib.Path) -> None:
    """Draws what the last byte of a text read: a line for each block, a column for each head."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture, which needs matplotlib: pip install 'jax_nsa[examples]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, blocks = forward(params, jnp.asarray(text)[None])
    lines = -(-len(text) // BLOCK)
    read = np.zeros((lines, LAYERS, KEY_VALUE_HEADS))
    for layer, chosen in enumerate(np.asarray(blocks)[:, 0, -1]):
        for head, ids in enumerate(chosen):
            read[ids[ids >= 0], layer, head] = 1
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(5, 0.19 * lines + 1), sharey=True, layout="constrained"
    )
    figure.suptitle("Blocks that the last byte read", x=0.02, ha="left", weight="bold")
    for line in range(lines):
        shown = bytes(text[line * BLOCK : (line + 1) * BLOCK].astype(np.uint8)).decode("latin-1")
        shown = shown.replace("\n", "\N{RETURN SYMBOL}").replace("$", r"\$")
        weight = "bold" if read[line].any() else "normal"
        left.text(0, line, shown, family="monospace", va="center", weight=weight, fontsize=9)
    left.set_ylabel("block")
    left.set_yticks(range(0, lines, 4))
    left.set_xticks([])
    right.imshow(read.reshape(lines, -1), aspect="auto", cmap="GnBu", vmin=0, vmax=1.3)
    names = [f"layer {i}\nhead {h}" for i in range(LAYERS) for h in range(KEY_VALUE_HEADS)]
    right.set_xticks(range(len(names)), names, fontsize=7)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"picture in {path}")


def main(
    steps: int = 400, new: int = 64, picture: str | pathlib.Path = "model_blocks.png"
) -> float:
    """Trains, decodes, draws; returns the largest difference of logits between both ways."""
    text = sources()
    kept = len(text) * 9 // 10
    params = train(text[:kept], steps)
    whole = next(crops(text[kept:], 3, 320, seed=1))
    prompts = [row[:length] for row, length in zip(whole, (320, 77, 10), strict=True)]
    difference = check(params, prompts, new)
    draw(params, whole[0], picture)
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--new", type=int, choices=range(3, MAX_TOKENS - 320 + 1), metavar="BYTES",
                        default=64, help=f"how many to add, 3 to {MAX_TOKENS - 320}")  # fmt: skip
    parser.add_argument("--picture", default="model_blocks.png", help="where to draw")
    main(**vars(parser.parse_args()))
