"""Models that accelerate has spread over several devices: where a module computes, and its weights while they are read.

What accelerate does hangs on modules as hooks, which act when a module is called; nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def has_hooks(model: nn.Module) -> bool:
    """Whether accelerate brings inputs or weights to any of the model's modules."""
    return any(_hooks(module) for module in model.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: on its weights' device, or where its hook brings them to if they are offloaded."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def weights_at_hand(*modules: nn.Module) -> Iterator[None]:
    """While it lasts parts of `modules` may be called by themselves.

    An offloaded block that brings its weights as a whole (accelerate's `preload_module_classes`) does so when it is
    called, and leaves those of its parts on the meta device otherwise. Parts with hooks of their own, the usual case,
    need nothing. Source: accelerate's align_module_device, which knows single hooks alone.
    """
    with ExitStack() as stack:
        for module in modules:
            for hook in _hooks(module):
                if getattr(hook, "offload", False):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module: none, one, or those of a SequentialHook."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
