"""The evening's model and the preferences of GPT-4 in UltraFeedback."""

from dataclasses import replace

from config.day_dpo import RECIPE
from config.evening_sft import config as sft

config = replace(sft, init_from=f"{sft.out_dir}/sft", **RECIPE)
