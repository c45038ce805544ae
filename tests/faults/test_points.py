"""Kill a study at every named point of its writes: the resumed study is identical."""

import shutil
import signal

import pytest

from tests.faults import children
from tests.faults.children import ended
from tests.faults.registry import fault

WRITES = ("begin", "written", "synced", "renamed", "durable")
WRITTEN = (
    "trial.json", "study.yaml", "environment.json", "study.resolved.json",
    "run.json", "checkpoint.pt", "model.safetensors", "result.json",
)  # fmt: skip
POINTS = [
    "folder:made",
    *(f".lock:{stage}" for stage in ("begin", "taken", "written", "ended")),
    *(f"log.txt:{stage}" for stage in ("add", "added")),
    *(f"{name}:{stage}" for name in WRITTEN for stage in WRITES),
    *(f"metrics.jsonl:{stage}" for stage in ("cut", "shortened", "add", "added", "sync", "marked")),
    *(f"checkpoint.pt:{stage}" for stage in ("remove", "removed")),
]
OF_FAILURE = [f"error.json:{stage}" for stage in WRITES]
OF_RECOVERY = [f"error.json:{stage}" for stage in ("remove", "removed")]


def passes(target, place, folder=None):
    """Return the points that a study passes, repeats included."""
    seen = place / f"{target.__name__}.txt"
    seen.unlink(missing_ok=True)
    assert ended(target, folder or place / target.__name__, fault=f"trace@{seen}").error == ""
    return seen.read_text().split()


def test_the_list_is_complete(place):
    assert set(passes(children.whole, place)) == set(POINTS)
    assert set(passes(children.failing, place)) >= set(OF_FAILURE)
    assert set(passes(children.whole, place, place / "failing")) >= set(OF_RECOVERY)


@fault("the process killed at any of the named points: before and after each write, fsync, rename", "identical")
@pytest.mark.parametrize("point", [*POINTS, *OF_FAILURE, *OF_RECOVERY])
def test_killed_at_a_point(point, place, undisturbed):
    folder = place / "study"
    if point in OF_RECOVERY:
        assert ended(children.failing, folder).result["failed"] == 1
    target = children.failing if point in OF_FAILURE else children.whole
    assert ended(target, folder, fault=f"kill@{point}").code == -signal.SIGKILL
    outcome = ended(children.whole, folder)
    assert (outcome.error, outcome.result["done"]) == ("", 1)
    assert children.truth(folder) == undisturbed


@pytest.mark.deep
def test_killed_at_every_passing_of_every_point(place, undisturbed):
    points = passes(children.whole, place)
    assert len(points) > 60
    for number, point in enumerate(points):
        folder = place / str(number)
        time = points[: number + 1].count(point)
        assert ended(children.whole, folder / "study", fault=f"kill@{point}#{time}").code == -signal.SIGKILL
        ended(children.whole, folder / "study", fault="kill@metrics.jsonl:shortened")  # and again during recovery
        assert ended(children.whole, folder / "study").error == ""
        assert children.truth(folder / "study") == undisturbed, (point, time)
        shutil.rmtree(folder)
