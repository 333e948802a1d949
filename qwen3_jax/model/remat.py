"""What the backward pass keeps of the forward pass, said in one string.

`none` keeps everything; `full` keeps each layer's input and computes the rest again; `save:NAME,NAME` also keeps the named
tensors on the device; `offload:NAME,NAME` keeps them in host memory.
"""

from collections.abc import Callable
from typing import Any

import jax

# The tensors that the modules name by `checkpoint_name`.
NAMES = ("attention_q", "attention_k", "attention_v", "attention_out", "mlp_gate", "mlp_up", "moe_gate", "moe_up")


def rematerialised(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The scan body under a policy.

    Args:
        body: a function of one scan step.
        policy: `none`, `full`, `save:NAMES` or `offload:NAMES`, the names separated by commas, out of NAMES.

    Returns:
        The body, wrapped by jax.checkpoint unless the policy is `none`.

    Raises:
        ValueError: a policy or name that is not one of these.
    """
    if policy == "none":
        return body
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=False)
    kind, _, listed = policy.partition(":")
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    unknown = [name for name in names if name not in NAMES]
    if kind not in ("save", "offload") or not names or unknown:
        raise ValueError(
            f"remat policy {policy!r}: accepted are none, full, save:NAMES and offload:NAMES with names out of "
            f"{', '.join(NAMES)}" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    if kind == "save":
        saved = jax.checkpoint_policies.save_only_these_names(*names)
    else:
        saved = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(body, prevent_cse=False, policy=saved)
