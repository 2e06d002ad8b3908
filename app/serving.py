"""Which models a worker scores with: it follows champion, canary and challengers, between two micro-batches."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from app.canary_watch import Watch
from app.errors import RegistryError
from app.model_life import CHALLENGER, ModelLife
from models.canary import Canary
from models.guard_rails import Bounds, Breach, failed
from models.scoring import Model, ModelError, Reason, Refused, Scores
from tables.model_folder import CANARY, CHAMPION

# A version that was refused gets another chance: the machine was slow, or a file half there.
AGAIN_S = 30.0


@dataclass(frozen=True)
class Refusal:
    version: str
    reason: Reason
    sentence: str
    at: float  # s, of the monotonic clock


class Serving:
    """models: by alias, what agents.score and agents.shadow read once per micro-batch. shares: by alias, of the canary
    the percent of entities. taken_back: by version, which guard rail ended it as the canary. refused: by alias,
    versions that are to score but are not fit to; the champion before goes on, others do not. away: why the
    registry cannot be asked."""

    def __init__(
        self, life: ModelLife, every_s: float, tell: Callable[[str], None], bounds: Bounds | None = None
    ) -> None:
        """tell: a sentence to who watches the worker. bounds: of the canary."""
        self._life, self._every_s, self._tell = life, every_s, tell
        self._bounds = bounds or Bounds()
        self._named: dict[str, str] = {}  # version by alias, as the registry said last
        self._canary: Canary | None = None  # likewise, of the version that has the alias
        self._watch: Watch | None = None
        self._breaches: dict[str, tuple[int, Breach]] = {}  # that the registry does not know yet
        self.models: dict[str, Model] = {}
        self.shares: dict[str, float] = {}
        self.taken_back: dict[str, str] = {}
        self.refusals: Counter[Reason] = Counter()
        self.refused: dict[str, Refusal] = {}
        self.away: str | None = None

    @property
    def life(self) -> ModelLife:
        """The versions that it chooses among."""
        return self._life

    @property
    def shown(self) -> str:
        """The model that scores, in two words."""
        return f"model {self.models[CHAMPION].card.version}" if CHAMPION in self.models else "no model"

    @property
    def why(self) -> str:
        """Why nothing is scored, and what to do."""
        name = self._life.pipeline.name
        reason = (
            self.refused[CHAMPION].sentence
            if CHAMPION in self.refused
            else f"No model of {name} is the champion; run `headrace train --pipeline {name}`, or promote a version."
        )
        return f"{self.away} {reason}" if self.away else reason

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look_at_challengers()
            await asyncio.sleep(self._every_s)
            await self.look()

    async def look(self) -> None:
        """Change to the version that the champion's alias names, if it is another one and passes."""
        if self._watch is not None and (breach := self._watch.breach()) is not None:
            self._take_back(breach)
        model = await asyncio.to_thread(self._found)
        if model is not None:  # from here on nothing waits: the next micro-batch is scored by it
            self.models[CHAMPION] = model
            self._tell(f"{self._life.pipeline.name}: {self.shown} scores from now on")

    async def look_at_challengers(self) -> None:
        """Likewise of the canary and those that the last look at the aliases found; who is named no more stops."""
        named = {alias: v for alias, v in self._named.items() if alias.startswith(CHALLENGER)}
        if CANARY in self._named and self._named[CANARY] not in self._breaches:
            named[CANARY] = self._named[CANARY]
        for alias in (self.models.keys() | self.refused.keys()) - named.keys() - {CHAMPION}:
            self.refused.pop(alias, None)
            if self._stop(alias):
                self._tell(f"{self._life.pipeline.name}: {alias} scores no more")
        for alias, version in named.items():
            model = await asyncio.to_thread(self._challenger, alias, version)
            if alias == CANARY:
                self._set_canary(model, version)
            elif model is not None:
                self.models[alias] = model
                self._tell(
                    f"{self._life.pipeline.name}: {alias}, {version}, scores in the shadow from now on"
                )
            if alias in self.refused:  # the one before it is not what the alias names
                self._stop(alias)

    def _set_canary(self, model: Model | None, version: str) -> None:
        """A new model, or the one before with its share of now."""
        if self._canary is None or version in self._breaches:  # meanwhile a rail has ended it
            return
        if model is not None:
            self._stop(CANARY)
            self._watch = Watch(model, self._bounds)
            self.models[CANARY] = self._watch.model
        elif CANARY in self.models and self.models[CANARY].card.version != version:
            self._stop(CANARY)
        share = self._canary.share
        if CANARY in self.models and self.shares.get(CANARY) != share:
            self._tell(
                f"{self._life.pipeline.name}: canary, {version}, decides for {share:g} % by "
                f"{self._life.pipeline.entities[0].name} from now on"
            )
            self.shares[CANARY] = share

    def _stop(self, alias: str) -> bool:
        """Whether it was there."""
        self.shares.pop(alias, None)
        if alias == CANARY:
            self._watch = None
        return self.models.pop(alias, None) is not None

    def watch(self, version: str, scores: Scores, champion: Model, champions: Scores) -> None:
        """scores, champions: of this canary, if it still is, and of the champion, of the same events."""
        if self._watch is not None and self._watch.model.card.version == version:
            self._watch.both(scores, champion, champions)

    def _take_back(self, breach: Breach) -> None:
        """It decides nothing from here on; the registry is told by the next look, and all others by theirs."""
        version = self.models[CANARY].card.version
        if self._canary is not None:
            self._breaches[version] = self._canary.since, breach
        self.taken_back[version] = breach.rail
        self._stop(CANARY)
        self._tell(
            f"{self._life.pipeline.name}: {breach.sentence} It is taken back, and decides nothing more."
        )

    def drop(self, alias: str, version: str, error: Exception) -> None:
        """A canary or challenger failed to score: it stops until it is set anew, or its alias names another version."""
        current = self.models.get(alias)
        if current is None or current.card.version != version:
            return
        if alias == CANARY:
            self._take_back(failed(version, error))
            return
        del self.models[alias]
        first = (str(error) or type(error).__name__).splitlines()[0]
        sentence = f"The model {version} failed to score ({first}); train another, or withdraw {alias}."
        self._refuse(alias, Refusal(version, "failed", sentence, math.inf))  # never again

    # --- in a thread -----------------------------------------------------------------------------

    def _found(self) -> Model | None:
        """A model to change to, if any."""
        registry, name = self._life.registry, self._life.pipeline.name
        model = None
        try:
            named = self._life.aliases()
            if CHAMPION in named:
                model = self._new(CHAMPION, named[CHAMPION])
            if model is not None and registry.folder is not registry:  # what is known with the registry away
                registry.folder.point(name, CHAMPION, model.card.version)
            self._look_at_canary(named)
            self._named = named
            self._answers()
        except (RegistryError, ModelError) as error:
            self._silent(str(error))
        except OSError as error:
            self._silent(
                f"The models in {registry.folder.root} cannot be read or written ({error}); mend that."
            )
        return model if model is not None or CHAMPION in self.models else self._kept()

    def _look_at_canary(self, named: dict[str, str]) -> None:
        """Tell the registry what a rail has found, and see what it says. Leaves a canary in `named` that may decide."""
        told = dict(self._breaches)
        for ended, (since, breach) in told.items():
            self._life.take_back(ended, since, breach)
        version, canary = named.get(CANARY), self._life.canary(named)
        if version is None or canary is None or canary.reason is not None:
            named.pop(CANARY, None)
        before, self._canary = self._canary, canary
        for ended in told:  # no earlier: what the registry said before must not set it again
            del self._breaches[ended]
        self.taken_back = {}
        if version is not None and canary is not None and canary.reason is not None:
            self.taken_back[version] = canary.rail or ""
            current = self.models.get(CANARY)
            if before != canary and current is not None and current.card.version == version:
                self._tell(
                    f"{self._life.pipeline.name}: {canary.reason} It was taken back by another process."
                )

    def _challenger(self, alias: str, version: str) -> Model | None:
        """A challenger to change to, if any. What keeps it from being loaded is told by the next look."""
        models, refused = dict(self.models), self.refused.get(alias)
        current = models.pop(alias, None)
        known = next((m for m in models.values() if m.card.version == version), None)
        if known is not None and refused is None and (current is None or current.card.version != version):
            return known  # by another alias
        try:
            return self._new(alias, version)
        except (RegistryError, ModelError, OSError):
            return None

    def _new(self, alias: str, version: str) -> Model | None:
        """Load what the alias names, unless it scores already or was refused lately. Raises RegistryError."""
        current = self.models.get(alias)
        if current is not None and current.card.version == version:
            self.refused.pop(alias, None)
            return None
        refused, now = self.refused.get(alias), time.monotonic()
        if refused is not None and refused.version == version and now < refused.at + AGAIN_S:
            return None
        try:
            model = self._life.load(version)
        except ModelError as error:
            self._refuse(alias, _refusal(version, error, now))
            return None
        self.refused.pop(alias, None)
        return model

    def _kept(self) -> Model | None:
        """Load the last champion that passed here."""
        folder, pipeline = self._life.registry.folder, self._life.pipeline
        try:
            version = folder.aliases(pipeline.name).get(CHAMPION)
        except ModelError:  # told before, where the folder is all there is
            return None
        refused = self.refused.get(CHAMPION)
        if version is None or (refused is not None and refused.version == version):
            return None
        try:
            return folder.load(pipeline, version)
        except ModelError as error:
            if refused is None:
                self._refuse(CHAMPION, _refusal(version, error, time.monotonic()))
            return None

    def _refuse(self, alias: str, refusal: Refusal) -> None:
        before = self.refused.get(alias)
        self.refused[alias] = refusal
        if before is not None and before.version == refusal.version:
            return
        self.refusals[refusal.reason] += 1
        goes_on = f"{self.shown} scores on" if CHAMPION in self.models else "nothing is scored"
        if alias != CHAMPION:
            goes_on = f"{alias} does not score"
        self._tell(f"{self._life.pipeline.name}: {goes_on}. {refusal.sentence}")

    def _answers(self) -> None:
        if self.away is not None:
            self._tell("The registry answers again.")
        self.away = None

    def _silent(self, why: str) -> None:
        if self.away is None:
            self._tell(f"{why} The last champion that is known here scores meanwhile.")
        self.away = why


def _refusal(version: str, error: ModelError, now: float) -> Refusal:
    reason: Reason = error.reason if isinstance(error, Refused) else "damaged"
    return Refusal(version, reason, str(error), now)
