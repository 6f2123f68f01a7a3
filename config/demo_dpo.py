"""The demo learns what people prefer: answers that are right, polite and complete, and that end."""

from dataclasses import replace

from config.demo_sft import config as sft

config = replace(
    sft,
    init_from="out/demo/sft", data=(("builtin-pairs", 1.0),),  # balanced by length. why: unbalanced
    doc_mask=False,  # each answer has a row of its own, so there is nothing to mask
    dpo_beta=0.3,  # tuned: above SmolLM's 0.05, to stay closer to the reference. why: beta_0.03, beta_3
    dpo_max_length=256, dpo_max_prompt_length=128,  # one row, of which a question may fill half
    epochs=1, batch=32, micro_batch=32,  # a quarter of SmolLM-Instruct's 128 pairs, for four times the steps
    optimizer="adamw", lr=2e-5,  # tuned: far below SFT's rate, as in SmolLM-Instruct (5e-7 after 3e-4)
    warmup_ratio=0.1, schedule="cosine",  # as in SmolLM-Instruct
    eval_every=25, eval_batches=4, save_every=50, sample_every=0,  # the run has some 70 steps
)
