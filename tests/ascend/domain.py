"""What CANN's kernel can do of the legal calls."""

from compress_attention.problems import Domain

CANN = Domain(
    dtypes=("bfloat16", "float16"),
    least_length=1,
    least_tokens=1,
    most_tokens=4,
    pads_selection=False,
    returns_lse=False,
    only_canns_choice=True,
)
