"""Names of parameters, the same under every engine."""

from __future__ import annotations

__all__ = ["plain_name"]

#: What wrappers of modules put into the names of parameters.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name in the model that was wrapped, the same under every engine."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
