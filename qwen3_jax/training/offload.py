"""Optimizer state in host memory: fetched a layer at a time, once there is a gradient, and what follows it put back."""

from typing import Any

import jax
import optax

from qwen3_jax.training.guard import chosen


class OnHost(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes state in host memory, and gives it back there; other optimizers are handed it fetched.

    Where `finite=` is False, `update` gives what lies in host memory back as it was.
    """


def to_host(tree: Any) -> Any:
    """Arrays in pinned host memory of the machines that hold them; scalars stay.

    Args:
        tree: arrays, or jax.ShapeDtypeStructs with shardings.

    Returns:
        The same, laid out alike.
    """

    def moved(leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        sharding = leaf.sharding.with_memory_kind("pinned_host")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(moved, tree)


def fetched(tree: Any) -> Any:
    """Within a step: what lies in host memory, on the device.

    Args:
        tree: tracers.

    Returns:
        The tree, all of it on the device.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf, tree)


def put_back(new: Any, old: Any) -> Any:
    """Within a step: a new tree where the old one lay.

    Args:
        new: tracers on the device.
        old: tracers of the same form.

    Returns:
        The new tree.
    """
    return jax.tree.map(
        lambda after, before: jax.device_put(after, jax.memory.Space.Host) if on_host(before) else after, new, old
    )


def on_host(leaf: Any) -> bool:
    """Whether a tracer is of host memory."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def names_of(path: tuple[Any, ...]) -> list[str]:
    """The keys of a path in a tree as words."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def in_turn(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose state may lie in host memory: a layer of it at a time is on the device.

    XLA fetches as early as it can. State fetched whole lay beside all that a backward pass needs, and so saved nothing; here
    the layers of a segment are gone through by a loop over the gradient, in whose place it writes the updates. Parameters
    outside of layers are fetched whole.

    Args:
        inner: works on each layer of each parameter alone, without a look at the parameters themselves. Its state is a
            NamedTuple of scalars and trees like the parameters'.

    Returns:
        The same transformation, and its state of the same form, wherever that lies. Of state in host memory updates come in
        the gradient's dtype, in whose place they are written: wider ones are rounded.
    """

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any) -> tuple[Any, Any]:
        if not any(map(on_host, jax.tree.leaves(state))):
            return inner.update(updates, state, params)
        leaves, form = jax.tree.flatten(updates)
        shapes = [leaf.shape for leaf in leaves]
        trees = [
            name
            for name, part in state._asdict().items()
            if jax.tree.structure(part) == form and [leaf.shape for leaf in jax.tree.leaves(part)] == shapes
        ]

        def whole(some: list[int], values: list[Any]) -> Any:
            by_place = dict(zip(some, values, strict=True))
            return jax.tree.unflatten(form, [by_place.get(at, optax.MaskedNode()) for at in range(len(leaves))])

        def of(some: list[int], values: Any) -> Any:
            """Updates of some parameters, or of a layer of each, in the gradients' place, and what follows their state."""
            grads, *parts = values
            here = [fetched(part) for part in parts]
            given = state._replace(**{name: whole(some, part) for name, part in zip(trees, here, strict=True)})
            ups, new = inner.update(whole(some, grads), given)
            ups = [up.astype(grad.dtype) for up, grad in zip(jax.tree.leaves(ups), grads, strict=True)]
            following = [jax.tree.leaves(getattr(new, name)) for name in trees]
            return [ups, *put_back(chosen(finite, following, here), parts)]

        def layers_of(some: list[int], values: Any) -> Any:
            def layer(at: jax.Array, values: Any) -> Any:
                before = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1), values)
                after = of(some, before)
                return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, at, 0), values, after)

            return jax.lax.fori_loop(0, values[0][0].shape[0], layer, values)

        by_segment: dict[Any, list[int]] = {}
        for at, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(updates)):
            names = names_of(path)
            by_segment.setdefault((names[1],) if names[0] == "segments" else at, []).append(at)
        stacks = [leaves, *(list(jax.tree.leaves(getattr(state, name))) for name in trees)]
        for key, some in by_segment.items():
            values = [[stack[at] for at in some] for stack in stacks]
            values = (layers_of if isinstance(key, tuple) else of)(some, values)
            for stack, new in zip(stacks, values, strict=True):
                for at, leaf in zip(some, new, strict=True):
                    stack[at] = leaf
        # Of no parameter at all, what remains of an update is the scalars'.
        scalars: Any = inner.update(whole([], []), state._replace(**dict.fromkeys(trees, whole([], []))))[1]
        ups, *parts = (jax.tree.unflatten(form, stack) for stack in stacks)
        return ups, scalars._replace(**dict(zip(trees, parts, strict=True)))

    return optax.GradientTransformationExtraArgs(inner.init, update)
