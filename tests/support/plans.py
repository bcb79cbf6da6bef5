"""Plans whose shards are a line of text, and what makes, publishes and reads them."""

from pathlib import Path

from pipeline.core.plans import carry_out, publish, store_of
from pipeline.core.provenance import digest
from pipeline.core.records import Entry, Part, Plan, Recipe
from pipeline.core.store import Store

STAGE, FOLDER = "download", "images"
NAMES = ["00000.parquet", "00001.parquet"]


def plan_of(value: int, names: list[str] = NAMES, round: int = 0) -> Plan:
    parts = tuple(Part(name=name, origin=digest([value, name])) for name in names)
    recipe = Recipe(parameters={"value": value, "round": round})
    return Plan(stage=STAGE, recipe=recipe, parts=parts, round=round)


class Maker:
    """Writes a shard's origin into it; counts what it makes."""

    def __init__(self, plan: Plan, store: Store, settled: bool = True):
        self.plan, self.store, self.settled, self.made = plan, store, settled, []

    def is_settled(self, entry: Entry) -> bool:
        return self.settled

    def differences(self, entry: Entry) -> list[str]:
        return ["value"]

    def make(self, names):
        for part in self.plan.parts:
            if part.name in names:
                self.made.append(part.name)
                yield put(self.store, part, self.plan.round)


def put(store: Store, part: Part, round: int = 0, good: int = 5, text: str | None = None) -> Entry:
    text = text or part.origin

    def write(path: Path) -> int:
        path.write_text(text)
        return good

    return store.commit(part.name, part.origin, round, write)


def run(data: Path, plan: Plan, settled: bool = True) -> list[str]:
    """A whole run; the shards that it had to make."""
    store = store_of(data, STAGE)
    maker = Maker(plan, store, settled)
    publish(plan, store, data, carry_out(plan, maker, store, data), {})
    return maker.made


def texts(data: Path) -> dict[str, str]:
    files = (data / FOLDER).glob("*.parquet")
    return {path.name: path.read_text() for path in sorted(files)}


def origins(plan: Plan) -> dict[str, str]:
    return {part.name: part.origin for part in plan.parts}
