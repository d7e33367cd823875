"""A folder as transformers' `save_pretrained` leaves it: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError, section
from palmjax.data.vocabulary import HuggingFace, PassThrough, SentencePiece, Vocabulary
from palmjax.interop import safetensors_files
from palmjax.interop.huggingface import families
from palmjax.interop.huggingface.family import Family
from palmjax.interop.mapping import Tensor, check_tensors
from palmjax.models.decoder import Decoder

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
"""Files that travel along as they are."""

FLOATS = ("F32", "BF16", "F16")
HEADS = (r"^(lm_head|embed_out)\.weight$",)
"""The copy of the token table that old files store for a tied head."""


@section
class Folder:
    """A model of transformers, found whole. tensors: by the names of `planned`, wherever the files put a prefix."""

    path: Path
    family: Family
    config: Mapping[str, Any]
    model: Decoder
    planned: Mapping[str, Tensor]
    tensors: Mapping[str, safetensors_files.Tensor]


def read(path: Path, ignored: Sequence[str] = ()) -> Folder:
    """Reads config.json and the headers of the tensors. Raises ConfigError for anything that does not agree.

    ignored: keys of config.json that may stand there though nobody knows their meaning.
    """
    config = _json(path / "config.json")
    where = str(path / "config.json")
    if "model_type" not in config:
        raise ConfigError(f"{where} has no model_type: it is not the configuration of a transformers model")
    family = families.named(str(config["model_type"]), where)
    model = family.model(config, where, ignored)
    planned = family.plan(model)
    tensors = _with_base(safetensors_files.read_folder(path), family.base)
    ignored = family.ignored + (HEADS if model.head.tied else ())
    check_tensors(planned, tensors, FLOATS, ignored, f"{family.architecture} of {where}")
    return Folder(
        path=path,
        family=family,
        config=config,
        model=model,
        planned=planned,
        tensors={name: tensors[name] for name in planned},
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _with_base(tensors: dict[str, safetensors_files.Tensor], base: str) -> dict[str, safetensors_files.Tensor]:
    """`tensors` under the names of a model with a head: a model saved without one leaves out the prefix."""
    if any(name.startswith(base) for name in tensors):
        return tensors
    return {name if name.startswith(("lm_head.", "embed_out.")) else base + name: t for name, t in tensors.items()}


def max_length(config: Mapping[str, Any]) -> int:
    """Tokens of the longest row that the model was made for."""
    names = ("max_position_embeddings", "n_positions", "seq_length", "n_ctx")
    return next((int(config[name]) for name in names if config.get(name)), 2048)


# --- tokenizers ----------------------------------------------------------------------------------------------------


def vocabulary(path: Path, config: Mapping[str, Any]) -> tuple[Vocabulary, Path | None]:
    """The vocabulary of a folder, and the file it is made from.

    A SentencePiece model is used as it is; else tokenizer.json (library `tokenizers`); without either, ids have no
    text.
    """
    for name in ("tokenizer.model", "spiece.model", "tokenizer.json"):
        if (path / name).exists():
            return vocabulary_of(path / name), path / name
    eos = config.get("eos_token_id")
    return PassThrough(num_ids=int(config["vocab_size"]), eos=eos if isinstance(eos, int) else 1), None


def vocabulary_of(file: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece model or a tokenizer.json. Raises ConfigError if it is neither."""
    if file.suffix == ".json":
        return HuggingFace.read(file)
    try:
        return SentencePiece(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from error


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Files from which transformers makes the tokenizer of a vocabulary; none for bytes and bare ids."""
    match vocabulary:
        case HuggingFace():
            end, begin = (vocabulary.token(i) for i in (vocabulary.eos_id, vocabulary.bos_id))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": begin}
            return {
                "tokenizer.json": vocabulary.tokenizer,
                "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
            }
        case SentencePiece():
            settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": vocabulary.bos_id > 0}
            return {
                "tokenizer.model": vocabulary.model,
                "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
            }
    return {}
