"""Functions of other libraries with ours around them, and the way back."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Wrappers:
    """Replacements of functions of classes and modules, which all step aside together.

    Args:
        active: Whether they act. While they do not, a call goes straight through, also from a place where another
            library has kept or wrapped ours.
    """

    def __init__(self, active: Callable[[], bool]) -> None:
        self.active = active
        self._put: list[tuple[Any, str, Any, Any, bool]] = []
        self._finders: list[_AfterImport] = []

    def put(self, owner: Any, name: str, around: Callable[..., Any]) -> None:  # noqa: ANN401  a class or a module
        """Call ``around(original, ...)`` where a function, method or class method is called.

        Args:
            owner: The class or module that has it.
            name: Its name there.
            around: What to call; it is given the plain function, and after it all that the caller gave.
        """
        before = inspect.getattr_static(owner, name)
        original = before.__func__ if isinstance(before, classmethod) else before

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  what the original returns
            return around(original, *args, **kwargs) if self.active() else original(*args, **kwargs)

        ours = classmethod(function) if isinstance(before, classmethod) else function
        self._put.append((owner, name, ours, before, name in vars(owner)))
        setattr(owner, name, ours)

    def after_import(self, name: str, act: Callable[[], None]) -> None:
        """Call ``act`` when a module has been imported: now, or by whoever imports it. It is not imported for this."""
        if name in sys.modules:
            act()
            return
        finder = _AfterImport(name, act)
        sys.meta_path.insert(0, finder)
        self._finders.append(finder)

    def remove(self) -> None:
        """Put everything back."""
        for owner, name, ours, before, own in reversed(self._put):
            # where another library has wrapped ours in turn, ours stays, and does nothing while it is not active
            if inspect.getattr_static(owner, name) is not ours:
                continue
            if own:
                setattr(owner, name, before)
            else:
                # it was inherited
                delattr(owner, name)
        self._put.clear()
        for finder in self._finders:
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
        self._finders.clear()


class _AfterImport(MetaPathFinder):
    """Finds one module as all other finders would, and calls a function at the end of its import."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.act()

            # on this loader alone: it was made for this module
            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  to mypy, a method is not assigned to
        return spec
