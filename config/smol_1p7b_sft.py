"""
The first half of SmolLM-Instruct v0.1 as published: one epoch of WebInstructSub (the permissively licensed
parts) and Python exercises, with the loss on every token. To start from the released weights:
--init_from=HuggingFaceTB/SmolLM-1.7B
"""

from dataclasses import replace

from config.smol_1p7b import config as pretraining
from config.smol_135m_sft import RECIPE

config = replace(pretraining, init_from=f"{pretraining.out_dir}/pretrain", **RECIPE)
