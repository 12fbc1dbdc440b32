"""Native Sparse Attention's decode step for JAX."""

import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any

# In a source tree, which has no compiled library, Python finds the installed package's.
__path__ = pkgutil.extend_path(__path__, __name__)

from jax_nsa import native
from jax_nsa.native import RELEASE, export_disabled_checks

__version__ = RELEASE

__all__ = [
    "PagePools",
    "PageTables",
    "PagedKV",
    "block_positions",
    "export_disabled_checks",
    "nsa_attention",
    "nsa_compress",
    "nsa_compress_attention_infer",
    "nsa_compress_infer",
    "nsa_decode_step",
    "nsa_select_attention_infer",
    "nsa_window_attention_infer",
]

# A process that imports jax_nsa can run the programs that another one exported.
native.register()

if TYPE_CHECKING:
    from jax_nsa.cache import PagePools
    from jax_nsa.compress.door import nsa_compress_infer
    from jax_nsa.compress_attention.door import nsa_compress_attention_infer
    from jax_nsa.pages import PageTables
    from jax_nsa.positions import block_positions
    from jax_nsa.select_attention.door import nsa_select_attention_infer, nsa_window_attention_infer
    from jax_nsa.step import PagedKV, nsa_decode_step
    from jax_nsa.training import nsa_attention, nsa_compress
else:
    # All else is found when it is first named, by the imports above.
    _HOMES = {
        "PagePools": "cache",
        "PageTables": "pages",
        "PagedKV": "step",
        "block_positions": "positions",
        "nsa_attention": "training",
        "nsa_compress": "training",
        "nsa_compress_attention_infer": "compress_attention.door",
        "nsa_compress_infer": "compress.door",
        "nsa_decode_step": "step",
        "nsa_select_attention_infer": "select_attention.door",
        "nsa_window_attention_infer": "select_attention.door",
    }

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif (
            name.isidentifier()
            and name[0] != "_"
            and importlib.util.find_spec(f"{__name__}.{name}")
        ):
            found = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
