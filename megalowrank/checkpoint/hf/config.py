"""``config.json`` of a Hugging Face model from our shape, and back.

What a model of theirs may have and none of ours computes is refused by name. Dropout changes no function of the
trained model and is not taken over: nothing here is trained with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from megalowrank.checkpoint.hf.names import FAMILY_NAMES
from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.models.architecture import ARCHITECTURES, FAMILIES, architecture, completed

# by family: transformers' class, its name of a model with a head, and our field of each of its sizes
_CLASSES: dict[str, Any] = {"llama": LlamaConfig, "gpt2": GPT2Config, "neox": GPTNeoXConfig, "opt": OPTConfig}
_MODELS = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM",
}  # fmt: skip
_CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification",
    "neox": "GPTNeoXForSequenceClassification", "opt": "OPTForSequenceClassification",
}  # fmt: skip
_SHARED = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size", "init_method_std": "initializer_range", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
_FIELDS: dict[str, dict[str, str]] = {
    "llama": {
        "ffn_hidden_size": "intermediate_size", "num_query_groups": "num_key_value_heads",
        "norm_epsilon": "rms_norm_eps",
    },
    "gpt2": {
        "ffn_hidden_size": "n_inner", "norm_epsilon": "layer_norm_epsilon", "max_position_embeddings": "n_positions",
    },
    "neox": {"ffn_hidden_size": "intermediate_size", "norm_epsilon": "layer_norm_eps"},
    "opt": {
        "ffn_hidden_size": "ffn_dim", "max_position_embeddings": "max_position_embeddings",
        "init_method_std": "init_std",
    },
}  # fmt: skip
# what the function of ours is; another value in config.json is another model
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1, None),
        "rope_interleaved": (False, None),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    "neox": {"hidden_act": ("gelu",), "use_parallel_residual": (True,), "attention_bias": (True,)},
    "opt": {
        "activation_function": ("relu",), "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
        "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
    },
}  # fmt: skip
_REQUIRED_OF_ALL: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,), "quantization_config": (None,), "sliding_window": (None,), "is_encoder_decoder": (False,),
    "layer_types": (None,), "layer_norm_type": (None,), "qk_norm": (False, None),
}  # fmt: skip
_DROPPED = ("_pdrop", "dropout", "layerdrop")
_DROPOUT: dict[str, tuple[str, ...]] = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "opt": ("dropout", "attention_dropout", "layerdrop"),
}  # fmt: skip
_ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor"}


def to_foreign(
    config: ModelConfig, length: int, tokens: dict[str, int | None], dtype: str, labels: Sequence[str] | None = None
) -> Any:
    """transformers' configuration of a completed ``config``.

    ``length`` is the longest sequence, ``tokens`` has ``bos_token_id`` and the like, ``labels`` are the names of the
    classes of a labelled task. Raises ConfigError for what the family of theirs cannot express.
    """
    family, rotary = config.model_family or "llama", architecture(config).rotary_percent is not None
    if family == "llama" and config.rotary_percent not in (None, 1.0):
        raise ConfigError("a LLaMA of transformers rotates whole heads", f"--rotary-percent {config.rotary_percent}", 1)
    epsilon = ARCHITECTURES[family].norm_epsilon
    if family == "opt" and config.norm_epsilon != epsilon:
        raise ConfigError("the norms of transformers' OPT have one epsilon", config.norm_epsilon, epsilon)
    fields: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in {**_SHARED, **_FIELDS[family]}.items()}
    if rotary:
        fields["max_position_embeddings"] = length
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if family == "neox":
        fields["rope_parameters"]["partial_rotary_factor"] = config.rotary_percent
    fields.update({name: allowed[0] for name, allowed in _REQUIRED[family].items() if name != "rope_interleaved"})
    fields.update(dict.fromkeys(_DROPOUT.get(family, ()), 0.0))
    fields.update(tokens, architectures=[_MODELS[family]], dtype=dtype)
    if config.num_labels is not None:
        fields.update(_task(config.num_labels, labels), architectures=[_CLASSIFIERS[family]])
    return _CLASSES[family](**fields)


def _task(outputs: int, labels: Sequence[str] | None) -> dict[str, Any]:
    """What theirs says of a labelled task; without ``labels`` it is a regression."""
    if labels is None:
        return {"num_labels": outputs, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def read_config(folder: Path) -> tuple[ModelConfig, int, list[str]]:
    """Our shape of the model in ``folder``, its longest sequence, and notes for the user.

    Raises ConfigError for a folder without ``config.json`` and for what our models do not compute.
    """
    raw = _read_json(folder / "config.json")
    family = _family(raw)
    _refuse(raw, _REQUIRED_OF_ALL)
    try:
        found = _CLASSES[family].from_dict(raw)
    except Exception as error:  # transformers' validation raises several kinds
        raise ConfigError(f"{folder / 'config.json'} is not usable", " ".join(str(error).split())[:200]) from None
    values = {name: getattr(found, name, None) for name in _REQUIRED[family]}
    _refuse(values, _REQUIRED[family])
    ours = {ours: getattr(found, theirs) for ours, theirs in {**_SHARED, **_FIELDS[family]}.items()}
    if architecture(ModelConfig(model_family=family)).rotary_percent is not None:
        ours.update(_rotary(family, found.rope_parameters or {}))
    length = int(found.max_position_embeddings)
    config = completed(ModelConfig(model_family=family, **ours), FAMILIES, length)
    config.check()
    head = (config.hidden_size or 0) // (config.num_attention_heads or 1)
    if getattr(found, "head_dim", None) not in (None, head):
        raise ConfigError("head_dim in config.json is not hidden_size over num_attention_heads", found.head_dim, head)
    width = getattr(found, "word_embed_proj_dim", None)
    if width not in (None, config.hidden_size):
        raise ConfigError("word_embed_proj_dim in config.json is not hidden_size", width, config.hidden_size)
    return config, length, _notes(raw)


def _family(raw: dict[str, Any]) -> str:
    known = {names.model_type: family for family, names in FAMILY_NAMES.items()}
    if raw.get("model_type") not in known:
        raise ConfigError("model_type in config.json is none of ours", repr(raw.get("model_type")), ", ".join(known))
    return known[raw["model_type"]]


def _refuse(values: dict[str, Any], required: dict[str, tuple[Any, ...]]) -> None:
    for name, allowed in required.items():
        if values.get(name, allowed[0]) not in allowed:
            shown = " or ".join(str(value) for value in allowed if value is not None) or "without it"
            raise ConfigError(f"{name} in config.json is something our models do not compute", values[name], shown)


def _rotary(family: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Base and share of the rotary embedding; scaled ones are refused."""
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ConfigError("rope_scaling in config.json is something our models do not compute", kind, "default")
    if strange := sorted(rope.keys() - _ROPE_KEYS):
        raise ConfigError("rope_parameters in config.json has a key that is unknown here", strange[0])
    share = rope.get("partial_rotary_factor", 1.0)
    if family == "llama" and share != 1.0:
        raise ConfigError("partial_rotary_factor in config.json is something our LLaMA does not compute", share, 1.0)
    return {"rotary_base": float(rope["rope_theta"]), "rotary_percent": float(share)}


def _notes(raw: dict[str, Any]) -> list[str]:
    dropped = {key: value for key, value in raw.items() if key.endswith(_DROPPED) and value}
    dropped.pop("summary_first_dropout", None)
    dropped.pop("classifier_dropout", None)
    return [f"{key} {value} is not used: nothing here is trained with it" for key, value in dropped.items()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", None, "a folder of save_pretrained") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON", str(error)[:100]) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return found
