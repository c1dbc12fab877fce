"""PEFT's adapter_config.json: the rank and scale of each module, and a refusal of what changes LoRA's meaning.

Source: PEFT 0.21, tuners/lora/config.py, tuners/lora/layer.py (update_layer) and utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_adapt.errors import AdaptorError, FileAccessError, FileFormatError

# Each of these makes the forward pass another one than W x + scale * B A x.
_CHANGES_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "invocation_string": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA for parameters instead of modules",
    "trainable_token_indices": "training of single tokens",
}
# Settings of training, loading or quantised training alone, whose names look like the above's.
_HARMLESS = frozenset({
    "use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "runtime_config",
})  # fmt: skip
# The others ("pissa", "olora", "corda", "lora_ga", "loftq") take the initial B A out of the base's weights, or quantise
# them: unless PEFT converted the adapter when it saved it (and then it writes `true`), it fits that changed base only.
_INIT_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?(?!:)")
_MAX_PATTERN = 1000  # characters
_MAX_STEPS = 10**8  # of matching, roughly a few seconds
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), 2.0**112  # of alpha: times or over a rank F32 can still hold it
MAX_CONFIG_NBYTES = 16 << 20

Patterns = tuple[tuple[re.Pattern[str], float], ...]


def invalid(path: str, message: str) -> AdaptorError:
    """Return the error that says why an adaptor cannot be used."""
    return AdaptorError(f"{path}: {message}", code="adaptor_invalid")


def read_regular(path: str, most: int | None = None) -> bytes:
    """Return a file's bytes.

    Raises: FileAccessError, also for what is not a regular file and might never end; FileFormatError if the file is
    larger than `most` bytes.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileAccessError(f"{path}: not a regular file")
            if most is not None and status.st_size > most:
                raise FileFormatError(f"{status.st_size} bytes are more than the {most} that it can have", path=path)
            return file.read()
    except OSError as exc:
        raise exc if isinstance(exc, FileAccessError) else FileAccessError.of(path, exc) from exc


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What of an adapter_config.json matters for inference.

    Not looked at, as they do not: target_modules, exclude_modules, layers_to_transform and layers_pattern (the file
    has exactly the modules that they chose), lora_dropout, inference_mode, task_type, bias and modules_to_save (the
    tensors are there, or not), and fan_in_fan_out (A and B are stored alike with it and without).
    """

    path: str
    base: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns

    @classmethod
    def parse(cls, path: str, text: bytes) -> PeftConfig:
        """Return the configuration.

        Raises: FileFormatError if the text is not a JSON object; AdaptorError (adaptor_invalid) naming the setting.
        """
        try:
            config = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as exc:
            raise FileFormatError("the text is not UTF-8", path=path, offset=exc.start) from exc
        except (ValueError, RecursionError) as exc:
            raise FileFormatError(f"the text is not JSON: {exc}", path=path) from exc
        if not isinstance(config, dict):
            raise FileFormatError("the text is not a JSON object", path=path)
        _check_kind(path, config)
        for key in ("r", "lora_alpha"):
            if config.get(key) is None:
                raise invalid(path, f"{key} is missing")
        base = config.get("base_model_name_or_path") or ""
        if not isinstance(base, str):
            raise invalid(path, f"base_model_name_or_path must be a string, not {base!r}")
        return cls(
            path,
            base,
            _rank(path, "r", config["r"]),
            _alpha(path, "lora_alpha", config["lora_alpha"]),
            bool(config.get("use_rslora")),
            _patterns(path, config, "rank_pattern", _rank),
            _patterns(path, config, "alpha_pattern", _alpha),
        )

    def check_patterns(self, n_modules: int) -> None:
        """Raise AdaptorError if matching the patterns with so many modules' names could take very long."""
        steps = 0
        for matcher, _ in (*self.rank_pattern, *self.alpha_pattern):
            count = matcher.pattern.count
            n_loops, n_choices = count("*") + count("+") + count("{") - 1, count("?") + count("|") - 3  # less our own
            steps += n_modules * 32**n_loops * 2**n_choices
        if steps > _MAX_STEPS:
            raise invalid(self.path, "rank_pattern and alpha_pattern are too many or too complicated to be matched")

    def rank(self, module: str) -> int:
        """Return the rank of a module, named as in the Hugging Face model."""
        return int(_matching(self.rank_pattern, module, self.r))

    def alpha(self, module: str, rank: int) -> float:
        """Return alpha such that alpha / rank is the module's scale, 0 if that is 0."""
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _check_kind(path: str, config: Mapping[str, Any]) -> None:
    """Raise AdaptorError unless the file is for plain LoRA on an unchanged base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise invalid(path, f"peft_type is {kind!r}; only 'LORA' is implemented")
    for key, name in _CHANGES_LORA.items():
        if config.get(key):
            raise invalid(path, f"{key} asks for {name}, which is not implemented")
    for key, value in config.items():
        if value and (key.startswith("use_") or key.endswith("_config")) and key not in _HARMLESS:
            raise invalid(path, f"{key!r} is a setting that is not known here and may change what LoRA means")
    init = config.get("init_lora_weights")
    if str(init).lower() not in _INIT_KEEPS_BASE:
        raise invalid(
            path,
            f"init_lora_weights is {init!r}, which changes the base's weights too; save the adapter with "
            f"path_initial_model_for_weight_conversion to use it on the base as it is",
        )


def _patterns(path: str, config: Mapping[str, Any], name: str, check: Callable[[str, str, object], float]) -> Patterns:
    """Return rank_pattern or alpha_pattern, compiled as PEFT matches them: with the end of a name, from a dot on."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise invalid(path, f"{name} must be an object, not {patterns!r}")
    result = []
    for pattern, value in patterns.items():
        if len(pattern) > _MAX_PATTERN or _QUANTIFIED_GROUP.search(pattern):
            raise invalid(path, f"{name} has {pattern[:80]!r}, a kind of pattern that could take for ever to match")
        try:
            re.compile(pattern)
            matcher = re.compile(rf"(?:.*\.)?(?:{pattern})$")
        except (re.error, RecursionError, OverflowError) as exc:
            raise invalid(path, f"{name} has {pattern!r}, which is not a regular expression: {exc}") from exc
        result.append((matcher, check(path, f"{name}[{pattern!r}]", value)))
    return tuple(result)


def _matching(patterns: Patterns, module: str, default: float) -> float:
    """Return the value of the first pattern that matches a module's name."""
    return next((value for matcher, value in patterns if matcher.match(module)), default)


def _rank(path: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(path, f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _alpha(path: str, name: str, value: object) -> float:
    """Return a number that is 0, or one that stays finite and does not vanish as F32."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_usable(value):
        raise invalid(path, f"{name} must be a finite number that F32 can hold, not {value!r}")
    return float(value)


def _is_usable(value: float) -> bool:
    return value == 0 or _SMALLEST <= abs(value) <= _LARGEST
