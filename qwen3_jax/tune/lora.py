"""LoRA: a pair of low rank beside each matrix of attention, MLP and experts; the model itself stays frozen.

Router, norms, embeddings and the output table have none: a router that learns sends tokens elsewhere while its experts learn
for them, and a row of a table is read by few tokens.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from qwen3_jax.checks import ConfigError, above, at_least, check_fields, shown
from qwen3_jax.model.adapter import Adapter
from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import meshless, use_rules

# A layer's matrices: the module and the name that each has in it.
MATRICES = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "moe": ("gate", "up", "down"),
}
TARGETS = (*MATRICES, *(f"{module}.{name}" for module, names in MATRICES.items() for name in names))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices get a pair, of which rank; hashable. Called with a model it attaches them, to be trained or lowered.

    Attributes:
        rank: r.
        alpha: the update's scale is alpha / rank.
        targets: out of TARGETS: "attention", "mlp" (dense), "moe" (every expert), or single matrices of them, "attention.q".
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mlp", "moe")

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, 1, ("rank",))
        above(self, 0, ("alpha",))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            found = ", ".join(map(shown, unknown)) or "none"
            raise ConfigError(f"targets: found {found}; accepted are {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / self.rank

    def wants(self, module: str, name: str) -> bool:
        """Whether a matrix gets a pair."""
        return module in self.targets or f"{module}.{name}" in self.targets

    def __call__(self, model: Qwen3) -> Qwen3:
        """`attach` with key 0."""
        return attach(model, self, jax.random.key(0))


def attach(model: Qwen3, config: LoraConfig, key: jax.Array, *, param_dtype: DTypeLike = jnp.float32) -> Qwen3:
    """The model with adapters, which change nothing yet: every b is 0.

    Args:
        model: without adapters; on a mesh they are laid out as it is.
        config: which, and of which rank.
        key: PRNG key; a matrix's draw depends on it and on the matrix's place, not on the other targets.
        param_dtype: storage dtype of the adapters, whatever the model's is.

    Returns:
        A new model; it shares the given one's arrays.

    Raises:
        ValueError: the model has adapters already, or none of the targets.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: accepted is one without; `merge` makes one of it")
    model = _copy(model)
    wanted = [
        (number, module, name) for number, (module, kind, name) in enumerate(_matrices(model)) if config.wants(kind, name)
    ]
    if not wanted:
        raise ValueError(
            f"the model has none of the targets {', '.join(config.targets)}: accepted are attention, mlp where layers are "
            "dense and moe where they have experts"
        )

    def pairs(key: jax.Array) -> list[Adapter]:
        parts = [jax.random.fold_in(key, number) for number, *_ in wanted]
        matrices = [_weight(module, name) for _, module, name in wanted]
        options = dict(rank=config.rank, scale=config.scale, param_dtype=param_dtype)
        return [Adapter(*matrix, key=part, **options) for matrix, part in zip(matrices, parts, strict=True)]

    with on_mesh_of(model), use_rules(model.rules):
        made = jax.jit(pairs)(key)  # one program: single operations would be a small one for each shape
    for (_, module, name), pair in zip(wanted, made, strict=True):
        _set_lora(module, name, pair)
    return model


def merge(model: Qwen3) -> Qwen3:
    """The model that the adapters make: each matrix W + scale * b a, computed in float32, in W's dtype.

    Args:
        model: with adapters.

    Returns:
        A new model without; what had no adapter it shares with the given one.

    Raises:
        ValueError: a model without adapters.
    """
    if not adapted(model):
        raise ValueError("the model has no adapters: accepted is one that `attach` gave them")
    model = _copy(model)
    places = [(module, name) for module, _, name in _matrices(model) if _lora(module, name) is not None]
    outputs = [_weight(module, name)[1] for module, name in places]

    def run(given: list[tuple[nnx.Param, Any]]) -> list[jax.Array]:
        return [_merged(weight, pair, count) for (weight, pair), count in zip(given, outputs, strict=True)]

    with on_mesh_of(model):
        made = jax.jit(run)([(_weight(module, name)[0], _lora(module, name)) for module, name in places])
    for (module, name), values in zip(places, made, strict=True):
        _weight(module, name)[0].set_value(values)
        _set_lora(module, name, None)
    return model


def config_of(model: Qwen3) -> LoraConfig:
    """The config that attaches adapters such as a model's: what a train step of a model that was read wants as `adapt`.

    Args:
        model: with adapters.

    Returns:
        Their rank, alpha and targets.

    Raises:
        ValueError: a model without adapters, or with such as no one config attaches.
    """
    pairs: dict[tuple[str, str], list[Adapter | None]] = {}
    for module, kind, name in _matrices(model):
        pairs.setdefault((kind, name), []).append(_lora(module, name))
    found = [pair for same in pairs.values() for pair in same if pair is not None]
    if not found:
        raise ValueError("the model has no adapters: accepted is one that `attach` gave them")
    forms = {(pair.b.shape[-1], pair.scale) for pair in found}
    partly = [f"{kind}.{name}" for (kind, name), same in pairs.items() if 0 < sum(pair is None for pair in same) < len(same)]
    if len(forms) > 1 or partly:
        told = f"on some layers only for {', '.join(partly)}" if partly else f"of (rank, scale) {sorted(forms)}"
        raise ValueError(f"the model has adapters {told}: accepted is one rank, one scale and every layer")
    ((rank, scale),) = forms
    wanted = [key for key, same in pairs.items() if same[0] is not None]
    return LoraConfig(rank=rank, alpha=_alpha(rank, scale), targets=targets_of(wanted))


def targets_of(matrices: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The shortest `LoraConfig.targets` that name some matrices.

    Args:
        matrices: the module and the name of each.

    Returns:
        A module where all of its matrices are there, else single ones.
    """
    given = set(matrices)
    targets: list[str] = []
    for module, names in MATRICES.items():
        here = [name for name in names if (module, name) in given]
        targets += [module] if len(here) == len(names) else [f"{module}.{name}" for name in here]
    return tuple(targets)


def _alpha(rank: int, scale: float) -> float:
    """The alpha that has this scale to the bit: whole where one is, for alpha is rounded once more by the division."""
    near = scale * rank
    tried = (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((alpha for alpha in tried if alpha / rank == scale), near)


def adapted(model: Qwen3) -> bool:
    """Whether a model has adapters."""
    return any(_lora(module, name) is not None for module, _, name in _matrices(model))


def _copy(model: Qwen3) -> Qwen3:
    """Modules and variables of its own, the same arrays."""
    return jax.tree.map(lambda leaf: leaf, model)


def _matrices(model: Qwen3) -> Iterator[tuple[Any, str, str]]:
    """Every matrix that may have an adapter: its module, that module's name in its layer, and its own name."""
    for unit in model.segments:
        for block in unit.blocks:
            for kind, names in MATRICES.items():
                module = getattr(block, kind, None)
                if module is not None:
                    yield from ((module, kind, name) for name in names)


# Experts' matrices are parameters of their module, all others are modules.
def _weight(module: Any, name: str) -> tuple[nnx.Param, int]:
    """A matrix, and how many axes its output has."""
    found = getattr(module, name)
    return (found, 1) if isinstance(found, nnx.Param) else (found.weight, found.outputs)


def _lora(module: Any, name: str) -> Adapter | None:
    found = getattr(module, name)
    return getattr(module, f"{name}_lora") if isinstance(found, nnx.Param) else found.lora


def _set_lora(module: Any, name: str, pair: Adapter | None) -> None:
    found = getattr(module, name)
    if isinstance(found, nnx.Param):
        setattr(module, f"{name}_lora", nnx.data(pair))
    else:
        found.lora = nnx.data(pair)


def _merged(weight: nnx.Param, pair: Adapter, outputs: int) -> jax.Array:
    """One layer after another: the float32 updates of all layers at once would take more memory than the weights."""
    letters = "opqijk"[: weight.ndim - 1]  # of the weight's axes without that of layers
    inner = isinstance(weight, ExpertParam) + outputs
    b_letters = letters[:inner] + "r"
    a_letters = letters[: inner - outputs] + "r" + letters[inner:]

    def one(layer: tuple[Any, Any, Any]) -> jax.Array:
        weight, a, b = layer
        layout = None if meshless() else jax.typeof(weight).sharding.spec
        if layout is not None:  # the factors as the weight is split, so that nothing of the update travels
            axes: dict[str, Any] = dict(zip(letters, layout, strict=True))
            a = jax.sharding.reshard(a, PartitionSpec(*[axes.get(letter) for letter in a_letters]))
            b = jax.sharding.reshard(b, PartitionSpec(*[axes.get(letter) for letter in b_letters]))
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        formula = f"{b_letters},{a_letters}->{letters}"
        update = jnp.einsum(formula, b, a, precision="highest", out_sharding=layout)
        return (weight.astype(jnp.float32) + pair.scale * update).astype(weight.dtype)

    return jax.lax.map(one, (weight[...], pair.a[...], pair.b[...]))
