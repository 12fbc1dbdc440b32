"""The references' sources with what they share, for tests that change them."""

import inspect

from jax_nsa import softmax

_FUTURE = "from __future__ import annotations\n"


def joined(*modules, without=""):
    """Sources one after the other, less an import that the first ones make needless."""
    text = "".join(inspect.getsource(module) for module in modules)
    assert without in text
    return _FUTURE + text.replace(_FUTURE, "").replace(without, "")


def with_softmax(reference):
    """The source of a reference of attention, with that of the softmax in it."""
    source = joined(softmax, reference)
    assert "softmax.over_seen(" in source
    return source.replace("softmax.over_seen(", "over_seen(")
