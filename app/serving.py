"""Which models a worker scores with: it follows the champion and the challengers, between two micro-batches."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import RegistryError
from app.model_life import CHALLENGER, ModelLife
from models.scoring import Model, ModelError, Reason, Refused
from tables.model_folder import CHAMPION

# A version that was refused gets another chance: the machine was slow, or a file half there.
AGAIN_S = 30.0


@dataclass(frozen=True)
class Refusal:
    version: str
    reason: Reason
    sentence: str
    at: float  # s, of the monotonic clock


class Serving:
    """models: by alias, what agents.score and agents.shadow read once per micro-batch. refused: by alias, versions that
    are to score but are not fit to; the champion before goes on, a challenger does not. away: why the registry cannot
    be asked."""

    def __init__(self, life: ModelLife, every_s: float, tell: Callable[[str], None]) -> None:
        """tell: a sentence to who watches the worker."""
        self._life, self._every_s, self._tell = life, every_s, tell
        self._named: dict[str, str] = {}  # version by alias, as the registry said last
        self.models: dict[str, Model] = {}
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
        model = await asyncio.to_thread(self._found)
        if model is not None:  # from here on nothing waits: the next micro-batch is scored by it
            self.models[CHAMPION] = model
            self._tell(f"{self._life.pipeline.name}: {self.shown} scores from now on")

    async def look_at_challengers(self) -> None:
        """Likewise of those that the last look at the aliases found; who is named no more stops."""
        named = {alias: v for alias, v in self._named.items() if alias.startswith(CHALLENGER)}
        for alias in (self.models.keys() | self.refused.keys()) - named.keys() - {CHAMPION}:
            self.refused.pop(alias, None)
            if self.models.pop(alias, None) is not None:
                self._tell(f"{self._life.pipeline.name}: {alias} scores no more")
        for alias, version in named.items():
            model = await asyncio.to_thread(self._challenger, alias, version)
            if model is not None:
                self.models[alias] = model
                self._tell(
                    f"{self._life.pipeline.name}: {alias}, {version}, scores in the shadow from now on"
                )
            elif alias in self.refused:  # the one before it is not what the alias names
                self.models.pop(alias, None)

    def drop(self, alias: str, version: str, error: Exception) -> None:
        """A challenger failed to score: it stops until its alias names another version."""
        current = self.models.get(alias)
        if current is None or current.card.version != version:
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
            self._named = self._life.aliases()
            if CHAMPION in self._named:
                model = self._new(CHAMPION, self._named[CHAMPION])
            self._answers()
            if model is not None and registry.folder is not registry:  # what is known with the registry away
                registry.folder.point(name, CHAMPION, model.card.version)
        except (RegistryError, ModelError) as error:
            self._silent(str(error))
        except OSError as error:
            self._silent(
                f"The models in {registry.folder.root} cannot be read or written ({error}); mend that."
            )
        return model if model is not None or CHAMPION in self.models else self._kept()

    def _challenger(self, alias: str, version: str) -> Model | None:
        """A challenger to change to, if any. What keeps it from being loaded is told by the next look."""
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
