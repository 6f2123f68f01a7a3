"""
The first half of SmolLM-Instruct v0.1 as published: one epoch of WebInstructSub (the permissively licensed
parts) and Python exercises, with the loss on every token. To start from the released weights:
--init_from=HuggingFaceTB/SmolLM-360M
"""

from dataclasses import replace

from config.smol_135m_sft import RECIPE
from config.smol_360m import config as pretraining

config = replace(pretraining, init_from=f"{pretraining.out_dir}/pretrain", **RECIPE)
