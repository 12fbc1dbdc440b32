"""Which tests must notice a change to which file, chosen to be quick.

They are not all that would. A mutant that lives here may still die elsewhere; one that a reader of
the file would miss should die here. Tests that read the file's source, as test_mutations.py does,
see no mutant.
"""

from __future__ import annotations

import dataclasses

_SANITIZED = ("-O0", "-fsanitize=undefined,address", "-fno-sanitize-recover")
# Threads of the emulated machine jump between stacks, which sanitizers do not know.
_EMULATED = ("-O1", "-Itests/cc/emulated_cuda", "-fno-strict-aliasing", "-Wno-unknown-pragmas")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of tests/cc.

    Attributes:
        test: its main source there.
        sources: what else it consists of.
        options: how it is compiled, from the root.
    """

    test: str
    sources: tuple[str, ...] = ()
    options: tuple[str, ...] = _SANITIZED


def _cpu(operator: str, *, isa: str = "avx512", options: tuple[str, ...] = ()) -> Program:
    """A test of CPU kernels, compiled for one instruction set, which stands for all of them."""
    names = ("sse2", "avx2", "avx512", "amx")
    aliases = (f"-D{name}={isa}" for name in names if name != isa)
    extensions = ("avx2", "fma", "f16c", *(f"avx512{x}" for x in ("f", "bw", "dq", "vl", "bf16")))
    of_operator = (f"cc/cpu/{operator}_{part}.cc" for part in ("isa", "kernel", "run"))
    return Program(
        f"{operator}_cpu_kernel_test.cc",
        ("cc/cpu/isa.cc", *of_operator, *(("cc/cpu/select_rows.cc",) * (operator == "select"))),
        ("-O1", "-ffp-contract=fast", "-Wno-psabi", "-pthread", f"-DJAX_NSA_ISA={isa}", *aliases,
         *(f"-m{extension}" for extension in extensions), *options),
    )  # fmt: skip


PROGRAMS = {
    "selection": Program("selection_test.cc"),
    "geometry": Program("geometry_test.cc"),
    "problem": Program("problem_test.cc"),
    "compressed": _cpu("compress_attention"),
    "tiles": _cpu(
        "compress_attention",
        isa="emulated_amx",
        # Memory is then full of NaN when it is used again: zeros that are missing in it tell.
        options=("-DJAX_NSA_EMULATED_AMX", "-D__SANITIZE_ADDRESS__"),
    ),
    "selected": _cpu("select"),
    "step_cuda": Program("step_cuda_plan_test.cc"),
    "compress_cuda": Program(
        "compress_cuda_kernel_test.cc", ("tests/cc/emulated_cuda/machine.cc",), _EMULATED
    ),
    "select_cuda": Program(
        "select_cuda_kernel_test.cc",
        ("tests/cc/emulated_cuda/machine.cc", "tests/cc/emulated_cuda/select_kernel.cc"),
        _EMULATED,
    ),
}

# Those that include the file.
HEADERS = {
    "cc/selection.h": ("selection",),
    "cc/blocks.h": ("selection",),
    "cc/spans.h": ("geometry",),
    "cc/paged.h": ("problem", "geometry"),
    "cc/compress.h": ("geometry",),
    "cc/compress_attention.h": ("problem", "geometry"),
    "cc/select_attention.h": ("geometry",),
    "cc/cpu/amx.h": ("tiles",),
    "cc/cpu/compress_attention_attend.h": ("compressed", "tiles"),
    "cc/cpu/compress_attention_kernel.cc": ("compressed",),
    "cc/cpu/compress_attention_merge.h": ("compressed",),
    "cc/cpu/compress_attention_run.cc": ("compressed",),
    "cc/cpu/compress_attention_tile.h": ("compressed",),
    "cc/cpu/compress_attention_weights.h": ("compressed", "tiles"),
    "cc/cpu/memory.h": ("compressed",),
    "cc/cpu/operands.h": ("compressed", "selected", "tiles"),
    "cc/cpu/rows.h": ("compressed",),
    "cc/cpu/scores.h": ("compressed",),
    "cc/cpu/select_attend.h": ("selected",),
    "cc/cpu/select_kernel.cc": ("selected",),
    "cc/cpu/select_merge.h": ("selected",),
    "cc/cpu/select_rows.cc": ("selected",),
    "cc/cpu/select_run.cc": ("selected",),
    "cc/cpu/select_softmax.h": ("selected",),
    "cc/cpu/select_tile.h": ("selected",),
    "cc/cpu/top_blocks.h": ("compressed",),
    "cc/cpu/values.h": ("compressed",),
    "cc/cpu/vectors.h": ("compressed", "selected"),
    "cc/cuda/step_plan.h": ("step_cuda",),
    "cc/cuda/compress_kernel.cu": ("compress_cuda",),
    "cc/cuda/select_plan.h": ("select_cuda",),
}

# Programs of the build that are linked with the source.
LINKED = {
    "cc/joint_call.cc": "tests/ffi/step_frames_test",
    "cc/step_call.cc": "tests/ffi/step_frames_test",
}

_REFUSES = "refuses or unchanged"
_ALL_REFUSALS = (
    "test_native_calls.py", "test_compress_cpu.py", "test_select_attention.py", "-k",
    f"{_REFUSES} or fault",
)  # fmt: skip

# Arguments of pytest in tests/.
TESTS = {
    "cc/ffi_call.cc": (*_ALL_REFUSALS[:3], "test_fault_messages.py", "-k",
                       f"{_REFUSES} or fault or vmap"),
    "cc/paged_call.cc": (
        "test_native_calls.py", "test_fault_messages.py", "test_select_attention.py", "-k",
        f"{_REFUSES} or fault or fails or vmap",
    ),
    "cc/compress_attention_call.cc": (
        "test_native_calls.py", "test_fault_messages.py", "-k", f"{_REFUSES} or fails",
    ),
    "cc/select_attention_call.cc": ("test_select_native.py", "test_select_attention.py",
                                    "test_fault_messages.py", "-k",
                                    f"{_REFUSES} or fault or fails or vmap or named"),
    "cc/compress_call.cc": ("test_compress_cpu.py", "test_compress.py", "-k",
                            f"{_REFUSES} or fault or row"),
    "jax_nsa/axes.py": ("test_operator.py",),
    "jax_nsa/blocks.py": ("test_front_door.py", "test_compress_door.py", "-k",
                          "windows or refuse or original or door"),
    "jax_nsa/backends/decode_step.py": ("test_cuda_step.py", "-k", "TestProgram"),
    "jax_nsa/chain.py": ("test_cuda_step.py", "-k", "TestProgram"),
    "jax_nsa/checks.py": ("test_front_door.py", "test_operands.py", "test_integers.py"),
    "jax_nsa/native.py": ("test_native.py", "test_cuda_step.py", "-k",
                          "not refuses and not Gpu"),
    "jax_nsa/paged.py": ("test_front_door.py", "test_compress_door.py", "test_operands.py",
                         "test_integers.py"),
    "jax_nsa/partition.py": ("test_operator.py", "test_meshes.py"),
    "jax_nsa/parts.py": ("test_context_parallel.py", "test_select_composition.py"),
    "jax_nsa/pools.py": ("test_pools.py",),
    "jax_nsa/positions.py": ("test_positions.py",),
    "jax_nsa/primitive.py": ("test_operator.py", "test_composition.py", "test_fault_messages.py",
                             "test_lowering.py", "-k", "not mesh"),
    "jax_nsa/tokens.py": ("test_reference.py", "test_front_door.py", "test_operands.py", "-k",
                          "token or rows or fault or counts"),
    "jax_nsa/cache.py": ("test_cache_refusals.py", "test_interleaved_cache.py", "test_cache.py",
                         "-k", "not dense"),
    "jax_nsa/pages.py": ("test_cache_refusals.py", "test_cache.py", "-k",
                         "tables or history or full or counts"),
    "jax_nsa/compress/problem.py": ("test_compress_door.py",),
    "jax_nsa/compress/window.py": ("test_compress_door.py", "test_compress.py", "-k",
                                   "door or Reference and (forms or faults)"),
    "jax_nsa/compress/reference.py": ("test_compress.py", "-k", "Reference and not any_legal"),
    "jax_nsa/compress_attention/context.py": ("test_context_parallel.py", "test_aligned.py"),
    "jax_nsa/compress_attention/problem.py": ("test_front_door.py",),
    "jax_nsa/compress_attention/reference.py": (
        "test_reference.py", "-k",
        "dtype or forced or equals or mask or fault or zero or padded or peak or ranked",
    ),
    "jax_nsa/select_attention/context.py": ("test_select_composition.py",),
    "jax_nsa/select_attention/arguments.py": ("test_select_door.py", "test_operands.py"),
    "jax_nsa/select_attention/problem.py": ("test_select_door.py",),
    "jax_nsa/select_attention/reference.py": (
        "test_select_attention.py", "-k", "Reference and not (any_legal or heads or dtype)",
    ),
    "jax_nsa/softmax.py": ("test_reference.py", "test_training.py"),
    "jax_nsa/gates.py": ("test_step.py", "test_step_devices.py"),
    "jax_nsa/step.py": ("test_step.py",),
    "jax_nsa/training.py": ("test_training.py",),
}  # fmt: skip
