"""The second half of SmolLM-Instruct v0.1 as published: one epoch of HelpSteer, best against worst answer."""

from dataclasses import replace

from config.smol_1p7b_sft import config as sft
from config.smol_135m_dpo import RECIPE

config = replace(sft, init_from=f"{sft.out_dir}/sft", **RECIPE)
