"""Reading a config.json without dropping anything: each key is used, known to be harmless, or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from megamoe.errors import ConversionError

# Of no consequence for what the model computes: who wrote the file, how it is loaded, what generation starts from.
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype",
    "eos_token_id", "id2label", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
})  # fmt: skip
NORMAL_ROPE = ("default", None)
_DECODER_KEYS = {"is_encoder_decoder": False, "add_cross_attention": False}  # any class may have them in its file


class Keys:
    """The keys of one config.json over the defaults of its class; remembers which were read."""

    def __init__(self, architecture: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self._values, self._defaults = values, {**_DECODER_KEYS, **defaults}
        self._read: set[str] = set()
        for key, value in _DECODER_KEYS.items():
            self.require(key, [value], "a model is a decoder alone")

    def take(self, key: str, *aliases: str) -> Any:
        """The value of `key` or of one of its other spellings, else the default of the class.

        Raises ConversionError where spellings disagree or there is neither a value nor a default.
        """
        spellings = (key, *aliases)
        self._read.update(spellings)
        given = {name: self._values[name] for name in spellings if name in self._values}
        if not given:
            if key not in self._defaults:
                raise ConversionError(f"config.json of {self.architecture} lacks {key}")
            return self._defaults[key]
        first, *others = given
        for other in others:
            if given[other] != given[first]:
                raise ConversionError(
                    f"config.json of {self.architecture} says {first} {given[first]!r} and {other} {given[other]!r}, "
                    "which are two names for one setting: remove one"
                )
        return given[first]

    def require(self, key: str, valid: Collection[Any], why: str) -> None:
        """Raises ConversionError unless the value of `key` is one of `valid`."""
        value = self.take(key)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in valid):
            self.refuse(f"{key} {value!r}", why)

    def refuse(self, what: str, why: str) -> None:
        raise ConversionError(f"{self.architecture} with {what} has no counterpart in megamoe: {why}")

    def rope_base(self) -> float:
        """The base of plain rotary embeddings, in any spelling of the file. Raises ConversionError for other kinds."""
        scaling, parameters = self.take("rope_scaling"), self.take("rope_parameters")
        settings = dict(scaling or parameters or {})
        kind = settings.pop("rope_type", settings.pop("type", "default"))
        settings.pop("type", None)
        base = settings.pop("rope_theta", self.take("rope_theta"))
        partial = settings.pop("partial_rotary_factor", None)
        other = self.take("partial_rotary_factor")
        if kind not in NORMAL_ROPE:
            self.refuse(f"rope_type {kind!r}", "its rotary embeddings are not scaled")
        for factor in (partial, other):
            if factor not in (None, 1, 1.0):
                self.refuse(f"partial_rotary_factor {factor!r}", "its rotary embeddings turn the whole head")
        if settings:
            self.refuse(f"{', '.join(sorted(settings))} in rope_parameters", "its rotary embeddings have a base alone")
        return base

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Raises ConversionError if a key was neither read nor is known to be harmless nor in `ignored`."""
        left = sorted(set(self._values) - self._read - HARMLESS - set(ignored))
        if left:
            raise ConversionError(
                f"config.json of {self.architecture} has the unknown {', '.join(left)}: what it changes cannot be "
                "told, so nothing is converted; name it as ignored if it changes nothing"
            )
