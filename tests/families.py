"""Tiny models of the families in conf/model/, saved as the hub keeps the real ones: same files, same special tokens.

Weights are random; vocabularies have a few hundred entries. What each repository's files say was read from public
listings of them; the chat templates are written from the documented formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

TEXTS = [
    *(f"Question: Which {word} is number {i}?\nAnswer: {word} {WORDS[i - 1]}" for i, word in enumerate(WORDS)),
    "[INST] Which [/INST] <<SYS>>\nPlease\n<</SYS>>\n\n system user assistant You are a helpful assistant.",
    "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\n Qwen, created by Alibaba Cloud.",
]
SPLIT = (  # Llama-3's, Qwen2's takes digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (head if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' "
    "+ (date_string or '26 Jul 2024') + '\n\n' + said + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What its tests have to know of a tiny model: where it is, and its ids as the hub's files give them."""

    name: str  # of conf/model/<name>.yaml
    folder: Path
    bos: int | None  # what its tokenizer puts before every text
    end: int  # what ends a turn
    pad: int  # what ours is to pad with
    rows: int  # of its embedding
    ends: frozenset[int]  # what generation stops at


def family(name: str, folder: Path) -> Family:
    """Write the tiny counterpart of conf/model/<name>.yaml to `folder`."""
    folder.mkdir(parents=True)
    kind = {
        "opt_1p3b": _opt,
        "phi1p5": _phi,
        "llama2_7b": _llama2,
        "llama2_7b_chat": _llama2,
        "llama3p2_1b_instruct": _llama3,
        "qwen2p5_1p5b_instruct": _qwen,
    }[name]
    return kind(name, folder)


def _opt(name: str, folder: Path) -> Family:
    """facebook/opt-1.3b: vocab.json and merges.txt, no tokenizer.json; </s> begins and ends texts; 7 rows to spare."""
    vocab, merges = _byte_bpe(first=["<s>", "<pad>", "</s>", "<unk>"])
    _write_bpe(folder, vocab, merges)
    tokens = {key: _added(content, normalized=True) for key, content in _named("</s>", "</s>", "<pad>", "</s>").items()}
    _write(
        folder / "tokenizer_config.json",
        {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, **tokens},
    )
    _write(folder / "special_tokens_map.json", tokens)
    rows = len(vocab) + 7
    config = {
        "model_type": "opt", "vocab_size": rows, "ffn_dim": 48, "word_embed_proj_dim": 32,
        "max_position_embeddings": 512, "prefix": "</s>", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.2, "dropout": 0.0,
    }  # fmt: skip
    _model(folder, config, {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
    return Family(name, folder, bos=2, end=2, pad=1, rows=rows, ends=frozenset({2}))


def _phi(name: str, folder: Path) -> Family:
    """microsoft/phi-1_5: GPT-2's vocabulary, blanks as added tokens, one special token, far more rows than tokens."""
    vocab, merges = _byte_bpe(last=["<|endoftext|>"])
    _write_bpe(folder, vocab, merges)
    end = vocab["<|endoftext|>"]
    tokenizer = _byte_tokenizer(vocab, merges)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    blanks = [" " * count for count in range(5, 1, -1)]
    tokenizer.add_tokens([AddedToken(blank, normalized=True) for blank in blanks])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "added_tokens.json", {blank: len(vocab) + i for i, blank in enumerate(blanks)})
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _write(folder / "special_tokens_map.json", named)
    settings = {"add_prefix_space": False, "model_max_length": 2048, "tokenizer_class": "CodeGenTokenizer", **named}
    _write(folder / "tokenizer_config.json", settings)
    rows = len(vocab) + 40
    config = {
        "model_type": "phi", **SIZES, "vocab_size": rows, "intermediate_size": 48, "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    _model(folder, config, {})
    pad = len(vocab) + len(blanks)  # a new token, for which there is a row
    return Family(name, folder, bos=None, end=end, pad=pad, rows=rows, ends=frozenset({end}))


def _llama2(name: str, folder: Path) -> Family:
    """meta-llama/Llama-2-7b: SentencePiece pieces with bytes to fall back on, no pad, no row to spare, in shards."""
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    learnt = Tokenizer(kinds.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    pieces, merges = _model_of(learnt)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(pieces, key=pieces.get)]  # type: ignore[arg-type]
    vocab = {piece: i for i, piece in enumerate(names)}
    tokenizer = Tokenizer(kinds.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = _named("<s>", "</s>", None, "<unk>")
    settings = {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "model_max_length": 10**30, "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
        **{key: value and _added(value) for key, value in named.items()},
    }  # fmt: skip
    settings |= {"chat_template": LLAMA2_CHAT} if name.endswith("chat") else {}
    _write(folder / "tokenizer_config.json", settings)
    config = {
        "model_type": "llama", **SIZES, "vocab_size": len(vocab), "intermediate_size": 48, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": 0}
    _model(folder, config, {"bos_token_id": 1, "eos_token_id": 2, **sampling}, max_shard_size="40KB")
    return Family(name, folder, bos=1, end=2, pad=0, rows=len(vocab), ends=frozenset({2}))


def _llama3(name: str, folder: Path) -> Family:
    """meta-llama/Llama-3.2-1B-Instruct: a turn ends in <|eot_id|>, no pad is named, tied embeddings, scaled rope."""
    special = (
        "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
        "<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
        "<|eot_id|> <|python_tag|>"
    ).split()
    vocab, merges = _byte_bpe()
    tokenizer = _byte_tokenizer(vocab, merges, SPLIT)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    ids = {token: tokenizer.token_to_id(token) for token in special}
    bos = ids["<|begin_of_text|>"]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", bos)]),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "added_tokens_decoder": {str(ids[token]): _decoded(token) for token in special},
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_CHAT,
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", {key: settings[key] for key in ("bos_token", "eos_token")})
    ends = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    rows = tokenizer.get_vocab_size()
    config = {
        "model_type": "llama", **SIZES, "vocab_size": rows, "intermediate_size": 48, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 1024, "bos_token_id": bos, "eos_token_id": ends,
        "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    _model(folder, config, {"bos_token_id": bos, "eos_token_id": ends, **sampling})
    pad = ids["<|finetune_right_pad_id|>"]
    return Family(name, folder, bos=bos, end=ids["<|eot_id|>"], pad=pad, rows=rows, ends=frozenset(ends))


def _qwen(name: str, folder: Path) -> Family:
    """Qwen/Qwen2.5-1.5B-Instruct: no beginning, <|im_end|> ends a turn, settings that penalise repetition."""
    special = "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>".split()
    vocab, merges = _byte_bpe()
    _write_bpe(folder, vocab, merges)
    tokenizer = _byte_tokenizer(vocab, merges, SPLIT.replace("{1,3}", ""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in special}
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "chat_template": CHATML,
        "added_tokens_decoder": {str(ids[token]): _decoded(token) for token in special},
        "additional_special_tokens": special[1:], "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", settings)
    text, end = ids["<|endoftext|>"], ids["<|im_end|>"]
    rows = tokenizer.get_vocab_size() + 11
    config = {
        "model_type": "qwen2", **SIZES, "vocab_size": rows, "intermediate_size": 48, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "bos_token_id": text, "eos_token_id": end, "tie_word_embeddings": True,
    }  # fmt: skip
    sampling = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    _model(folder, config, {"bos_token_id": text, "eos_token_id": [end, text], "pad_token_id": text, **sampling})
    return Family(name, folder, bos=None, end=end, pad=text, rows=rows, ends=frozenset({end, text}))


def _byte_bpe(first: list[str] = [], last: list[str] = []) -> tuple[dict[str, int], list[Any]]:  # noqa: B006
    """A byte-level vocabulary of TEXTS with `first` and `last` around it, and its merges."""
    learnt = Tokenizer(kinds.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    pieces, merges = _model_of(learnt)
    names = [*first, *sorted(pieces, key=lambda piece: pieces[piece]), *last]
    return {piece: i for i, piece in enumerate(names)}, merges


def _byte_tokenizer(vocab: dict[str, int], merges: list[Any], split: str | None = None) -> Tokenizer:
    """Pieces of bytes within the words that `split` makes, None: GPT-2's."""
    tokenizer = Tokenizer(kinds.BPE(vocab, merges, ignore_merges=split == SPLIT))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    words = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _model_of(learnt: Tokenizer) -> tuple[dict[str, int], list[Any]]:
    model = json.loads(learnt.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _write_bpe(folder: Path, vocab: dict[str, int], merges: list[Any]) -> None:
    _write(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _named(bos: str, eos: str, pad: str | None, unk: str) -> dict[str, Any]:
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}


def _added(content: str, normalized: bool = False) -> dict[str, Any]:
    return {"__type": "AddedToken", **_flags(content), "normalized": normalized}


def _decoded(content: str) -> dict[str, Any]:
    return {**_flags(content), "normalized": False, "special": True}


def _flags(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _model(folder: Path, config: dict[str, Any], generation: dict[str, Any], max_shard_size: str = "1GB") -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too, so that each counts
            p.add_(0.05 * torch.randn_like(p))
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
