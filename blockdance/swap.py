"""Swap the class of an object for a time, so that nothing of it stays: not on the object, and not on what is made of it."""

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

_users: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_users_lock = threading.Lock()


class Swapped:
    """Mixed into every swapped class. Whatever is made of one has the original class: copies, pickles and new objects."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """For who makes an object without calling the class; `type(x)(...)` is answered by `_making_originals`."""
        original = original_class(cls)
        make: Any = original.__new__
        return make(original) if make is object.__new__ else make(original, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, arguments, *rest = reduced
        return object.__new__, (original_class(type(self)), *arguments[1:]), *rest


@functools.cache
def _making_originals(metaclass: type) -> Any:
    """A metaclass whose classes, when called, make objects of the original class."""

    def __call__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original_class(cls)(*args, **kwargs)

    return type(metaclass.__name__, (metaclass,), {"__call__": __call__})


def derived(cls: type, members: dict[str, Any]) -> type:
    """A subclass of `cls` that carries its name, so that saved configs and messages stay the same."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: type = _making_originals(type(cls))(cls.__name__, (Swapped, cls), names | members)
    return made


def original_class(cls: type) -> type:
    """The class before it was swapped; of one that somebody derived from a swapped class, the same without it.

    The latter is what FSDP does to a module that is wrapped while its class is swapped.
    """
    if not issubclass(cls, Swapped):
        return cls
    if Swapped in cls.__bases__:
        return cls.__bases__[1]
    if "blockdance_original" not in vars(cls):
        bases = tuple(original_class(base) for base in cls.__bases__)
        members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        cls.blockdance_original = type(bases[0])(cls.__name__, bases, members)  # type: ignore[attr-defined]
    original: type = vars(cls)["blockdance_original"]
    return original


def is_swapped(thing: Any) -> bool:
    """Whether its class is swapped just now."""
    return isinstance(thing, Swapped)


def swap_in(thing: Any, make_class: Callable[[type], type]) -> None:
    """Swap the class of `thing`, or count one more user of the swapped one.

    Raises:
        TypeError: Python cannot give this object another class.
    """
    with _users_lock:
        if not _users.get(thing):
            object.__setattr__(thing, "__class__", make_class(type(thing)))
        _users[thing] = _users.get(thing, 0) + 1


def swap_out(thing: Any) -> None:
    """One user less; the last one, in any thread, puts the original class back."""
    with _users_lock:
        _users[thing] -= 1
        if not _users[thing]:
            del _users[thing]
            object.__setattr__(thing, "__class__", original_class(type(thing)))


def swap_for(stack: ExitStack, thing: Any, make_class: Callable[[type], type]) -> None:
    """`swap_in` now, and `swap_out` when the stack is left; a stack that is only dropped does nothing."""
    swap_in(thing, make_class)
    stack.callback(swap_out, thing)
