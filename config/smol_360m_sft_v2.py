"""
SmolLM-360M-Instruct v0.2 as published: other chats, and no preferences. Everyday conversations and basic
facts about the model itself were added because v0.1 answered "hello" with equations.
"""

from dataclasses import replace

from config.smol_360m_sft import config as v1

config = replace(
    v1,
    data=(("magpie-pro", 1.0), ("self-oss-instruct-h4", 1.0), ("openhermes", 0.001),
          ("everyday-conversations", 1.0), ("instruct-data-basics", 1.0)),
    lr=1e-3,
)
