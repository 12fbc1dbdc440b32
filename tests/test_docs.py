"""What a reader is promised: every public name has shapes, dtypes, errors and a source."""

import dataclasses
import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nsa

ROOT = pathlib.Path(__file__).parent.parent
OPERATIONS = [name for name in jax_nsa.__all__ if name.startswith(("nsa_", "block_"))]
RECORDS = [name for name in jax_nsa.__all__ if inspect.isclass(getattr(jax_nsa, name))]
METHODS = [
    (name, method)
    for name in RECORDS
    for method, member in vars(getattr(jax_nsa, name)).items()
    if not method.startswith("_") and isinstance(member, (classmethod, types.FunctionType))
]


def sections(docstring):
    """The Google-style sections of a docstring, by title; its beginning by the empty one."""
    parts = re.split(
        r"^(Args|Returns|Raises|Attributes):$", inspect.cleandoc(docstring), flags=re.M
    )
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.mark.parametrize("name", jax_nsa.__all__)
def test_is_documented(name):
    told = sections(getattr(jax_nsa, name).__doc__)
    assert told[""].splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", jax_nsa.__all__)
def test_is_on_the_page_of_the_api(name):
    page = (ROOT / "docs" / "api.md").read_text()
    assert re.search(rf"^\.\. auto\w+:: {name}$", page, re.M)


@pytest.mark.parametrize("name", OPERATIONS)
class TestOperations:
    def test_tells_every_argument(self, name):
        function = getattr(jax_nsa, name)
        described = re.findall(r"^    (\w+(?:, \w+)*): ", sections(function.__doc__)["Args"], re.M)
        names = [n for group in described for n in group.split(", ")]
        assert names == list(inspect.signature(function).parameters)

    def test_tells_shapes_and_dtypes(self, name):
        told = sections(getattr(jax_nsa, name).__doc__)
        for section in ("Args", "Returns"):
            assert re.search(r"`?\[[\w, *+'/.-]+\]`?", told[section]), f"no shape in {section}"
        dtype = r"float32|bfloat16|int32|[Ii]ntegers|dtype"
        assert re.search(dtype, told["Args"])
        assert re.search(dtype, told["Returns"])

    def test_tells_errors(self, name):
        told = sections(getattr(jax_nsa, name).__doc__)["Raises"]
        assert {"TypeError", "ValueError"} <= set(re.findall(r"^    (\w+): ", told, re.M))

    def test_tells_its_source(self, name):
        assert "arXiv" in getattr(jax_nsa, name).__doc__


@pytest.mark.parametrize("name", RECORDS)
def test_tells_every_field(name):
    record = getattr(jax_nsa, name)
    told = sections(record.__doc__)["Attributes"]
    described = re.findall(r"^    (\w+): ", told, re.M)
    assert described == [field.name for field in dataclasses.fields(record)]
    assert re.search(r"`\[[\w, *]+\]`", told), "no shape"


@pytest.mark.parametrize(("name", "method"), METHODS, ids=map(".".join, METHODS))
def test_methods_tell_arguments_and_errors(name, method):
    function = getattr(getattr(jax_nsa, name), method)
    told = sections(function.__doc__)
    described = re.findall(r"^    (\w+): ", told["Args"], re.M)
    assert described == [n for n in inspect.signature(function).parameters if n != "self"]
    assert {"TypeError", "ValueError"} <= set(re.findall(r"^    (\w+): ", told["Raises"], re.M))


def pages():
    return [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.exists()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_changes_begin_with_those_of_this_version():
    [first, *_] = re.findall(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == jax_nsa.__version__


def complete_snippets(page):
    """Those that stand by themselves, as a reader would paste them."""
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    complete = [s for s in snippets if "import jax\n" in s]
    assert complete, "no snippet that stands by itself"
    return complete


def run(snippet, page):
    """The names that a snippet leaves."""
    names = {}
    exec(compile(snippet, page, "exec"), names)
    return types.SimpleNamespace(**names)


def assert_close(actual, expected):
    """Within what rounding to bfloat16 and sums in another order explain."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("page", ["README.md", "docs/start.md", "docs/composition.md"])
def test_snippets_run(page):
    for snippet in complete_snippets(page):
        run(snippet, page)


def test_the_step_after_a_prefill_is_the_next_row_of_attention():
    [snippet] = complete_snippets("docs/caches.md")
    its = run(snippet, "docs/caches.md")
    for b, count in enumerate(its.prompts.tolist()):
        query, key, value, gates = (
            jnp.concatenate([rows[b, :count], more[b]])
            for rows, more in (
                (its.query, its.next_query), (its.key, its.next_key), (its.value, its.next_value),
                (its.gates, its.next_gates),
            )
        )  # fmt: skip
        compressed = (
            jax_nsa.nsa_compress(rows, weight, **its.compression)
            for rows, weight in zip((key, value), its.weight, strict=True)
        )
        arrays = (query, key, value, *compressed, gates)
        rows, blocks = jax_nsa.nsa_attention(
            *(x[None] for x in arrays), **its.options, return_blocks=True
        )
        assert_close(its.attention[b, :count], rows[0, :count])
        assert_close(its.next_attention[b], rows[0, count:])
        np.testing.assert_array_equal(its.blocks[b], blocks[0, count:])


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_a_split_step_is_that_of_one_device(axis_type):
    [snippet] = complete_snippets("docs/scaling.md")
    assert snippet.count("AxisType.Auto") == 1
    its = run(snippet.replace("AxisType.Auto", f"AxisType.{axis_type}"), "docs/scaling.md")
    assert its.sequences * its.heads == len(jax.devices())
    # One device numbers the pages of all.
    first = np.arange(its.B)[:, None] // 2 * 2 * its.pages
    whole = [
        dataclasses.replace(cache, block_table=first + cache.block_table)
        for cache in its.arrays[2:]
    ]
    its.step.__globals__["heads"] = 1
    attention, blocks = its.step(*its.arrays[:2], *whole)
    np.testing.assert_array_equal(its.blocks, blocks)
    assert_close(its.attention, attention)
