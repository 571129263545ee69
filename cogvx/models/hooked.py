"""Modules that others compute with by functions of their own, as `packed` does with a transformer and its blocks."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Hooked:
    """What a module inherits to let others use its weights outside of `forward`."""

    def run(self, function: Callable[..., Result], *given: object) -> Result:
        """`function(self, *given)`, where what must happen around a use of the weights happens, as around `forward`.

        Weights that processes share out come together for it and go apart again.
        """
        return function(self, *given)
