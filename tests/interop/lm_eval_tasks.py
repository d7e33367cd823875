"""Tiny models of transformers with tokenizers of their own, and lm-eval tasks in local files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ["the", "model", "reads", "a", "row", "of", "tokens", "and", "learns", "what", "follows", "from", "größer"]
BEGIN, END = "<s>", "</s>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def texts(count: int = 200) -> list[str]:
    rng = random.Random(0)
    return [sentence(rng, rng.randint(4, 12)) + ". 日本 naïve" * (n % 7 == 0) for n in range(count)]


def byte_level(size: int) -> Any:
    """As GPT-2's: BPE over bytes, one special token for begin and end, none put before a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)  # pyright: ignore
    made.train_from_iterator(texts(), trainer)
    both = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **both)


def sentence_piece_like(size: int) -> Any:
    """As LLaMA's: BPE with spaces as U+2581 and unknown characters in bytes, BOS put before a text, a chat template."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # pyright: ignore
    fallback = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(fallback)  # pyright: ignore
    special = ["<unk>", BEGIN, END, *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special)  # pyright: ignore
    pieces = [piece for text in texts() for piece in text.replace(" ", " \u2581").split(" ")]
    made.train_from_iterator(pieces, trainer)
    template = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, made.token_to_id(BEGIN))])
    made.post_processor = template  # pyright: ignore
    named = {"eos_token": END, "bos_token": BEGIN, "unk_token": "<unk>", "pad_token": END}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named, chat_template=CHAT)


def byte_level_behind_bos(size: int) -> Any:
    """As LLaMA 3's: BPE over bytes, BOS put before a text."""
    made = byte_level(size).backend_tokenizer
    made.add_special_tokens([BEGIN, END])
    template = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, made.token_to_id(BEGIN))])
    made.post_processor = template
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, bos_token=BEGIN)


def word_pieces(size: int) -> Any:
    """As BERT's: lower case, no spaces, what is unknown is one token; nothing put before a text."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))  # pyright: ignore
    made.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    made.decoder = decoders.WordPiece()  # pyright: ignore
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["<unk>", END])  # pyright: ignore
    made.train_from_iterator(texts(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token=END)


TOKENIZERS = {
    "gpt2": byte_level,
    "llama": sentence_piece_like,
    "mistral": byte_level_behind_bos,
    "bloom": word_pieces,
}


def write_model(folder: Path, kind: str, *, layers: int = 2, width: int = 32, length: int = 128, rows: int = 0) -> Path:
    """A random model of `kind` (of TOKENIZERS) and its tokenizer, as transformers saves them.

    rows: of the embedding table, the tokenizer's size at least.
    """
    tokenizer = TOKENIZERS[kind](400)
    ids = {
        "vocab_size": max(rows, len(tokenizer)),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    heads = width // 8 if width < 256 else 8
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
    elif kind == "bloom":
        sizes = {"hidden_size": width, "n_layer": layers, "n_head": heads}
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"num_key_value_heads": heads // 2, "intermediate_size": 8 * width // 3 // 8 * 8}
        sizes |= {"max_position_embeddings": length} | ({"sliding_window": 16} if kind == "mistral" else {})
    config = transformers.AutoConfig.for_model(kind, **ids, **sizes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far enough from where initialisation leaves it that probabilities differ
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.8 + 0.1 * noise if parameter.ndim == 1 else noise * 1.2 / width**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """A task's documents and its definition, as files."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(common | settings))  # JSON is YAML


def write_tasks(folder: Path, count: int = 12, shots: int = 2, words: int = 8) -> list[str]:
    """One task of each request type; their names."""
    rng = random.Random(1)
    rows = [
        {
            "question": sentence(rng, words) + " 日本" * (n % 5 == 0),
            "choices": [sentence(rng, rng.randint(1, 4)) for _ in range(4)],
            "answer": rng.randrange(4),
            "text": " ".join(sentence(rng, 12) for _ in range(1 + 3 * (n % 4))),
        }
        for n in range(count)
    ]
    asked = {"doc_to_text": "Question: {{question}}\nAnswer:", "num_fewshot": shots}
    choice = {"output_type": "multiple_choice", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    write_task(folder, "tiny_cloze", rows, asked | choice | {"doc_to_choice": "{{choices}}"})
    listed = "{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\n{% endfor %}"
    letters = {"doc_to_text": "{{question}}\n" + listed + "Answer:", "doc_to_choice": ["A", "B", "C", "D"]}
    write_task(folder, "tiny_letters", rows, asked | choice | letters)
    last = {"doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}"}
    scored = [{"metric": "perplexity"}, {"metric": "acc"}]
    write_task(folder, "tiny_last_word", rows, last | {"output_type": "loglikelihood", "metric_list": scored})
    whole = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    write_task(folder, "tiny_rolling", rows, whole | {"output_type": "loglikelihood_rolling"})
    until = {"until": ["\n", " from"], "max_gen_toks": 12, "do_sample": False}
    written = {"doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "exact_match"}]}
    write_task(
        folder, "tiny_written", rows, asked | written | {"output_type": "generate_until", "generation_kwargs": until}
    )
    return ["tiny_cloze", "tiny_letters", "tiny_last_word", "tiny_rolling", "tiny_written"]
