"""Where exported models lie: `<folder>/<pipeline>/<version>/`, and a file `champion` that names one.

model.onnx     the graph, the only thing that is ever loaded
model.json     its card (models.scoring.Card)
features.txt   the names of its inputs in their order, for people
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from models.pipeline import Pipeline
from models.scoring import Card, Model, ModelError


def save(folder: Path, graph: bytes, card: Card) -> Path:
    """Write one version and make it the champion. A crash leaves the old champion or the new one."""
    home = folder / card.pipeline
    version = home / card.version
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.onnx").write_bytes(graph)
    (version / "features.txt").write_text("\n".join(card.features) + "\n")
    (version / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(card)))
    pointer = home / "champion.new"
    pointer.write_text(card.version + "\n")
    pointer.replace(home / "champion")
    return version


def load(folder: Path, pipeline: Pipeline) -> Model:
    """The model that a folder names as its champion: `<folder>/<pipeline>/champion` holds the version."""
    home = folder / pipeline.name
    try:
        version = (home / "champion").read_text().strip()
        card = msgspec.json.decode((home / version / "model.json").read_bytes(), type=Card)
        graph = (home / version / "model.onnx").read_bytes()
    except OSError as error:
        raise ModelError(
            f"There is no model of {pipeline.name} ({error.filename} cannot be read); "
            f"run `headrace train --pipeline {pipeline.name}`."
        ) from None
    except msgspec.MsgspecError as error:
        raise ModelError(
            f"The model card {home / version / 'model.json'} is damaged ({error}); train again."
        ) from None
    return Model(graph, card, pipeline)
