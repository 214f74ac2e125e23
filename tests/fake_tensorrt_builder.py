"""A stand-in for the full TensorRT, which needs a GPU to build: what the code may ask of it is what the real one has.

tests/data/tensorrt_signatures.json was recorded from the real bindings (tensorrt 10.15.1.29 and 11.2.1.2 with their
libraries, tensorrt_rtx 1.7.1.116) by `record` below: classes, attributes, parameters, enumerations. The stand-in parses
with TensorRT for RTX, whose network is real, but lets through only what was recorded of the version that it plays.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.fake_tensorrt import NOT_REFITTABLE, NULL_POINTER

RECORDS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "tensorrt_signatures.json").read_text())
CLASSES = ("Builder", "IBuilderConfig", "INetworkDefinition", "ILayer", "ITensor", "OnnxParser", "ParserError",
           "IProgressMonitor", "ITimingCache", "Refitter", "OnnxParserRefitter", "Runtime", "EngineInspector",
           "ICudaEngine")
ENUMS = ("BuilderFlag", "NetworkDefinitionCreationFlag", "HardwareCompatibilityLevel", "ProfilingVerbosity",
         "MemoryPoolType", "LayerInformationFormat", "ComputeCapability")


def record(trt: Any) -> dict[str, Any]:
    """What the bindings say of themselves: parameters of every overload ("flags=" has a default), attributes, enums."""
    classes: dict[str, Any] = {}
    for name in CLASSES:
        known: dict[str, Any] = {"methods": {}, "attributes": []}
        for member in dir(getattr(trt, name)):
            if (member.startswith("_") and member != "__init__") or member.startswith("add_"):
                continue
            if name == "ICudaEngine" and member != "create_engine_inspector":
                continue
            value = getattr(getattr(trt, name), member)
            if not callable(value):
                known["attributes"].append(member)
                continue
            overloads = _overloads(member, value.__doc__ or "")
            if overloads or member != "__init__":
                known["methods"][member] = overloads
        classes[name] = known
    enums = {
        name: {key: int(value) for key, value in getattr(trt, name).__members__.items()}
        for name in ENUMS if hasattr(trt, name)
    }
    return {"classes": classes, "enums": enums}


def _overloads(name: str, text: str) -> list[list[str]]:
    found: list[list[str]] = []
    for match in re.finditer(rf"(?:^|\n\s*)(?:\d+\. )?{re.escape(name)}\((self: [^\n]*)\)(?: -> [^\n]*)?", text):
        parameters = []
        for part in re.sub(r"<[^>]*>|\[[^\]]*\]", "", match[1]).split(", ")[1:]:
            if word := re.match(r"(\w+):", part):
                parameters.append(word[1] + ("=" if " = " in part else ""))
        if parameters not in found:
            found.append(parameters)
    return found


def fake_tensorrt(version: str, *, gpu: bool = True) -> ModuleType:
    """A module that plays `tensorrt` of a recorded version. `module.state` is what was asked of it."""
    import tensorrt_rtx as rtx

    classes = RECORDS[version]["classes"]
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    module.state = state = SimpleNamespace(configs=[], builds=0, refitted=[], missing=[], inspected="{}")
    for name, members in RECORDS[version]["enums"].items():
        setattr(module, name, enum.IntEnum(name, members))
    for name in ("ILogger", "IProgressMonitor", "LayerType", "DataType"):
        setattr(module, name, getattr(rtx, name))

    class Guard:
        """Passes on to a real object what the version's class has."""

        def __init__(self, kind: str, real: Any) -> None:
            self.__dict__.update(kind=kind, real=real)

        def __getattr__(self, name: str) -> Any:
            known = classes[self.kind]
            if name not in known["methods"] and name not in known["attributes"]:
                raise AttributeError(f"tensorrt {version}: {self.kind} has no {name}")
            return getattr(self.real, name)

    def recorded(cls: type) -> type:
        """Refuse a class whose methods differ from the recording."""
        known = classes[cls.__name__]
        for name, method in vars(cls).items():
            if not callable(method) or (name.startswith("_") and name != "__init__"):
                continue
            parameters = list(inspect.signature(method).parameters.values())[1:]
            mine = [p.name + ("" if p.default is p.empty else "=") for p in parameters]
            if name == "__init__" and name not in known["methods"]:
                continue  # made by a factory
            assert mine in known["methods"].get(name, ()), f"{version}: {cls.__name__}.{name}{mine} is not recorded"
        setattr(module, cls.__name__, cls)
        return cls

    @recorded
    class Builder:
        def __init__(self, logger: Any) -> None:
            if not gpu:
                logger.log(rtx.ILogger.ERROR, "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization "
                           "failure with error: 35. Please check your CUDA installation)")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._real, self._logger = rtx.Builder(logger), logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            real = self._real.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            return Guard("INetworkDefinition", real)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            assert isinstance(network, Guard) and isinstance(config, IBuilderConfig)
            state.configs.append(config)
            state.builds += 1
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 200)
            for step in range(200):
                if not monitor.step_complete("Building engine", step):
                    return None
            monitor.phase_finish("Building engine")
            if config.cache is not None:
                config.cache.content += b"+measured"
            return b"a stripped engine" if module.BuilderFlag.STRIP_PLAN in config.set_flags else b"an engine"

    @recorded
    class IBuilderConfig:
        def __init__(self) -> None:
            self.__dict__.update(set_flags={module.BuilderFlag.TF32}, pools={}, cache=None, values={})

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in classes["IBuilderConfig"]["attributes"]:
                raise AttributeError(f"tensorrt {version}: IBuilderConfig has no {name}")
            self.values[name] = value

        def __getattr__(self, name: str) -> Any:
            try:
                return self.__dict__["values"][name]
            except KeyError:
                raise AttributeError(name) from None

        def set_flag(self, flag: Any) -> None:
            self.set_flags.add(module.BuilderFlag(flag))

        def clear_flag(self, flag: Any) -> None:
            self.set_flags.discard(module.BuilderFlag(flag))

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.pools[module.MemoryPoolType(pool)] = pool_size

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return None if serialized_timing_cache == b"damaged" else ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache.content.startswith(b"foreign") and not ignore_mismatch:
                return False
            self.__dict__["cache"] = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    @recorded
    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content

    @recorded
    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._real = Guard("OnnxParser", rtx.OnnxParser(network.real, logger))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    @recorded
    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            if not engine.refittable:
                logger.log(rtx.ILogger.ERROR, NOT_REFITTABLE)
                raise TypeError(NULL_POINTER)
            self.engine = engine

        def get_missing_weights(self) -> list[str]:
            return list(state.missing)

        def refit_cuda_engine(self) -> bool:
            return not state.missing

    @recorded
    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter: Any, logger: Any) -> None:
            assert isinstance(refitter, Refitter)

        def refit_from_file(self, model: str) -> bool:
            assert isinstance(model, str)
            state.refitted.append(model)
            return True

    @recorded
    class EngineInspector:
        def get_engine_information(self, format: Any) -> str:
            assert format is module.LayerInformationFormat.JSON
            return str(state.inspected)

    @recorded
    class ICudaEngine:
        def __init__(self, refittable: bool) -> None:
            self.refittable = refittable

        def create_engine_inspector(self) -> Any:
            return EngineInspector()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert classes["Runtime"]["methods"]["__init__"] == [["logger"]]

        def __setattr__(self, name: str, value: Any) -> None:
            assert name in classes["Runtime"]["attributes"]
            super().__setattr__(name, value)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            if serialized_engine not in (b"an engine", b"a stripped engine"):
                return None
            return ICudaEngine(serialized_engine == b"a stripped engine")

    module.Runtime = Runtime
    fake: ModuleType = module
    return fake
