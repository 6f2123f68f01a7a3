"""The second half of SmolLM-Instruct v0.1 as published: one epoch of dpo-mix-7k."""

from dataclasses import replace

from config.smol_135m_dpo import RECIPE
from config.smol_360m_sft import config as sft

config = replace(sft, init_from=f"{sft.out_dir}/sft", **(RECIPE | {"data": (("dpo-mix-7k", 1.0),)}))
