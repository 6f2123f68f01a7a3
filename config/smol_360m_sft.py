"""
SmolLM-Instruct v0.1 as published, its first half: one epoch of WebInstructSub (the parts that may be used
freely) and Python exercises, with the loss on every token. For the released weights as a start:
--init_from=HuggingFaceTB/SmolLM-360M
"""

from dataclasses import replace

from config.smol_135m_sft import RECIPE
from config.smol_360m import config as pretraining

config = replace(pretraining, init_from=f"{pretraining.out_dir}/pretrain", **RECIPE)
