"""Which model a worker scores with: it follows the champion, and changes between two micro-batches."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import RegistryError
from app.model_life import ModelLife
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
    """models: by alias, what `agents.score` reads once per micro-batch. refused: the version that is to
    score but is not fit to, while the one before it scores. away: why the registry cannot be asked."""

    def __init__(self, life: ModelLife, every_s: float, tell: Callable[[str], None]) -> None:
        """tell: a sentence to who watches the worker."""
        self._life, self._every_s, self._tell = life, every_s, tell
        self.models: dict[str, Model] = {}
        self.refusals: Counter[Reason] = Counter()
        self.refused: Refusal | None = None
        self.away: str | None = None

    @property
    def shown(self) -> str:
        """The model that scores, in two words."""
        return f"model {self.models[CHAMPION].card.version}" if self.models else "no model"

    @property
    def why(self) -> str:
        """Why nothing is scored, and what to do."""
        name = self._life.pipeline.name
        reason = (
            self.refused.sentence
            if self.refused
            else f"No model of {name} is the champion; run `headrace train --pipeline {name}`, or promote a version."
        )
        return f"{self.away} {reason}" if self.away else reason

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.look()

    async def look(self) -> None:
        """Change to the version that the champion's alias names, if it is another one and passes."""
        model = await asyncio.to_thread(self._found)
        if model is not None:  # from here on nothing waits: the next micro-batch is scored by it
            self.models[CHAMPION] = model
            self._tell(f"{self._life.pipeline.name}: {self.shown} scores from now on")

    # --- in a thread -----------------------------------------------------------------------------

    def _found(self) -> Model | None:
        """A model to change to, if any."""
        registry, name = self._life.registry, self._life.pipeline.name
        model = None
        try:
            model = self._new(self._life.aliases().get(CHAMPION))
            self._answers()
            if model is not None and registry.folder is not registry:  # what is known with the registry away
                registry.folder.point(name, CHAMPION, model.card.version)
        except (RegistryError, ModelError) as error:
            self._silent(str(error))
        except OSError as error:
            self._silent(
                f"The models in {registry.folder.root} cannot be read or written ({error}); mend that."
            )
        return model if model is not None or self.models else self._kept()

    def _new(self, version: str | None) -> Model | None:
        """Load what the alias names, unless it scores already or was refused lately. Raises RegistryError."""
        current = self.models.get(CHAMPION)
        if version is None:
            return None
        if current is not None and current.card.version == version:
            self.refused = None
            return None
        refused, now = self.refused, time.monotonic()
        if refused is not None and refused.version == version and now < refused.at + AGAIN_S:
            return None
        try:
            model = self._life.load(version)
        except ModelError as error:
            self._refuse(version, error, now)
            return None
        self.refused = None
        return model

    def _kept(self) -> Model | None:
        """Load the last champion that passed here."""
        folder, pipeline = self._life.registry.folder, self._life.pipeline
        try:
            version = folder.aliases(pipeline.name).get(CHAMPION)
        except ModelError:  # told before, where the folder is all there is
            return None
        if version is None or (self.refused is not None and self.refused.version == version):
            return None
        try:
            return folder.load(pipeline, version)
        except ModelError as error:
            if self.refused is None:
                self._refuse(version, error, time.monotonic())
            return None

    def _refuse(self, version: str, error: ModelError, now: float) -> None:
        reason: Reason = error.reason if isinstance(error, Refused) else "damaged"
        known = self.refused is not None and self.refused.version == version
        self.refused = Refusal(version, reason, str(error), now)
        if not known:
            self.refusals[reason] += 1
            goes_on = f"{self.shown} scores on" if self.models else "nothing is scored"
            self._tell(f"{self._life.pipeline.name}: {goes_on}. {error}")

    def _answers(self) -> None:
        if self.away is not None:
            self._tell("The registry answers again.")
        self.away = None

    def _silent(self, why: str) -> None:
        if self.away is None:
            self._tell(f"{why} The last champion that is known here scores meanwhile.")
        self.away = why
