"""Whatever a caller passes, a public call takes it or refuses it in the one form, and changes nothing."""

import inspect

import paged_mlx
import pytest
from bad_input.odd_values import COMMON, OTHERS, complaints, parameters
from bad_input.public_calls import CALLS, World
from paged_mlx.pages.observers import Evictor, Pool

#: What a call may raise beside: a check proves, and a mapping has its own error.
ALLOWED = {
    "PagePool.check": (AssertionError,),
    "PagePool.check of a canary": (AssertionError,),
    "PageAllocator.check": (AssertionError,),
    "PoolLayer.__getitem__": (KeyError,),
}
#: Made by the library, or called by other parts of it.
NOT_FOR_CALLERS = {
    *("Appended", "AttentionPlan", "CorruptPage", "PackedTables", "PoolLayer"),
    *(
        "AttentionPlan.check_tables",
        "PagePool.check_tokens",
        "PagePool.plan_for",
        "PagePool.plan_packed",
    ),
    *("PagePool.remember", "PagePool.write_values"),
}
IN_THE_TESTS_OF_MLX_LM = {"enable", "explain"}


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_argument_is_taken_or_refused_in_the_one_form(name):
    assert complaints(World, CALLS[name], COMMON, ALLOWED.get(name, ())) == []


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_so_is_an_argument_of_any_other_kind(name):
    assert complaints(World, CALLS[name], OTHERS, ALLOWED.get(name, ())) == []


def public_calls() -> set[str]:
    """Functions, classes and methods that have parameters, by the class that defines them."""
    found = set()
    told = {name for kind in (Pool, Evictor) for name in vars(kind)}
    for name in [*paged_mlx.__all__, *paged_mlx._LATER]:
        thing = getattr(paged_mlx, name)
        if inspect.ismodule(thing):
            found |= {f"{name}.{one}" for one in thing.__all__ if callable(getattr(thing, one))}
        elif inspect.isclass(thing):
            found |= {name} if not issubclass(thing, Exception) and parameters(thing) else set()
            methods = inspect.getmembers(thing, inspect.isfunction)
            found |= {
                function.__qualname__
                for key, function in methods
                if key[0] != "_" and key not in told and len(parameters(function)) > 1
                if function.__module__.startswith("paged_mlx")
            }
        elif callable(thing) and parameters(thing):
            found.add(name)
    return found - NOT_FOR_CALLERS - IN_THE_TESTS_OF_MLX_LM


def test_every_public_call_is_tried():
    assert public_calls() - {name.split(" ")[0] for name in CALLS} == set()
