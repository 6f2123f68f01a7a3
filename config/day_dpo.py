"""
The day's model and the preferences of GPT-4: UltraFeedback, 61,000 prompts with a better and a worse answer.

SmolLM2's recipe. Most of these answers are better than any that a model of this size can write: it learns
their manner, to be to the point and to be complete. The log's accuracy tells whether it does: 0.5 is a coin
toss, and SmolLM2-135M, after 2,000 billion tokens, reached 0.615.
"""

from dataclasses import replace

from config.day_sft import config as sft

RECIPE = dict(  # shared by stories, evening and day; SmolLM2's
    data=(("ultrafeedback-binarized", 1.0),),
    doc_mask=False,  # each answer has a row of its own, so there is nothing to mask
    dpo_beta=0.5, dpo_max_length=1024, dpo_max_prompt_length=512,
    lr=1e-6, batch=128, micro_batch=4, epochs=2,
    val_fraction=0.02,  # 1,200 pairs
    eval_every=50, save_every=200, sample_every=200,
)

config = replace(sft, init_from=f"{sft.out_dir}/sft", **RECIPE)
