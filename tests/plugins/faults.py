"""Broken plugins that the loader must survive: the files to install, and the expected messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.plugins.site import HOOK, NORMALIZER, Site

GLOBAL = "from atn_norms.registry import registry\n"
WINDOW = '''
from typing import Literal
from atn_norms.windows import Cumulative, WindowSpec

class EverSpec(WindowSpec):
    """Options of a cumulative window."""
    kind: Literal["KIND"] = "KIND"

    def build(self):
        return Cumulative()
'''


class Clock:
    """Fake clock that a plugin advances, so that the load of the machine does not matter."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@dataclass(frozen=True)
class Fault:
    """Files to install, and the expected report: entry point -> (status, pattern of the reason)."""

    install: Callable[[Site], None]
    expected: Mapping[str, tuple[str, str]]
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def one(name: str, code: str, reason: str, metadata: str | None = None, status: str = "failed") -> Fault:
    """Return a fault of one distribution with one entry point."""
    return Fault(lambda site: site.install(name, code, metadata=metadata), {name: (status, reason)})


def metadata(*lines: str) -> str:
    """Return the text of a METADATA file."""
    return "\n".join(["Metadata-Version: 2.1", *lines, ""])


def _rivals(site: Site) -> None:
    site.install("rival1", NORMALIZER.replace("KIND", "contested"))
    site.install("rival2", NORMALIZER.replace("KIND", "contested"))


NEWER = metadata("Name: dist-newer", "Version: 1.0", "Requires-Dist: numpy", "Requires-Dist: Atn_Norms[ablation]>=99")
OLDER = metadata("Name: dist-older", "Version: 1.0", "Requires-Dist: atn-norms (<0.0.1)")
UNREADABLE = "has entry points that do not parse"

FAULTS = {
    "raises": one("raises", "1 / 0", "ZeroDivisionError: division by zero"),
    "exits": one("exits", "import os, sys\nsys.exit(3)", "SystemExit: 3"),
    "raises a BaseException": one("base", "class Stop(BaseException): ...\nraise Stop('at once')", "Stop: at once"),
    "raises an exception that cannot be printed": one(
        "mute",
        "class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError('no')\nraise Mute",
        "Mute: its message cannot be made",
    ),
    "takes long": one(
        "slow",
        "from tests.plugins.faults import CLOCK\nCLOCK.now += 10\n" + NORMALIZER.replace("KIND", "slow"),
        "took 10.0 s to load",
        status="loaded",
    ),
    "registers nothing": one("empty", HOOK + "0", "registers no kind", status="loaded"),
    "registers in a generator": one(
        "lazy", NORMALIZER.replace("KIND", "lazy") + "    yield", "'atn_norms_register' as a generator or coroutine"
    ),
    "registers in a coroutine": one(
        "later", NORMALIZER.replace("KIND", "later").replace("def atn_", "async def atn_"), "a generator or coroutine"
    ),
    "registers and then raises": one(
        "half", NORMALIZER.replace("KIND", "half") + '    raise RuntimeError("late")\n', "RuntimeError: late"
    ),
    "registers while imported and then raises": one(
        "early", WINDOW.replace("KIND", "early") + GLOBAL + "registry.window(EverSpec)\n1 / 0", "ZeroDivisionError"
    ),
    "claims the kind of another plugin": Fault(
        _rivals,
        {
            f"rival{n}": ("loaded", r"'contested' is claimed by dist-rival\d \(.*\) and dist-rival\d \(.*unusable")
            for n in (1, 2)
        },
    ),
    "registers a built-in class again": one(
        "again",
        NORMALIZER.replace("KIND", "again")
        + "    from atn_norms.normalizers.features import LayerNormSpec\n    registry.normalizer(LayerNormSpec)\n",
        "got LayerNormSpec, which atn-norms registers; expected a class that no other plugin registers",
    ),
    "registers two classes of one kind": one(
        "pair",
        NORMALIZER.replace("KIND", "pair") + "    registry.normalizer(type('Other', (PMeanSpec,), {}))\n",
        r"'pair' is claimed by dist-pair \(\S+ and \S+\), so it is unusable; register only one of them",
        status="loaded",
    ),
    "misspells the hook": one(
        "misspelt", HOOK.replace("_register(", "_registre(") + "0", "unknown hook 'atn_norms_registre'; .*did you mean"
    ),
    "has no metadata": one("bare", NORMALIZER.replace("KIND", "bare"), "metadata has no Name and no Version", ""),
    "has no version": one(
        "undated", NORMALIZER.replace("KIND", "undated"), "metadata has no Version", metadata("Name: dist-undated")
    ),
    "is for a newer version": one(
        "newer",
        "import atn_norms.what_is_to_come",
        r"is written for atn-norms>=99, and this is \d+\.\d+\.\d+; install versions of the two that go together",
        NEWER,
    ),
    "is for an older version": one(
        "older", NORMALIZER.replace("KIND", "older"), r"is written for atn-norms<0\.0\.1, and this is", OLDER
    ),
    "requires nonsense": one(
        "nonsense",
        NORMALIZER.replace("KIND", "nonsense"),
        "requirements cannot be read: InvalidRequirement",
        metadata("Name: dist-nonsense", "Version: 1.0", "Requires-Dist: >=>="),
    ),
    "has no module": Fault(
        lambda site: site.install("gone", "", points="[atn_norms]\ngone = plugin_is_gone\n"),
        {"gone": ("failed", "ModuleNotFoundError: No module named 'plugin_is_gone'")},
    ),
    UNREADABLE: Fault(
        lambda site: site.install("garbled", "", points="[atn_norms]\nthis is no entry point\n"),
        {"dist-garbled": ("failed", "entry points cannot be read")},
    ),
    "has options without a schema": one(
        "opaque",
        NORMALIZER.replace("KIND", "opaque").replace("p: float = Field(2.0, gt=0)", "p: type(print) = print"),
        "PydanticSchemaGenerationError",
    ),
    "has options whose schema fails": one(
        "unsaid",
        NORMALIZER.replace("KIND", "unsaid")
        .replace("p: float = Field(2.0, gt=0)", "p: Callable = print")
        .replace("import torch", "import torch\nfrom collections.abc import Callable"),
        "the options of normalizer:unsaid have no JSON schema: PydanticInvalidForJsonSchema",
    ),
}


def installed(site: Site, names: list[str]) -> dict[str, tuple[str, str]]:
    """Install the named faults; return the expected report of each entry point."""
    expected: dict[str, tuple[str, str]] = {}
    for name in names:
        FAULTS[name].install(site)
        expected |= FAULTS[name].expected
    return expected
