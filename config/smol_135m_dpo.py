"""The second half of SmolLM-Instruct v0.1 as published: one epoch of HelpSteer, best against worst answer."""

from dataclasses import replace

from config.smol_135m_sft import config as sft

RECIPE = dict(  # shared by all three sizes; the 360M used other pairs
    train_on_prompts=False, data=(("helpsteer", 1.0),),
    dpo_beta=0.05, dpo_max_length=1024, dpo_max_prompt_length=512,
    lr=5e-7, batch=128, micro_batch=2, val_fraction=0.05,
    eval_every=20, save_every=20, sample_every=20,
)

config = replace(sft, init_from=f"{sft.out_dir}/sft", **RECIPE)
