"""Continuous batching: requests come and go, one compiled step decodes whoever is there.

Requests wait for a slot and for pages, are prefilled, decoded with all the others, and leave; their
pages serve the next. Where pages run out, the sequence that came last gives its own back and waits
to be continued. With `--speculate k` a step takes k bytes of each sequence: the last one, and k - 1
that followed when its last three bytes stood in it before; those that the model would not have
written are cut off again. All shapes are fixed, so that nothing is compiled after the first
requests, whatever comes.

    python examples/serve.py --requests 24 --speculate 3
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import model
import numpy as np

GRAM = 3  # bytes that a draft looks for


@dataclasses.dataclass
class Request:
    """A text to be continued.

    Attributes:
        tokens: the prompt, and what has been written so far.
        wanted: how many bytes are to be there in the end.
        arrives: the step in which it comes.
    """

    tokens: list[int]
    wanted: int
    arrives: int

    def draft(self, count: int) -> list[int]:
        """Up to `count` bytes that may come next: those after the last bytes' last occurrence."""
        last = self.tokens[-GRAM:]
        for at in range(len(self.tokens) - GRAM - 1, -1, -1):
            if self.tokens[at : at + GRAM] == last:
                return self.tokens[at + GRAM : at + GRAM + count]
        return []


class Server:
    """Slots, the sequences in them, and the two programs that fill and decode them."""

    def __init__(self, params: model.Params, slots: int, pages: int, speculate: int) -> None:
        self.params, self.speculate = params, speculate
        self.cache = model.empty_cache(slots, pages)
        self.running: dict[int, Request] = {}  # by slot, who came first before
        self.traces: collections.Counter[str] = collections.Counter()
        self.decoded = self.prefilled = self.preempted = 0

        def join(
            params: model.Params, cache: model.Cache, tokens: jax.Array, slot: jax.Array,
            count: jax.Array,
        ) -> tuple[model.Cache, jax.Array, jax.Array]:  # fmt: skip
            self.traces["join"] += 1  # when it is traced, not when it runs
            tables, pools = cache
            mine = jnp.arange(slots) == slot
            tables, fits = tables.allocate(jnp.where(mine, count, 0))
            cache, logits = model.prefill(params, (tables, pools), tokens, slot[None], count[None])
            return cache, jnp.argmax(logits[0]), fits[slot]

        def step(
            params: model.Params, cache: model.Cache, tokens: jax.Array, counts: jax.Array
        ) -> tuple[model.Cache, jax.Array, jax.Array]:
            self.traces["step"] += 1
            cache, logits, fits = model.decode(params, cache, tokens, counts)
            return cache, jnp.argmax(logits, axis=-1), fits

        def cut(cache: model.Cache, lengths: jax.Array) -> model.Cache:
            self.traces["cut"] += 1
            tables, pools = cache
            return tables.truncate(lengths), pools

        self._join = jax.jit(join, donate_argnums=1)
        self._step = jax.jit(step, donate_argnums=1)
        self._cut = jax.jit(cut, donate_argnums=0)

    @property
    def slots(self) -> int:
        return len(self.cache[0].lengths)

    @property
    def pages_used(self) -> int:
        pages = self.cache[0].original
        return len(pages.free) - int(pages.free_count)

    def admit(self, request: Request) -> bool:
        """Prefills a request in a free slot; False where there is none, or no pages for it."""
        slot = next((s for s in range(self.slots) if s not in self.running), None)
        count = len(request.tokens)
        # A page for each that runs stays free, or who made place would take it again at once.
        needed = -(-count // model.PAGE) + len(self.running)
        if slot is None or needed > int(self.cache[0].original.free_count):
            return False
        padded = np.zeros((1, model.MAX_TOKENS), np.int32)
        padded[0, :count] = request.tokens
        self.cache, byte, fits = self._join(
            self.params, self.cache, padded, np.int32(slot), np.int32(count)
        )
        assert fits
        request.tokens.append(int(byte))
        self.running[slot] = request
        self.prefilled += count
        return True

    def decode(self) -> list[Request]:
        """Brings every sequence its next bytes; returns those that made place for others."""
        tokens = np.zeros((self.slots, self.speculate), np.int32)
        counts = np.zeros(self.slots, np.int32)
        for slot, request in self.running.items():
            if room := min(self.speculate, request.wanted - len(request.tokens)):
                new = [request.tokens[-1], *request.draft(room - 1)]
                tokens[slot, : len(new)], counts[slot] = new, len(new)
        self.cache, written, fits = self._step(self.params, self.cache, tokens, counts)
        written, fits = np.asarray(written), np.asarray(fits)
        for slot, request in self.running.items():
            if fits[slot] and counts[slot]:
                # Byte i is right if the model wrote it after those before it.
                same = tokens[slot, 1 : counts[slot]] == written[slot, : counts[slot] - 1]
                right = int(np.logical_and.accumulate(same).sum()) + 1
                request.tokens += written[slot, :right].tolist()
                self.decoded += right
        before = len(self.running)
        self.leave()
        displaced = []
        if not fits.all() and len(self.running) == before:  # and so nobody left pages behind
            displaced.append(self.running.popitem()[1])
            self.preempted += 1
            self.leave()
        return displaced

    def leave(self) -> None:
        """Lets the finished go, and cuts off what was drafted in vain."""
        self.running = {s: r for s, r in self.running.items() if len(r.tokens) < r.wanted}
        lengths = np.zeros(self.slots, np.int32)
        for slot, request in self.running.items():
            lengths[slot] = len(request.tokens) - 1  # the last byte comes with the next step
        self.cache = self._cut(self.cache, lengths)


def arrivals(count: int, seed: int = 0) -> list[Request]:
    """Texts of the standard library's sources, of any length, at any time."""
    random = np.random.default_rng(seed)
    texts = next(model.crops(model.sources(), count, model.MAX_TOKENS, seed))
    requests = []
    for text, arrives in zip(texts, np.sort(random.integers(0, 3 * count, count)), strict=True):
        prompt = int(random.integers(GRAM + 1, 200))
        wanted = prompt + int(random.integers(2, 80))
        requests.append(Request(text[:prompt].tolist(), wanted, int(arrives)))
    return requests


def check(params: model.Params, requests: list[Request], prompts: list[int]) -> None:
    """Holds what was written to the training forward: greedy, but for ties within rounding."""
    for request, prompt in zip(requests, prompts, strict=True):
        assert len(request.tokens) == request.wanted
        padded = np.zeros((1, model.MAX_TOKENS), np.int32)
        padded[0, : request.wanted] = request.tokens
        logits = np.asarray(model.forward(params, padded)[0])[0, prompt - 1 : request.wanted - 1]
        written = np.take_along_axis(logits, padded[0, prompt : request.wanted, None], axis=-1)
        assert np.all(written[:, 0] >= logits.max(axis=-1) - 1e-3)


def main(
    requests: int = 24, slots: int = 4, pages: int = 36, speculate: int = 1, steps: int = 0
) -> Server:
    """Serves requests to the end; returns the server."""
    coming = arrivals(requests)
    longest = max(r.wanted for r in coming)
    if pages * model.PAGE < longest:
        raise SystemExit(f"--pages must hold the longest text, {longest} bytes, got {pages} of 16")
    params = model.train(model.sources(), steps) if steps else model.init()
    server = Server(params, slots, pages, speculate)
    all_of_them, prompts = list(coming), [len(r.tokens) for r in coming]
    waiting: collections.deque[Request] = collections.deque()
    used, step, warm = [], 0, None
    while coming or waiting or server.running:
        while coming and coming[0].arrives <= step:
            waiting.append(coming.pop(0))
        while waiting and server.admit(waiting[0]):
            waiting.popleft()
        if server.running:
            waiting.extendleft(server.decode())
            if warm is None:  # all has been compiled
                warm = server.traces.copy()
                begin, before = time.perf_counter(), server.decoded
        used.append(server.pages_used)
        if step % 25 == 0:
            print(f"step {step:4}: {len(server.running)} running, {len(waiting)} waiting, "
                  f"{used[-1]} of {pages} pages", flush=True)  # fmt: skip
        step += 1
    seconds = time.perf_counter() - begin
    assert server.traces == warm, "something was compiled again"
    assert server.pages_used == 0, "a page was lost"
    check(params, all_of_them, prompts)
    print(
        f"{requests} requests in {step} steps: {server.prefilled:,} bytes prefilled, "
        f"{server.decoded:,} decoded, {(server.decoded - before) / seconds:,.0f} a second"
    )
    print(
        f"pages in use: {np.mean(used):.1f} of {pages} on average, {max(used)} at most; "
        f"{server.preempted} times a sequence made place for others"
    )
    print(f"compiled once each: {', '.join(sorted(warm))}; all texts are the training forward's")
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=24, help="how many come, one after another")
    parser.add_argument("--slots", type=int, default=4, help="sequences decoded at one time")
    parser.add_argument("--pages", type=int, default=36, help="pages of 16 bytes, for all of them")
    parser.add_argument("--speculate", type=int, choices=range(1, 17), default=1, metavar="BYTES",
                        help="of a sequence in one step, 1 to 16")  # fmt: skip
    parser.add_argument("--steps", type=int, default=0,
                        help="train first, for so many steps; else texts are noise")  # fmt: skip
    main(**vars(parser.parse_args()))
