"""SmolLM-360M as published: the recipe of the 135M with a wider and slightly deeper model."""

from dataclasses import replace

from config.smol_135m import config as smol_135m

config = replace(
    smol_135m,
    n_layer=32, n_head=15, n_kv_head=5, d_model=960, d_ff=2560, init_std=0.03227486121839514,
    out_dir="out/smol_360m",
)
