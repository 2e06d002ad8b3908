"""The life of a model: a version is tried, becomes the champion, steps back, is put away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from app import registry as registries
from app.local.services import Addresses
from app.registry import Registry, no_such
from app.settings import Metric, Settings
from models.canary import Canary
from models.errors import HeadraceError
from models.guard_rails import Breach
from models.pipeline import Pipeline
from models.scoring import Card, Model, ModelError, Refused
from tables.model_folder import CANARY, CHAMPION, PREVIOUS, is_name

CHALLENGER = "challenger-"  # how the aliases of those begin that are to be compared with the champion
ROW_US = 200.0  # some hundred times what a hundred trees take
TRIED_ROWS = 256  # of a batch: what a call costs whatever its size hardly counts then
TRIES = 5  # of which the best counts, for others use the processor too


class NotPromoted(HeadraceError):
    """The version may be well, but it does not get the alias."""


@dataclass(frozen=True)
class ModelLife:
    """The versions of one pipeline's model. Raises RegistryError where the registry does not answer.

    row_us: microseconds that a version may take for an event. by: the metric in which a new champion must
    beat the one before, on the same test period.
    """

    pipeline: Pipeline
    registry: Registry
    row_us: float = ROW_US
    by: Metric | None = None

    def load(self, version: str) -> Model:
        """Fetch, load, check and warm a version. Raises ModelError where it is refused."""
        self.registry.fetch(self.pipeline.name, version)
        model = self.registry.folder.load(self.pipeline, version)
        took = _row_us(model)
        if took > self.row_us:
            raise Refused(
                "slow",
                f"The model {version} takes {took:.1f} us for an event, and {self.row_us:g} are allowed; train a "
                "smaller one, or raise HEADRACE_MODEL_ROW_US.",
            )
        return model

    def champion(self) -> Model:
        """The version that is to score. Raises ModelError where there is none, or it is refused."""
        version = self.aliases().get(CHAMPION)
        if version is None:
            raise ModelError(
                f"No model of {self.pipeline.name} is the champion; run "
                f"`headrace train --pipeline {self.pipeline.name}`, or promote a version."
            )
        return self.load(version)

    def aliases(self) -> dict[str, str]:
        """Version by alias."""
        return self.registry.aliases(self.pipeline.name)

    def register(self, version: str, promote: bool) -> bool:
        """Publish a version of the folder, and make it the champion where asked, or where there is none that
        this definition takes. Whether it is the champion then."""
        self.registry.publish(self.pipeline.name, version)
        if not promote:
            try:
                return self.champion().card.version == version
            except ModelError:
                pass
        self.promote(version)
        return True

    def promote(self, version: str, alias: str = CHAMPION) -> str:
        """Let an alias name a version, by its name or alias, that passes the gate. One that is only in the folder is
        published. Returns its name."""
        name = self.pipeline.name
        version = self.aliases().get(version, version)
        if not is_name(alias) or not (alias == CHAMPION or alias.startswith(CHALLENGER)):
            raise NotPromoted(
                f"The alias {alias} is neither {CHAMPION} nor {CHALLENGER}NAME; choose one of these."
            )
        self._find(version)
        card = self.load(version).card
        champion = self.aliases().get(CHAMPION)
        if alias == CHAMPION and champion is not None and champion != version:
            self._beats(card, champion)
            self.registry.point(name, PREVIOUS, champion)
        self.registry.point(name, alias, version)
        if alias == CHAMPION:
            self._no_canary(version)
        return version

    def rollback(self) -> str:
        """Make the champion before the champion again; a second time undoes it. Returns its version."""
        name, aliases = self.pipeline.name, self.aliases()
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if previous is None or champion is None or previous == champion:
            raise NotPromoted(
                f"No champion of {name} is known before this one; promote a version by its name."
            )
        self.load(previous)
        # After a crash between the two there is nothing to go back to, and the champion is the right one.
        self.registry.point(name, CHAMPION, previous)
        self.registry.point(name, PREVIOUS, champion)
        self._no_canary(previous)
        return previous

    def set_canary(self, version: str, share: float) -> str:
        """Let a version, by its name or alias, decide for so many percent of the entities. Returns its name.

        One that was taken back gets another chance so, and no other way.
        """
        name, aliases = self.pipeline.name, self.aliases()
        version = aliases.get(version, version)
        if version == aliases.get(CHAMPION):
            raise NotPromoted(f"The version {version} is the champion, which decides for all others already.")
        if CHAMPION not in aliases:
            raise NotPromoted(f"{name} has no champion to decide for all others; promote one first.")
        self._find(version)
        self.load(version)
        # The alias comes last: what it names has a share. A crash between the two leaves the canary before, if any.
        self.registry.note(name, version, Canary(share, _now_ms()))
        self.registry.point(name, CANARY, version)
        return version

    def canary(self, aliases: Mapping[str, str]) -> Canary | None:
        """What the alias of the canary names decides for now; None where nothing does, or was taken back."""
        version = aliases.get(CANARY)
        if version is None or version == aliases.get(CHAMPION):
            return None
        return self.registry.canary(self.pipeline.name, version)

    def take_back(self, version: str, since: int, breach: Breach) -> None:
        """A guard rail ends what a canary began `since`, in one write. The alias stays, and the registry says why it
        decides nothing."""
        canary = self.registry.canary(self.pipeline.name, version)
        if canary is not None and canary.since == since and canary.reason is None:
            over = msgspec.structs.replace(canary, rail=breach.rail, reason=breach.sentence, until=_now_ms())
            self.registry.note(self.pipeline.name, version, over)

    def withdraw(self, alias: str) -> str:
        """End the canary, or a challenger's time in the shadow. Returns its version, which stays."""
        name, aliases = self.pipeline.name, self.aliases()
        if not (alias == CANARY or alias.startswith(CHALLENGER)) or alias not in aliases:
            known = ", ".join(a for a in aliases if a == CANARY or a.startswith(CHALLENGER)) or "none"
            raise NotPromoted(f"{name} has no challenger {alias}; it has {known}.")
        self.registry.unpoint(name, alias)
        return aliases[alias]

    def archive(self, version: str) -> None:
        """Put a version away that no alias names: it is promoted no more."""
        in_use = [alias for alias, named in self.aliases().items() if named == version]
        if in_use:
            raise NotPromoted(
                f"The version {version} is the {in_use[0]}; promote another, or withdraw it, first."
            )
        self._find(version)
        self.registry.archive(self.pipeline.name, version)

    def examined(self, version: str) -> dict[str, Any]:
        """What there is to say of a version, by its name or alias; `refused` says why workers do not take it."""
        name, aliases = self.pipeline.name, self.aliases()
        version = aliases.get(version, version)
        found: dict[str, Any] = {"version": version, "refused": None, "reason": None}
        listed = next((v for v in self.registry.versions(name) if v.version == version), None)
        if listed is None and version not in aliases.values():
            raise no_such(name, version)
        try:
            card = self.load(version).card
            found |= {"tested": card.tested, "thresholds": card.thresholds, "features": card.features}
        except ModelError as error:
            found |= {"refused": str(error), "reason": error.reason if isinstance(error, Refused) else None}
        if listed is not None:
            found |= {
                "registered": listed.created, "definition": listed.definition,
                "archived": listed.archived, "metrics": listed.metrics,
                "canary": None if listed.canary is None else msgspec.to_builtins(listed.canary),
            }  # fmt: skip
        return found | {"aliases": [alias for alias, named in aliases.items() if named == version]}

    def _no_canary(self, champion: str) -> None:
        """Who decides for all is the canary of none."""
        if self.aliases().get(CANARY) == champion:
            self.registry.unpoint(self.pipeline.name, CANARY)

    def _find(self, version: str) -> None:
        """Have it in the registry, and not put away."""
        name = self.pipeline.name
        found = next((v for v in self.registry.versions(name) if v.version == version), None)
        if found is not None and found.archived:
            raise NotPromoted(f"The version {version} is archived; train one, or promote another.")
        if found is None:
            if all(v.version != version for v in self.registry.folder.versions(name)):
                raise no_such(name, version)
            self.registry.publish(name, version)

    def _beats(self, card: Card, champion: str) -> None:
        """Refuse a version that is not better than the champion where it has to be."""
        if self.by is None:
            return
        self.registry.fetch(self.pipeline.name, champion)
        _, other = self.registry.folder.read(self.pipeline.name, champion)
        if card.tested is None or card.tested != other.tested:
            raise NotPromoted(
                f"The version {card.version} and the champion {champion} were not tested on the same period, so "
                f"their {self.by} cannot be compared; train both on the same days, or unset HEADRACE_PROMOTE_BY."
            )
        mine, best = (c.metrics.get(self.by, float("nan")) for c in (card, other))
        if not mine > best:
            raise NotPromoted(
                f"The version {card.version} has {self.by} {mine:.4f}, which does not beat the {best:.4f} of the "
                f"champion {champion}; train a better one, or unset HEADRACE_PROMOTE_BY."
            )


def of(settings: Settings, addresses: Addresses, pipeline: Pipeline) -> ModelLife:
    """As the settings say."""
    registry = registries.of(settings, addresses)
    return ModelLife(pipeline, registry, settings.model_row_us, settings.promote_by)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _row_us(model: Model) -> float:
    """What a row of a batch costs, microseconds: the best of some tries, which also warm the model."""
    golden = np.array(model.card.golden, np.float64)
    rows = np.resize(golden, (TRIED_ROWS, golden.shape[1]))
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        model.score_many(rows)
        best = min(best, time.perf_counter() - began)
    return best / TRIED_ROWS * 1e6
