"""A Llama of two layers with a byte-level tokenizer, made on the spot."""

from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, LAYERS = 32, 64, 4, 2, 2
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat: bool = True, begins: bool = False) -> Any:
    """One token a byte, and the special tokens of ChatML; with `begins` one of them is put before
    every text, as Llama's tokenizer does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if begins:
        begin = SPECIAL[1]
        raw.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, vocabulary[begin])]
        )
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocabulary: int, seed: int = 0) -> Any:
    """Random weights, large enough that every layer matters to the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def write_model(folder: Path, chat: bool = True, seed: int = 0, begins: bool = False) -> Path:
    """Saves model and tokenizer as transformers does."""
    tokenizer = make_tokenizer(chat, begins)
    make_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
