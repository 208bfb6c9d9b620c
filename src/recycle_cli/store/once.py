"""Readings that are made once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property:
        """As that of `functools`, which in Python 3.11 has one lock for all instances: while one
        adapter's file is read from the Hub, no other adapter's would be."""

        def __init__(self, read):
            self._read = read
            self.__doc__ = read.__doc__

        def __set_name__(self, owner, name):
            self._name = name

        def __get__(self, instance, owner=None):
            if instance is None:
                return self
            value = vars(instance)[self._name] = self._read(instance)
            return value


__all__ = ["cached_property"]
