"""The registry, with third-party plugins as they really come: an installed distribution on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import InvalidInput, UnknownPlugin
from fedcore.registry import Registry

GROUP = "roundtable.dummies"
Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a distribution with one module and its entry points."""

    def run(distribution: str, source: str, entry_points: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")
        module = f"{distribution}_module"
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return run


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("dummy", GROUP, {"pi": "math:pi", "never-imported": "no_such_module:thing"})


def test_builtin_is_imported_when_asked_for(registry: Registry[object]) -> None:
    assert registry.get("pi") == pytest.approx(3.14159, abs=1e-5)


def test_entry_point_of_an_installed_distribution_is_found(registry: Registry[object], install: Install) -> None:
    install("third", "answer = 42\n", "answer = third_module:answer")
    assert registry.names() == ["answer", "never-imported", "pi"]
    assert registry.get("answer") == 42


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        (
            "import no_such_module_here\n",
            "broken_module:thing",
            "ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
        ("from math import tau_\n", "broken_module:thing", "ImportError: cannot import name 'tau_' from 'math'"),
        ("other = 1\n", "broken_module:thing", "AttributeError: module 'broken_module' has no attribute 'thing'"),
        ("thing =\n", "broken_module:thing", "SyntaxError: invalid syntax"),
        ("raise RuntimeError('no annotation')\n", "broken_module:thing", "RuntimeError: no annotation"),
        ("thing = 1\n", "gone_module:thing", "ModuleNotFoundError: No module named 'gone_module'"),
    ],
)
def test_plugin_that_cannot_be_loaded_is_named_with_its_value_and_the_reason(
    registry: Registry[object], install: Install, source: str, value: str, reason: str
) -> None:
    install("broken", source, f"thing = {value}")
    with pytest.raises(UnknownPlugin) as caught:
        registry.get("thing")
    said = f"dummy 'thing' is installed as '{value}' and cannot be loaded: {reason}"
    assert str(caught.value).startswith(said)
    assert registry.get("pi")


def test_entry_points_of_other_groups_are_not_plugins_of_this_kind(install: Install) -> None:
    install("third", "answer = 42\n", "answer = third_module:answer")
    assert Registry[object]("other", "roundtable.others", {}).names() == []


def test_listing_and_using_one_plugin_imports_no_other(registry: Registry[object], install: Install) -> None:
    install("loud", "raise RuntimeError('imported')\n", "loud = loud_module:thing")
    assert "loud" in registry.names()
    registry.get("pi")
    assert "loud_module" not in sys.modules


def test_entry_point_that_repeats_a_builtin_is_refused_only_where_it_is_used(
    registry: Registry[object], install: Install
) -> None:
    install("squatter", "pi = 3\nfair = 1\n", "pi = squatter_module:pi\nfair = squatter_module:fair")
    with pytest.raises(InvalidInput, match=r"dummy 'pi' is claimed more than once: .*squatter_module:pi"):
        registry.get("pi")
    assert registry.get("fair") == 1
    assert registry.names() == ["fair", "never-imported", "pi"]


def test_two_distributions_with_one_name_are_refused_and_both_are_named(
    registry: Registry[object], install: Install
) -> None:
    install("first", "x = 1\n", "x = first_module:x")
    install("second", "x = 2\n", "x = second_module:x")
    with pytest.raises(InvalidInput) as caught:
        registry.get("x")
    assert "first_module:x" in str(caught.value)
    assert "second_module:x" in str(caught.value)


def test_unknown_name_lists_the_known_ones_and_the_nearest(registry: Registry[object], install: Install) -> None:
    install("third", "answer = 42\n", "answer = third_module:answer")
    with pytest.raises(UnknownPlugin) as caught:
        registry.get("anser")
    assert str(caught.value) == ("unknown dummy 'anser': did you mean 'answer'? known: answer, never-imported, pi")


def test_unknown_name_that_resembles_nothing_gets_no_guess(registry: Registry[object]) -> None:
    with pytest.raises(UnknownPlugin, match=r"^unknown dummy 'zzzzzz': known: never-imported, pi$"):
        registry.get("zzzzzz")


@pytest.mark.parametrize("name", ["os:system", "math:pi", "", "pi\n", "../pi"])
def test_a_name_is_never_an_import_path(registry: Registry[object], name: str) -> None:
    with pytest.raises(UnknownPlugin):
        registry.get(name)


def test_added_plugin_is_found_and_listed(registry: Registry[object]) -> None:
    plugin = object()
    registry.add("mine", plugin)
    assert registry.get("mine") is plugin
    assert "mine" in registry.names()


@pytest.mark.parametrize("name", ["pi", "mine", "answer"])
def test_adding_a_taken_name_is_refused(registry: Registry[object], install: Install, name: str) -> None:
    install("third", "answer = 42\n", "answer = third_module:answer")
    registry.add("mine", object())
    with pytest.raises(InvalidInput, match=f"dummy '{name}' is registered already"):
        registry.add(name, object())


def test_one_registry_knows_nothing_of_what_another_was_given(registry: Registry[object]) -> None:
    registry.add("mine", object())
    assert "mine" not in Registry[object]("dummy", GROUP, {}).names()
