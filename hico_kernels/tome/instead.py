"""A method of one module instance, replaced and given back."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Instead:
    """Another `forward`, or method of another name, for one module, until `remove`.

    run: is called with the arguments as a tuple and a dict. What hooks see stays the module's own.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[tuple, dict[str, Any]], Any],
        method: str = "forward",
    ) -> None:
        self.module, self.run, self.method = module, run, method
        self.saved = module.__dict__.get(method)  # someone else's, such as accelerate's
        self.original = getattr(module, method)
        self.signature = inspect.signature(getattr(type(module), method))
        setattr(module, method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does now."""
        return self.run(args, kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> tuple[str, Tensor, dict[str, Any]]:
        """The name of the first argument, its value, and the other arguments by name."""
        named = {}
        for name, value in self.signature.bind(self.module, *args, **kwargs).arguments.items():
            kind = self.signature.parameters[name].kind
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        _, first, *_ = named  # after self
        return first, named[first], {k: named[k] for k in list(named)[2:]}

    def takes(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those arguments that the module has a place for."""
        parameters = self.signature.parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return given
        return {name: value for name, value in given.items() if name in parameters}

    def remove(self) -> None:
        """Give the module its own method back."""
        if self.saved is None:
            delattr(self.module, self.method)
        else:
            setattr(self.module, self.method, self.saved)
