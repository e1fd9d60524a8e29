"""`sedac info`: what can be asked of it."""

from __future__ import annotations

from sedac_hf.cli_options import Json, Model, Quiet
from sedac_hf.cli_support import Screen, reported, write_json

__all__ = ["info"]


@reported
def info(model: Model = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Print versions and device, or what an artefact holds, certifies, and runs on here."""
    from sedac_hf.cli_info import artefact_info, environment_info
    from sedac_hf.cli_tables import info_table

    screen = Screen(quiet=quiet, as_json=as_json)
    values = environment_info() if model is None else artefact_info(model, screen)
    if as_json:
        write_json(values)
    else:
        screen.out.print(info_table(values))
