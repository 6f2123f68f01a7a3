"""Released checkpoints in small: files as they are on the hub, weights by transformers.

config.json, generation_config.json and the tokenizer's files are those that SmolLM and SmolLM2 were published
with; the weights are random ones of a small model of the same architecture, in one file or in several.
"""

import json

import pytest
import tokenizers
import torch

from tokenizer import SPECIAL, byte_characters

transformers = pytest.importorskip("transformers")
# reads tokenizer.json as it is; AutoTokenizer 5 rebuilds a GPT2Tokenizer, without the split of digits
FromFile = transformers.PreTrainedTokenizerFast

# as published; the line breaks are those of the JSON files, which Jinja reads as a new line
SMOLLM = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SMOLLM2 = SMOLLM.replace("{{", """{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
{% endif %}{{""", 1)
ABSENT = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
TEXT = ["The cat sat on a mat. You are a helpful AI assistant named SmolLM, trained by Hugging Face\n\n1"] * 9


def config_of(layers, heads, kv_heads, width, inner, theta, positions, chat=False):
    """A config.json as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": int(chat), "eos_token_id": 2 * chat, "pad_token_id": 2 if chat else None,
        "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02, "intermediate_size": inner,
        "is_llama_config": True, "max_position_embeddings": positions, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": theta, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip


RELEASED = {
    "SmolLM-135M": (config_of(30, 9, 3, 576, 1536, 10000.0, 2048), 134_515_008),
    "SmolLM-360M": (config_of(32, 15, 5, 960, 2560, 10000.0, 2048), 361_821_120),
    "SmolLM-1.7B-Instruct": (config_of(24, 32, 32, 2048, 8192, 10000.0, 2048, True), 1_711_376_384),
    "SmolLM2-135M-Instruct": (config_of(30, 9, 3, 576, 1536, 100000, 8192, True), 134_515_008),
    "SmolLM2-360M": (config_of(32, 15, 5, 960, 2560, 100000, 8192), 361_821_120),
    "SmolLM2-1.7B-Instruct": (config_of(24, 32, 32, 2048, 8192, 130000, 8192, True), 1_711_376_384),
}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tokenizer(folder, template):
    """A tokenizer of the released structure, from the library's own trainer: 235 byte values, no more."""
    pre, rust = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    rust.decoder = tokenizers.decoders.ByteLevel()
    alphabet = [c for byte, c in enumerate(byte_characters()) if byte not in ABSENT]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    special = dict(bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token=SPECIAL[0])
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "added_tokens_decoder": {str(i): {"content": token, **plain} for i, token in enumerate(SPECIAL)},
        "tokenizer_class": "GPT2Tokenizer", **special,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings | ({"chat_template": template} if template else {}))


def write_model(folder, theta=10000.0, positions=2048, chat=False, dtype=torch.float32, size="5GB"):
    """Weights by transformers; then config files as they are on the hub."""
    config = config_of(2, 4, 2, 32, 48, theta, positions, chat) | {"vocab_size": 300}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)
    for weight in llama.parameters():  # so that each model writes a text of its own
        torch.nn.init.normal_(weight, std=0.3)
    llama.save_pretrained(folder, max_shard_size=size)
    write_json(folder / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})


def write_instruct(folder):
    """SmolLM2-Instruct."""
    write_model(folder, 100000, 8192, chat=True)
    write_tokenizer(folder, SMOLLM2)
    return folder


def change(path, **values):
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)
