"""MegaSpark: text in, a trained Llama out, on one CPU or 512 GPUs, from one config."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout kernels/, data_prep/, tools/ and ds_configs/ lie beside this folder and are imported as megaspark.kernels and
# so on; an installed wheel holds them inside the package already (setup.cfg maps them).
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
