"""A step on 2, 4 and 8 devices gives what one gives, and says to the others only what it must."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from jax_nsa import native

REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.append(str(REPOSITORY))
from benchmarks.scaling import collectives, series  # noqa: E402
from benchmarks.scaling import problem as scaled  # noqa: E402

pytestmark = pytest.mark.timeout(300)

HEADS, KEY_VALUE_HEADS, VALUE_SIZE, ROWS = 16, 8, 8, 8  # of tests/scaling_program.py
ROUNDING = 2e-6  # of float32, beside attentions of about 0.2


@functools.cache
def found(implementation):
    """What tests/scaling_program.py prints."""
    program = pathlib.Path(__file__).with_name("scaling_program.py")
    done = subprocess.run(
        [sys.executable, str(program), implementation], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["cpu", "reference"])
def implementation(request):
    for operator in ("compress", "compress_attention", "select_attention"):
        reason = native.unavailable("cpu", operator)
        if request.param == "cpu" and reason is not None:
            pytest.skip(reason)
    return request.param


def test_sequences_and_heads_split_without_a_word(implementation):
    apart = [program for program in found(implementation) if program["split"][2] == 1]
    assert {sequences * heads for sequences, heads, _ in (p["split"] for p in apart)} == {2, 4, 8}
    for program in apart:
        assert program["collectives"] == []
        for name, part in program["parts"].items():
            assert part["same_ids"], (program["split"], name)
            assert part["spread"] > 0.05
            assert part["error"] < ROUNDING, (program["split"], name)
            # XLA multiplies matrices of other sizes in another order.
            if implementation == "cpu" or name == "compress":
                assert part["same_bits"], (program["split"], name)


def test_split_pages_are_merged_by_few_reductions(implementation):
    """Of which neither number nor size depends on how many devices there are."""
    together = [program for program in found(implementation) if program["split"][2] > 1]
    blocks = 1 + -(-(256 * 16 + 31) // 64)  # of all that devices could hold, and one before them
    # Three numbers of each head beside its attention and its group's importances.
    compressed = HEADS * (VALUE_SIZE + 3) + KEY_VALUE_HEADS * blocks
    selected = 2 * HEADS * (VALUE_SIZE + 3)
    most = {
        "compressed": (3, compressed), "selected": (2, selected),
        "step": (5, compressed + selected),
    }  # fmt: skip
    for program in together:
        sequences, heads, _ = program["split"]
        ((name, part),) = program["parts"].items()
        kinds, sizes = zip(*program["collectives"], strict=True)
        assert set(kinds) == {"all-reduce"}
        assert len(kinds) <= most[name][0]
        assert 0 < sum(sizes) <= ROWS * 4 * most[name][1] // (sequences * heads)
        assert part["same_ids"]
        assert part["error"] < ROUNDING
        assert part["spread"] > 0.05


# What the benchmark says.


def test_collectives_are_counted():
    text = """
      %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
      %b = (f32[4]{0}, s32[]) all-reduce(%x, %y), to_apply=%add
      %c = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%x), dimensions={0}
      ROOT %d = bf16[16]{0} all-gather-done(%c)
      %e = pred[5]{0} collective-permute(%p), source_target_pairs={{0,1}}
      %all-reduce.7 = f32[9]{0} add(%all-reduce.6, %a)
    """
    assert [(c.kind, c.bytes) for c in collectives.collectives(text)] == [
        ("all-reduce", 24), ("all-reduce", 20), ("all-gather", 32), ("collective-permute", 5),
    ]  # fmt: skip


@pytest.mark.parametrize("quick", [True, False])
def test_series_keep_the_step_or_a_devices_share(quick):
    every = series.all_series([1, 2, 4, 8], quick)
    assert {(s.split, s.strong) for s in every} == {(n, b) for n in series.SPLITS for b in (0, 1)}
    for one in every:
        first = one.points[1].shape
        for devices, (shape, split) in ((n, (p.shape, p.split)) for n, p in one.points.items()):
            assert split.devices == devices
            work, alone = (scaled.floors(s)["compressed"] for s in (shape, first))
            growth = 1 if one.strong else devices
            assert work == pytest.approx(growth * alone, rel=1e-3)
            for size, parts in (
                (shape.sequences, split.sequences), (shape.key_value_heads, split.heads),
            ):  # fmt: skip
                assert size % parts == 0
    lengths = {int(point.shape.tokens[0]) for one in every for point in one.points.values()}
    assert max(lengths) == (128 << 10 if quick else 8 << 20)


def test_efficiency_is_one_where_devices_add_up():
    for one in series.all_series([1, 2, 4], False):
        perfect = {p: 1 / n if one.strong else 1.0 for n, p in one.points.items()}
        assert all(one.efficiency(n, perfect) == 1 for n in one.points)
        slow = perfect | {one.points[2 if 2 in one.points else 4]: 2.0}
        assert min(one.efficiency(n, slow) for n in one.points) < 1


@pytest.mark.parametrize("context", [1, 2, 8])
@pytest.mark.parametrize("sequences", [1, 4])
def test_pages_of_a_device_are_each_in_one_place(sequences, context):
    """In all sets together, every device's tables name its whole pool once."""
    split = scaled.Split(sequences=sequences, context=context)
    tables = scaled._tables(4, 16, 3, split, steps=3)
    for rows in range(0, 4, 4 // sequences):
        for column in range(0, 16, 16 // context):
            mine = tables[:, rows : rows + 4 // sequences, column : column + 16 // context]
            assert sorted(mine.ravel()) == list(range(mine.size))


def test_what_it_says(tmp_path):
    pytest.importorskip("matplotlib", reason="install the extra: pip install '.[examples]'")
    output, picture = tmp_path / "report.json", tmp_path / "picture.png"
    command = [sys.executable, "-m", "benchmarks.scaling"]
    measured = subprocess.run(
        [*command, "--quick", "--cpu-devices", "2", "--split", "context", "--output", str(output)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert measured.returncode == 0, measured.stdout + measured.stderr
    again = subprocess.run(
        [*command, str(output), "--plot", str(picture)], cwd=REPOSITORY, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert again.stdout == measured.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(output.read_text())["series"]
    several = [row for row in rows if row["devices"] > 1]
    assert len(several) == 6  # two strong, one weak, of two parts
    for row in several:
        assert row["held_to_one_device"]
        assert f"| {row['seconds'] * 1e6:.1f} | {row['efficiency']:.2f} |" in measured.stdout
        assert row["collectives"]
