"""Which product, which version, which card: every refusal is one sentence that says what would help."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from earlytom.errors import EngineError
from engines import cards, products
from engines.cards import CARDS, Card, current_card
from engines.opening import HOMES
from engines.products import ENGINES, PRODUCTS, import_product, parse_targets


def test_the_table_of_engines_names_what_is_there() -> None:
    assert list(ENGINES)[-1] == "torch" and [name for name, e in ENGINES.items() if e.needs_weights] == ["torch"]
    assert set(HOMES) == set(ENGINES)
    for module in HOMES.values():
        home = importlib.import_module(module)
        assert callable(home.probe) and callable(home.open_bundle)
    assert all(target in set(CARDS.values()) for product in PRODUCTS.values() for target in product.targets)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("a100", ("sm80",)),
        ("rtx4090,a100", ("sm80", "sm89")),
        ("NVIDIA A100, GeForce RTX 3090,RTX-5090", ("sm80", "sm86", "sm120")),
        ("sm89,sm80,L40,a30", ("sm80", "sm89")),
        ("A40", ("sm86",)),
        (None, ("sm80", "sm86", "sm89", "sm120", "sm121")),
    ],
)
def test_targets_by_name_or_capability(text: str | None, targets: tuple[str, ...]) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a1000000", "the card 'a1000000' is not known: give its compute capability, such as sm80"),
        ("a100,h100", r"h100 \(sm90\) ahead of time: it offers sm80, .*--engine tensorrt builds for it"),
        ("sm90", "does not build for sm90 ahead of time"),
        ("t4", r"t4 \(sm75\) ahead of time, which cannot multiply in float32"),
        (" , ", "names no card"),
    ],
)
def test_targets_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        parse_targets(text)


def test_tensorrt_builds_for_the_card_in_the_machine() -> None:
    assert parse_targets(None, "tensorrt") == ()
    assert parse_targets("h100", "tensorrt") == ("sm90",)


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    """Have `import name` give a module of this version, or have it missing."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: (version and SimpleNamespace()) if n == name else found(n)
    )
    module: Any = ModuleType(name)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, name, module)


def test_a_missing_product_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", None)
    with pytest.raises(EngineError, match=r"^TensorRT is not installed: pip install tensorrt, or .*without a GPU$"):
        import_product("tensorrt")
    install(monkeypatch, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"^TensorRT for RTX is not installed: pip install tensorrt-rtx$"):
        import_product("tensorrt-rtx")
    with pytest.raises(EngineError, match="no TensorRT product 'cuda', it must be one of tensorrt, tensorrt-rtx"):
        import_product("cuda")


@pytest.mark.parametrize(
    ("name", "package", "version", "good"),
    [
        ("tensorrt", "tensorrt", "10.9.0.34", False), ("tensorrt", "tensorrt", "10.10.0.31", True),
        ("tensorrt", "tensorrt", "11.2.1.2", True), ("tensorrt-rtx", "tensorrt_rtx", "1.4.0.76", False),
        ("tensorrt-rtx", "tensorrt_rtx", "2.0", True),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, name: str, package: str, version: str, good: bool) -> None:
    install(monkeypatch, package, version)
    if good:
        assert import_product(name).__version__ == version
    else:
        with pytest.raises(EngineError, match=f"{version} is too old, .* or newer is needed: pip install --upgrade"):
            import_product(name)


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.15.1")

    def fails(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(products.importlib, "import_module", fails)
    with pytest.raises(EngineError, match=r"not load \(libnvinfer.so.10: .* file\): pip install --force-reinstall"):
        import_product("tensorrt")


class FakeDriver:
    """libcuda's answers on a machine with one A100."""

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0 if index < self.devices else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = {75: 8, 76: 0}[attribute]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = b"NVIDIA A100-SXM4-80GB"
        return 0

    def cuDriverGetVersion(self, value: Any) -> int:
        value._obj.value = 13010
        return 0


def test_the_card_in_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_driver_library", FakeDriver)
    monkeypatch.setattr(cards, "_driver_release", lambda: "580.95.05")
    assert current_card() == Card("NVIDIA A100-SXM4-80GB", "sm80", "580.95.05", "13.1")
    assert current_card(1) is None

    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cards, "_driver_library", missing)
    assert current_card() is None
