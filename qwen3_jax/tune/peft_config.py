"""PEFT's adapter_config.json: a LoraConfig written, and read where it says what a LoraConfig can say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_jax.checkpoint.reading import CheckpointError, parse_json, system_errors
from qwen3_jax.checks import ConfigError, shown
from qwen3_jax.config import Qwen3Config
from qwen3_jax.tune.lora import LoraConfig, targets_of
from qwen3_jax.tune.peft_names import FUSED, expert_modules, modules

CONFIG = "adapter_config.json"

# What changes nothing of what an adapter computes: notes, training's own settings, and parts of switches that are off.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}
# Beginnings that leave the base as it is; the others (pissa, olora, corda, loftq, ...) take their start out of it.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Told:
    """What an adapter_config.json says.

    Attributes:
        lora: which matrices have a pair, of which rank and alpha.
        fused: the parameters of all experts of a layer that have one pair an expert, out of FUSED; other pairs are of modules.
    """

    lora: LoraConfig
    fused: frozenset[str] = frozenset()


def to_peft(config: Qwen3Config, lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """What adapter_config.json says of a model's adapters.

    Args:
        config: the model's.
        lora: its adapters'.
        base: the model's folder or name.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(config, lora),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _target_modules(config: Qwen3Config, lora: LoraConfig) -> list[str] | str:
    """Last parts of names where those tell the wanted modules from the others, else an expression for whole names."""
    wanted, others = set(), set()
    for module, matrix in modules(config).items():
        (wanted if matrix is not None and lora.wants(*matrix) else others).add(module)
    last = {module.rsplit(".", 1)[-1] for module in wanted}
    if last.isdisjoint(module.rsplit(".", 1)[-1] for module in others):
        return sorted(last)
    return "|".join(sorted({re.sub(r"\b\d+\b", r"\\d+", re.escape(module)) for module in wanted}))


def from_peft(folder: Path, config: Qwen3Config) -> Told:
    """What an adapter folder holds, by its adapter_config.json.

    Args:
        folder: with the file.
        config: of the model that it is meant for.

    Returns:
        Rank, alpha (rank-stabilised ones too: alpha times the root of the rank), targets, and which of them are fused.

    Raises:
        CheckpointError: names the field, what was found and what is accepted.
    """
    file = folder / CONFIG
    with system_errors(file):
        given = parse_json(file.read_bytes(), file)
    said = _Fields(file, given)
    said.one_of("peft_type", ("LORA",))
    said.one_of("task_type", (None, "CAUSAL_LM"))
    said.one_of("bias", (None, "none"))
    said.one_of("init_lora_weights", INITS)
    said.one_of("use_rslora", (None, False, True))
    said.nothing_else()
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise said.refused("r", "a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise said.refused("lora_alpha", "a number above 0")
    said.same_everywhere("rank_pattern", rank)
    said.same_everywhere("alpha_pattern", alpha)
    said.every_layer(config.num_hidden_layers)
    if given.get("use_rslora"):
        alpha *= math.sqrt(rank)  # so that over the rank it is what it was over the root
    try:
        fused = _fused(said, config)
        return Told(LoraConfig(rank=rank, alpha=float(alpha), targets=_targets(said, config, fused)), fused)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


class _Fields:
    """The fields of a file, and the errors that they give."""

    def __init__(self, file: Path, given: Mapping[str, Any]):
        self.file, self.given = file, given

    def refused(self, field: str, accepted: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {field} is {shown(self.given.get(field))}; accepted is {accepted}")

    def one_of(self, field: str, accepted: tuple[Any, ...]) -> None:
        found = self.given.get(field)
        if not any(found is value or (isinstance(value, str) and found == value) for value in accepted):
            raise self.refused(field, " or ".join("null" if value is None else repr(value) for value in accepted))

    def nothing_else(self) -> None:
        """Refuse a field that says something of which nothing is known here: PEFT grows new ones."""
        for field, value in self.given.items():
            if field not in READ | IGNORED and value not in (None, False, "", [], {}):
                raise self.refused(field, "nothing (null, false or empty): adapters here are plain pairs beside matrices")

    def same_everywhere(self, field: str, value: Any) -> None:
        found = self.given.get(field)
        if found and not (isinstance(found, dict) and all(other == value for other in found.values())):
            raise self.refused(field, f"{value} for all matrices")

    def every_layer(self, layers: int) -> None:
        found, pattern = self.given.get("layers_to_transform"), self.given.get("layers_pattern")
        if found in (None, []):
            return
        numbers = found if isinstance(found, list) else [found]
        if not all(type(number) is int for number in numbers) or set(numbers) != set(range(layers)):
            raise self.refused("layers_to_transform", f"null, or all of the {layers} layers")
        if pattern not in (None, "", [], "layers", ["layers"]):
            raise self.refused("layers_pattern", "null or 'layers'")

    def matching(self, field: str, name: str) -> bool:
        """Whether a field means a module: an expression its whole name, a list its name or the end of it."""
        found = self.given.get(field)
        if found is None:
            return False
        if isinstance(found, str):
            try:
                return re.fullmatch(found, name) is not None
            except re.error as error:
                raise self.refused(field, f"a list of names or a regular expression, and this one is none: {error}") from error
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self.refused(field, "a list of names or a regular expression")
        return any(name == item or name.endswith(f".{item}") for item in found)


def _fused(said: _Fields, config: Qwen3Config) -> frozenset[str]:
    """What `target_parameters` means, where that is experts of every layer that has some."""
    given = said.given.get("target_parameters") or []
    accepted = "mlp.experts.gate_up_proj and mlp.experts.down_proj, in every layer with experts"
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise said.refused("target_parameters", f"a list of names: {accepted}")
    experts = expert_modules(config)
    found: dict[str, list[str]] = {leaf: [] for leaf in FUSED}
    for item in given:
        means = [(leaf, f"{module}.{leaf}") for leaf in FUSED for module in experts if f".{module}.{leaf}".endswith(f".{item}")]
        if not means:
            raise said.refused("target_parameters", accepted)
        for leaf, name in means:
            found[leaf].append(name)
    if any(names and set(names) != {f"{module}.{leaf}" for module in experts} for leaf, names in found.items()):
        raise said.refused("target_parameters", accepted)
    return frozenset(leaf for leaf, names in found.items() if names)


def _targets(said: _Fields, config: Qwen3Config, fused: frozenset[str]) -> tuple[str, ...]:
    """What `target_modules` without `exclude_modules` means, where that is every layer of some of a layer's matrices."""
    wanted: dict[tuple[str, str], list[str]] = {}
    missed: dict[tuple[str, str], str] = {}
    for name, matrix in modules(config).items():
        means = said.matching("target_modules", name) and not said.matching("exclude_modules", name)
        if means and matrix is None:
            raise said.refused(
                "target_modules", f"without {name}: adapters stand beside projections of attention, MLP and experts"
            )
        if means and matrix is not None:
            wanted.setdefault(matrix, []).append(name)
        elif matrix is not None:
            missed.setdefault(matrix, name)
    partly = [matrix for matrix in wanted if matrix in missed]
    if partly:
        first = partly[0]
        raise said.refused(
            "target_modules", f"every layer and expert or none: it means {wanted[first][0]} and leaves out {missed[first]}"
        )
    for matrix in [("moe", name) for leaf in sorted(fused) for name in FUSED[leaf]]:
        if matrix in wanted:
            raise said.refused("target_modules", f"without {wanted[matrix][0]}, which target_parameters mean too")
        wanted[matrix] = []
    if not wanted:
        raise said.refused("target_modules", "names of this model's modules, as q_proj, k_proj, v_proj, o_proj, gate_proj, ...")
    return targets_of(wanted)
