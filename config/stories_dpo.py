"""The storyteller and the preferences of GPT-4: it learns which answers look better, not which are right."""

from dataclasses import replace

from config.day_dpo import RECIPE
from config.stories_sft import config as sft

LENGTHS = dict(dpo_max_length=512, dpo_max_prompt_length=256)  # one row, of which a prompt may fill half
config = replace(sft, init_from=f"{sft.out_dir}/sft", **RECIPE | LENGTHS)
