"""Which keys of a config.json say nothing about the function that a model computes. Data only.

A family reads the keys that it knows. Of the others, these are without meaning to a forward pass; any other one that
says something is refused, since a key that is passed over can make a silently different model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WORDS = """
architectures auto_map model_type transformers_version torch_dtype dtype torchscript use_bfloat16 name_or_path license
unsloth_fixed unsloth_version transformers.js_config

initializer_range init_std init_device embedding_init_std emb_init_std use_mup_init
dropout attention_dropout hidden_dropout activation_dropout resid_pdrop embd_pdrop attn_pdrop resid_dropout
classifier_dropout attention_probs_dropout_prob hidden_dropout_prob layerdrop embd_dropout
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj

bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id unk_index prefix
begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id bad_words_ids
task_specific_params problem_type num_labels id2label label2id finetuning_task tokenizer_class
do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences penalty_alpha
diversity_penalty early_stopping length_penalty repetition_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size
exponential_decay_length_penalty max_length min_length max_new_tokens output_scores remove_invalid_values
return_dict_in_generate

use_cache return_dict output_attentions output_hidden_states gradient_checkpointing chunk_size_feed_forward
pretraining_tp use_flash_attn use_flash_attention_2 attn_implementation model_parallel is_decoder
skip_bias_add skip_bias_add_qkv masked_softmax_fusion bias_dropout_fusion scale_mask_softmax_fusion offset_alibi
attention_softmax_in_fp32 reorder_and_upcast_attn
max_position_embeddings original_max_position_embeddings model_max_length max_sequence_length n_ctx seq_length
n_positions training_seqlen
"""
NEUTRAL = frozenset(_WORDS.split())
"""Of all families: names, initialisation, dropout (none in evaluation), generation, how transformers runs a model."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
}
"""Of all families: keys that change a model in ways palmjax does not have, with the values that do not."""


class Read(dict[str, Any]):
    """A config.json that remembers which of its keys were looked at."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)


def unknown(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Keys that say something, and nobody knows what. False and None are taken for a thing that is not there."""
    known = NEUTRAL | set(known) | set(REFUSED)
    return [
        key
        for key, value in config.items()
        if not (key in known or key.startswith("_") or value is None or value is False)
    ]
