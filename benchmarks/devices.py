"""How throughput grows with devices: sequences, or heads, split over all there are.

    python -m benchmarks.devices b128

Checks that the split program gives what one device gives, up to rounding, then times programs of
many calls on one device and on all.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.compress_attention import BENCHMARK
from jax_nsa.shapes import SHAPES

# Which axes of (query, key, value, block table, lengths) are split.
SPLITS = {
    "sequences": (("all",), (), (), ("all",), ("all",)),
    "heads": ((None, None, "all"), (None, None, "all"), (None, None, "all"), (), ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.devices", description=__doc__)
    parser.add_argument("shape", nargs="?", default="b128", choices=BENCHMARK.shapes)
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    devices = jax.devices()
    print(f"{arguments.shape}, {shape}")
    print(f"on {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}")

    sets = BENCHMARK.operands(shape)
    run = BENCHMARK.call(shape, None)
    expected = jax.jit(run)(*sets[0])
    alone = measure.DeviceTimer({"alone": run}, sets)
    one = statistics.median(alone.sample("alone", i) for i in range(arguments.repeat))
    print(f"one device   {one * 1e6:10.1f} us a call")
    del alone
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    for split, specs in SPLITS.items():
        shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
        placed = [tuple(map(jax.device_put, operands, shardings)) for operands in sets]
        attention, indices = jax.jit(run)(*placed[0])
        # A part may be summed in another order than the whole.
        np.testing.assert_allclose(
            np.float32(attention), np.float32(expected[0]), rtol=2**-7, atol=1e-3
        )
        same = np.mean(np.asarray(indices) == np.asarray(expected[1]))
        assert same > 0.999, f"only {same:.2%} of the blocks are the same"
        timer = measure.DeviceTimer({split: run}, placed)
        every = statistics.median(timer.sample(split, i) for i in range(arguments.repeat))
        print(f"{split:12} {every * 1e6:10.1f} us a call, {one / every:.2f} times the throughput")
        del timer, placed


if __name__ == "__main__":
    main()
